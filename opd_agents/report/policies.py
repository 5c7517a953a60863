"""The table of policies and the line before -> after, from summaries and evaluations in the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_agents.report import formatting
from opd_agents.report.groups import Group, Mean, mean_over_seeds
from opd_agents.report.reading import Run, number

FIRST = ("expert", "teacher", "student_before", "student_after")  # then whatever else the summary holds
ARMS = ("c5", "c6", "c7", "c8")
REFERENCES = {"expert", "teacher"}  # shown, never marked as best: the students are compared
COSTS = ("generated_tokens", "teacher_tokens", "flops", "seconds")
COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("turns", "Turns", formatting.decimal),
    ("invalid_calls", "Invalid calls", formatting.decimal),
    ("errors", "Errors", formatting.count),
    ("generated_tokens", "Generated tokens", formatting.count),
    ("teacher_tokens", "Teacher tokens", formatting.count),
    ("flops", "FLOPs", formatting.flops),
    ("seconds", "Time", formatting.seconds),
)


@dataclass(frozen=True, slots=True)
class Rate:
    """A success rate with its 95 % interval, all in 0..1; ``note`` names the interval in words."""

    value: float
    low: float | None
    high: float | None
    note: str

    def __str__(self) -> str:
        return formatting.percent(self.value)


@dataclass(frozen=True, slots=True)
class Row:
    group: str
    key: str
    label: str
    episodes: str
    sampled: Rate | None
    greedy: Rate | None
    cells: tuple[tuple[str, str, str], ...]  # (column title, text, the half-width over seeds)
    colour: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Headline:
    """The one line of the report."""

    before: Rate
    after: Rate
    greedy: tuple[Rate, Rate] | None
    change: str
    episodes: str
    where: str


def rows(groups: Sequence[Group]) -> list[Row]:
    """All policies of all groups. Among the policies of a summary (evaluated on the same tasks) the best
    student and every student whose interval overlaps its own are marked ``best``: a difference within
    the noise is no win."""
    table: list[Row] = []
    for group in groups:
        figures = policy_figures(group)
        colours = _colours(list(figures))
        found = [replace(_row(group.name, key, figures[key]), colour=colours[key]) for key in figures]
        if group.evaluated:  # by the names that the command was given
            found = [replace(row, label=row.key) for row in found]
        students = {
            row.key: row.sampled
            for row in found
            if row.sampled and row.key not in REFERENCES and not during_run(row.key)
        }
        best = max(students.values(), key=lambda rate: rate.value, default=None)
        ties = {key for key, rate in students.items() if best and len(students) > 1 and _overlap(rate, best)}
        table += [replace(row, best=row.key in ties) for row in found]
    return table


def during_run(key: str) -> bool:
    """Whether a row is an evaluation in validation at some step, not a policy of the summary."""
    return ", step " in key


def _colours(keys: Sequence[str]) -> dict[str, str]:
    """A colour for each policy, the same ones in every report for the usual four."""
    chosen = {"expert": "c4", "teacher": "c3", "student_before": "c2", "student_after": "c1"}
    for first, last in _first_and_last(keys):
        chosen |= {first: "c2", last: "c1"}
    others = [key for key in keys if key not in chosen]
    return chosen | {key: ARMS[i % len(ARMS)] for i, key in enumerate(others)}


def headline(group: Group) -> Headline | None:
    """Student before -> after; None while there is no evaluation of both."""
    figures = policy_figures(group)
    keys = [("student_before", "student_after"), *_first_and_last(figures)]
    for before, after in keys:
        if before in figures and after in figures:
            first, last = _row("", before, figures[before]), _row("", after, figures[after])
            if first.sampled and last.sampled:
                return Headline(
                    first.sampled,
                    last.sampled,
                    (first.greedy, last.greedy) if first.greedy and last.greedy else None,
                    formatting.points(last.sampled.value - first.sampled.value),
                    last.episodes,
                    "" if before == "student_before" else f"“{first.label}” to “{last.label}”",
                )
    return None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A policy of an evaluation beside its baseline, on the same tasks; p is McNemar's. ``greedy`` is the
    same of the greedy episodes, None where it was not compared."""

    policy: str
    baseline: str
    sampled: str
    p: str
    greedy: str


def comparisons(group: Group) -> list[Comparison]:
    """Those of an evaluation; none of a run."""
    found = []
    for run in group.runs:
        for row in run.summary.get("comparisons", ()) if run.evaluated else ():
            sampled, p = _difference(row)
            greedy, _ = _difference(row.get("greedy") or {})
            found.append(Comparison(str(row.get("policy")), str(row.get("baseline")), sampled, p, greedy))
    return found


