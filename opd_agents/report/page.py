"""The page: everything that was read and drawn, through one template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opd_agents.report import formatting
from opd_agents.report.costs import api_facts
from opd_agents.report.curves import comparison_charts, stage_charts
from opd_agents.report.escaping import clip
from opd_agents.report.examples import AFTER, BEFORE, examples
from opd_agents.report.groups import Group, read_groups
from opd_agents.report.inert import parts
from opd_agents.report.policies import COLUMNS, comparisons, during_run, headline, rows
from opd_agents.report.raised import raised
from opd_agents.report.reading import number
from opd_agents.report.trajectories import Viewer, viewer


def render(paths: Sequence[Path], side_name: str) -> tuple[str, str]:
    """The whole page, and the script with the trajectories that are not in it, which ``side_name`` names
    there; "" where all are.

    Raises:
        RunFolderError: a folder or file that cannot be read.
    """
    groups = read_groups(paths)
    environment = Environment(
        loader=PackageLoader("opd_agents.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clip": clip,
        "percent": formatting.percent,
        "count": formatting.count,
        "decimal": formatting.decimal,
    }
    found = viewer(groups, side_name)
    context = _context(groups) | _viewer_context(found, side_name)
    return environment.get_template("page.html.jinja").render(context), found.side if found else ""


def _viewer_context(found: Viewer | None, side_name: str) -> dict[str, Any]:
    """The script is ours and the data can end no element, so both are written as they are; nothing else in
    the page may run, for only these elements know the ``nonce``."""
    if found is None:
        return {"viewer": None}
    script = files("opd_agents.report").joinpath("viewer.js").read_text(encoding="utf-8")
    shown = {"viewer": found, "side_name": side_name, "data": Markup(found.page), "script": Markup(script)}
    return shown | {"nonce": hashlib.sha256(found.page.encode()).hexdigest()[:32]}


def _context(groups: Sequence[Group]) -> dict[str, Any]:
    modified = datetime.fromtimestamp(max(run.modified() for group in groups for run in group.runs), UTC)
    table = rows(groups)
    return {
        "title": ", ".join(group.name for group in groups),
        "date": f"{modified.day} {modified:%B %Y, %H:%M} UTC",
        "groups": [_group_context(group, f"g{i}") for i, group in enumerate(groups)],
        "several": len(groups) > 1,
        "rows": table,
        "during_run": any(during_run(row.key) for row in table),
        "ties": any(row.best for row in table),
        "columns": [title for _, title, _ in COLUMNS],
        "comparison": comparison_charts(groups, "all"),
        "examples": examples(groups[0]),
        "compared": [comparison for group in groups for comparison in comparisons(group)],
        "trained": any(group.training() for group in groups) or not any(group.evaluated for group in groups),
        "policy_names": (formatting.policy_label(BEFORE), formatting.policy_label(AFTER)),
    }


def _group_context(group: Group, prefix: str) -> dict[str, Any]:
    return {
        "name": group.name,
        "evaluated": group.evaluated,
        "n_seeds": len(group.runs),
        "folders": [str(run.path) for run in group.runs],
        "headline": headline(group),
        "facts": _facts(group),
        "pending": _pending(group),
        "parts": parts(group),
        "raised": raised(group),
        "stages": [
            (label, stage_charts(stages, f"{prefix}s{i}"), max(len(stage.metrics) for stage in stages))
            for i, (label, stages) in enumerate(group.training().items())
        ],
    }


def _facts(group: Group) -> list[tuple[str, str]]:
    """What the training cost: sums over its stages, in one run or in all seeds; of an evaluation, what it
    was."""
    if group.evaluated:
        return [(str(title), str(value)) for title, value in group.runs[0].summary.get("asked", {}).items()]
    stages = [stage for stages in group.training().values() for stage in stages]
    times = [seconds for run in group.runs if (seconds := number(run.summary.get("seconds"))) is not None]
    scope = [
        *(["all stages"] if len(stages) > len(group.runs) else []),
        *(["all seeds"] if len(group.runs) > 1 else []),
    ]
    facts = [("Wall time", formatting.seconds(sum(times)))] if times else []
    for key, title, unit in (
        ("total/seconds", "Training time", formatting.seconds),
        ("total/flops", "Training compute", formatting.flops),
        ("total/flops/rollout", "Compute for rollouts", formatting.flops),
        ("total/flops/teacher", "Compute for the teacher", formatting.flops),
        ("total/flops/update", "Compute for updates", formatting.flops),
        ("total/uncounted_tokens", "Tokens of unknown compute", formatting.count),
        ("total/generated_tokens", "Generated tokens", formatting.count),
        ("total/teacher_tokens", "Teacher tokens", formatting.count),
    ):
        last = [
            max(found)
            for stage in stages
            if (found := [v for row in stage.metrics if (v := number(row.get(key))) is not None])
        ]
        if last:
            facts.append((", ".join([title, *scope]), unit(sum(last))))
    return facts + _ends(group) + api_facts(stages)


def _ends(group: Group) -> list[tuple[str, str]]:
    """Why the stages ended, by the key of the config that ended them, where they say so."""
    found = []
    for label, stages in group.training().items():
        ends = dict.fromkeys(str(stage.summary["ended"]) for stage in stages if stage.summary.get("ended"))
        if ends:
            found.append(": ".join(filter(None, [label, " or ".join(ends)])))
    return [("Ended by", "; ".join(found))] if found else []


def _pending(group: Group) -> str:
    """A sentence about runs that have not finished; empty if all have."""
    running = [run for run in group.runs if not run.summary]
    if not running:
        return ""
    if running[0].evaluated:
        return "The evaluation has not finished: the same command goes on with it."
    stages = [stage for run in running for _, stage in run.training()]
    steps = [number(stage.metrics[-1].get("step")) or 0.0 for stage in stages]
    who = "This run has" if len(group.runs) == 1 else f"{len(running)} of {len(group.runs)} seeds have"
    at = f" The last step written is {max(steps):.0f}." if steps else ""
    return f"{who} no summary yet: training goes on or was stopped.{at}"
