"""The page: everything that was read and drawn, through one template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from opd_agents.report import formatting
from opd_agents.report.costs import api_facts
from opd_agents.report.curves import comparison_charts, stage_charts
from opd_agents.report.examples import AFTER, BEFORE, examples
from opd_agents.report.groups import Group, read_groups
from opd_agents.report.inert import parts
from opd_agents.report.policies import COLUMNS, during_run, headline, rows
from opd_agents.report.reading import number

LONGEST_TEXT = 1200  # characters of one action or observation
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def render(paths: Sequence[Path]) -> str:
    """The whole page.

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
    return environment.get_template("page.html.jinja").render(_context(groups))


def clip(text: str) -> Markup:
    """Text of a model or a tool, made safe to show: escaped, bounded, without control characters."""
    shown = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text[:LONGEST_TEXT])
    rest = len(text) - LONGEST_TEXT
    more = Markup('<span class="more"> … {} more characters</span>').format(f"{rest:,}") if rest > 0 else ""
    return escape(shown) + more


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
        "policy_names": (formatting.policy_label(BEFORE), formatting.policy_label(AFTER)),
    }


def _group_context(group: Group, prefix: str) -> dict[str, Any]:
    return {
        "name": group.name,
        "n_seeds": len(group.runs),
        "folders": [str(run.path) for run in group.runs],
        "headline": headline(group),
        "facts": _facts(group),
        "pending": _pending(group),
        "parts": parts(group),
        "stages": [
            (label, stage_charts(stages, f"{prefix}s{i}"), max(len(stage.metrics) for stage in stages))
            for i, (label, stages) in enumerate(group.training().items())
        ],
    }


def _facts(group: Group) -> list[tuple[str, str]]:
    """What the training cost: sums over its stages, in one run or in all seeds."""
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
    return facts + api_facts(stages)


def _pending(group: Group) -> str:
    """A sentence about runs that have not finished; empty if all have."""
    running = [run for run in group.runs if not run.summary]
    if not running:
        return ""
    stages = [stage for run in running for _, stage in run.training()]
    steps = [number(stage.metrics[-1].get("step")) or 0.0 for stage in stages]
    who = "This run has" if len(group.runs) == 1 else f"{len(running)} of {len(group.runs)} seeds have"
    at = f" The last step written is {max(steps):.0f}." if steps else ""
    return f"{who} no summary yet: training goes on or was stopped.{at}"