def _difference(row: Mapping[str, Any]) -> tuple[str, str]:
    """The difference in success with its interval, and p."""
    value, bounds = number(row.get("difference")), row.get("interval") or (None, None)
    low, high = number(bounds[0]), number(bounds[1])
    p = number((row.get("mcnemar") or {}).get("p"))
    if value is None:
        return formatting.ABSENT, formatting.ABSENT
    shown = formatting.points(value)
    if low is not None and high is not None:
        shown += f" ({formatting.points(low)} to {formatting.points(high)})".replace(" points", "")
    return shown, formatting.ABSENT if p is None else f"{p:.2g}"


def policy_figures(group: Group) -> dict[str, list[Mapping[str, Any]]]:
    """Policy -> its figures in each seed that has them, ordered as the table."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in group.runs:
        for key, figures in _of_run(run).items():
            found.setdefault(key, []).append(figures)
    order = {key: place for place, key in enumerate(FIRST)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _of_run(run: Run) -> dict[str, Mapping[str, Any]]:
    """The summary's policies; for a run without them the first and last evaluation of each stage, the first
    being the one before its training if there was one."""
    if run.summary.get("policies"):
        return dict(run.summary["policies"])
    found: dict[str, Mapping[str, Any]] = {}
    for label, stage in run.training():
        evaluated = [row for row in stage.metrics if number(row.get("eval/success")) is not None]
        name = f"{label} " if label else ""
        if at_start := stage.summary.get("evaluation_at_start"):
            found[f"{name}student, step 0"] = dict.fromkeys(COSTS, 0) | at_start
        elif len(evaluated) > 1:
            found[f"{name}student, step {evaluated[0].get('step', 0)}"] = _from_metrics(evaluated[0])
        summary = stage.summary.get("evaluation") or {}
        if evaluated or summary:
            last = _from_metrics(evaluated[-1]) if evaluated else {}
            step = (evaluated or stage.metrics)[-1].get("step", 0)
            found[f"{name}student, step {step}"] = {**last, **summary}
    return found


def _from_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "success": row.get("eval/success"),
        "interval": [row.get("eval/success_low"), row.get("eval/success_high")],
        "success_greedy": row.get("eval/success_greedy"),
        **{cost: row.get(f"total/{cost}") for cost in COSTS},
    }


def _first_and_last(keys: Iterable[str]) -> list[tuple[str, str]]:
    own = [key for key in keys if during_run(key)]
    return [(own[0], own[-1])] if len(own) > 1 else []


def _row(group: str, key: str, seeds: Sequence[Mapping[str, Any]]) -> Row:
    episodes = _mean(seeds, "episodes")
    each = " episodes a seed" if len(seeds) > 1 else " episodes"
    return Row(
        group=group,
        key=key,
        label=formatting.policy_label(key),
        episodes=formatting.count(episodes.value) + each if episodes else "",
        sampled=_rate(seeds, "success", "interval"),
        greedy=_rate(seeds, "success_greedy", "interval_greedy"),
        cells=tuple((title, *_cell(_mean(seeds, name), unit)) for name, title, unit in COLUMNS),
    )


def _mean(seeds: Sequence[Mapping[str, Any]], key: str) -> Mean | None:
    found = [value for figures in seeds if (value := number(figures.get(key))) is not None]
    return mean_over_seeds(found) if found else None


def _cell(mean: Mean | None, unit: Callable[[float | None], str]) -> tuple[str, str]:
    if mean is None:
        return formatting.ABSENT, ""
    return unit(mean.value), f"± {unit(mean.half)}" if mean.half else ""


def _rate(seeds: Sequence[Mapping[str, Any]], key: str, interval: str) -> Rate | None:
    mean = _mean(seeds, key)
    if mean is None:
        return None
    if mean.half is not None:
        low, high = max(0.0, mean.value - mean.half), min(1.0, mean.value + mean.half)
        return Rate(mean.value, low, high, f"± {100 * mean.half:.1f} points")
    bounds = seeds[0].get(interval)
    pair = bounds if isinstance(bounds, (list, tuple)) and len(bounds) == 2 else (None, None)
    lower, upper = number(pair[0]), number(pair[1])
    return Rate(mean.value, lower, upper, formatting.percent_range(lower, upper))


def _overlap(one: Rate, other: Rate) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return one.value >= other.value
    return one.high >= other.low and other.high >= one.low
