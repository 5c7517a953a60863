"""The learning curves: which metrics belong in one chart, and how seeds and long runs are averaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from opd_agents.evaluation.rates import t_factor
from opd_agents.report.groups import Group
from opd_agents.report.plots import CYCLE, Chart, Line, draw
from opd_agents.report.reading import Run, number

MOST_POINTS = 200  # longer curves are averaged in bins: a page has no more pixels
TFLOP = 1e12
FLOPS_LABEL = "TFLOP spent in the stage"
Points = tuple[np.ndarray, np.ndarray]  # float64 [n] each: x ascending, y


def stage_charts(stages: Sequence[Run], prefix: str) -> list[Chart]:
    """The charts of one stage, run at one or several seeds; a chart without any measurement is left out."""
    return _drawn([*_outcome(stages), *_gradient(stages), *_schedules(stages), *_episodes(stages)], prefix)


def _outcome(stages: Sequence[Run]) -> list[Chart]:
    spans = [("think", "c2"), ("call", "c3"), ("text", "c5")] if "think" in _spans(stages) else []
    distances = [
        ("distill/kl", "KL", "c1"),
        *((f"distill/kl_{kind}", kind, colour) for kind, colour in spans),
        *_each(stages, "kl/", "to {}", CYCLE[5:]),
    ]
    written = [(f"rollout/{kind}_tokens", kind, colour) for kind, colour in spans]
    return [
        Chart("Success of rollouts and in validation", _success(stages), rates=True),
        Chart("KL per student token, in nats", _lines(stages, distances)),
        Chart("Tokens that the model wrote in a step", _lines(stages, written)),
    ]


def _gradient(stages: Sequence[Run]) -> list[Chart]:
    """Losses, gradients and advantages. The share of one component alone is all."""
    losses, shares, norms = (_each(stages, start) for start in ("loss/", "grad_share/", "grad_norm/"))
    whole = [("grad_norm", "all, before clipping", "c4")]
    return [
        Chart("Loss by component" if losses else "Loss", _lines(stages, losses or [("loss", "loss", "c1")])),
        Chart(
            "Share of the gradient norm",
            _lines(stages, shares if shares[1:] else []),
            rates=True,
            threshold=0.05,
            note="Dotted: 5 %, below which a component counts as inert.",
        ),
        Chart("Norm of the gradient", _lines(stages, whole + (norms if norms[1:] else []))),
        Chart("Parts of the advantage, root mean square", _lines(stages, _each(stages, "advantage/"))),
    ]


def _schedules(stages: Sequence[Run]) -> list[Chart]:
    coefficients = _lines(stages, _each(stages, "scheduled/loss.components."))
    alone, rate = len(coefficients) == 1, _names(stages, "scheduled/trainer.learning_rate")
    return [
        Chart(f"Scheduled: {coefficients[0].label}" if alone else "Scheduled coefficients", coefficients),
        Chart("Learning rate", _lines(stages, [("learning_rate", "", "c1")] if rate else [])),
        Chart(
            "Most action tokens of an episode", _lines(stages, _each(stages, "scheduled/rollout.max_action"))
        ),
        Chart("Most turns of an episode", _lines(stages, _each(stages, "scheduled/rollout.max_turns"))),
    ]


def _episodes(stages: Sequence[Run]) -> list[Chart]:
    repairs = [("correction/proposed", "proposed", "c4"), ("correction/accepted", "accepted", "c1")]
    groups = [
        ("groups/total", "all", "c4"),
        ("groups/nonzero", "with a non-zero advantage", "c1"),
        ("groups/redrawn", "redrawn", "c5"),
    ]
    return [
        Chart("Corrections: proposed and accepted", _lines(stages, repairs)),
        Chart(
            "Corrections: share of the generated tokens",
            _lines(stages, [("correction/token_share", "share of generated tokens", "c5")]),
            rates=True,
            top=0.4,
        ),
        Chart("Groups whose rewards are compared", _lines(stages, groups)),
    ]


def comparison_charts(groups: Sequence[Group], prefix: str) -> list[Chart]:
    """Success of all stages of all runs in one chart each, over steps and over compute."""
    entries = [
        (_entry_label(group, label, len(groups)), stages)
        for group in groups
        for label, stages in group.training().items()
    ]
    if len(entries) < 2:
        return []

    note = "At the training temperature; a stage on episodes of an expert or a teacher shows their success."
    evaluated = Chart("Validation success over compute", (), FLOPS_LABEL, rates=True)
    rolled_out = Chart("Rollout success over compute", (), FLOPS_LABEL, rates=True, note=note)
    charts = [
        _overview(entries, evaluated, "eval/success"),
        _overview(entries, rolled_out, "rollout/success"),
    ]
    if len(groups) > 1:
        charts += [
            _overview(entries, Chart("Rollout success over steps", (), rates=True), "rollout/success"),
            _overview(entries, Chart("KL per student token, in nats", ()), "distill/kl"),
        ]
    return _drawn([chart for chart in charts if len(chart.lines) > 1], prefix)


def _overview(entries: Sequence[tuple[str, Sequence[Run]]], chart: Chart, key: str) -> Chart:
    """``chart`` with one line per entry in which ``key`` was measured; a line's colour is its entry's."""
    compute = chart.x_label == FLOPS_LABEL
    lines = []
    for i, (label, stages) in enumerate(entries):
        points = _points(stages, key, "total/flops" if compute else "step")
        if any(len(x) for x, _ in points):
            colour, again = CYCLE[i % len(CYCLE)], i >= len(CYCLE)
            lines.append(_averaged(points, label, colour, align=not compute, dashed=again))
    return dataclasses.replace(chart, lines=tuple(lines))


def _entry_label(group: Group, label: str, n_groups: int) -> str:
    if n_groups == 1:
        return label or group.name
    return f"{group.name}: {label}" if label else group.name


def _drawn(charts: Iterable[Chart], prefix: str) -> list[Chart]:
    shown = [chart for chart in charts if chart.lines]
    return [dataclasses.replace(chart, svg=draw(chart, f"{prefix}-{i}")) for i, chart in enumerate(shown)]


def _names(stages: Sequence[Run], start: str) -> list[str]:
    keys = (key for stage in stages for row in stage.metrics for key in row if key.startswith(start))
    return list(dict.fromkeys(key.removeprefix(start) for key in keys))


def _spans(stages: Sequence[Run]) -> list[str]:
    return [name.removesuffix("_tokens") for name in _names(stages, "rollout/")]


def _each(
    stages: Sequence[Run], start: str, label: str = "{}", colours: Sequence[str] = CYCLE
) -> list[tuple[str, str, str]]:
    """(key, label, colour) of every metric whose key begins so."""
    names = enumerate(_names(stages, start))
    return [(start + name, label.format(name), colours[i % len(colours)]) for i, name in names]


def _success(stages: Sequence[Run]) -> tuple[Line, ...]:
    source = _rollout_source(stages[0].config)
    label = "rollouts" if source == "student" else f"rollouts of {source}"
    rollouts = _lines(stages, [("rollout/success", label, "c4")])
    greedy = _lines(stages, [("eval/success_greedy", "greedy", "c5")])
    sampled = _lines(stages, [("eval/success", "validation", "c1")])
    if len(stages) == 1 and sampled:
        rows = [row for row in stages[0].metrics if number(row.get("eval/success")) is not None]
        low, high = ([number(row.get(f"eval/success_{side}")) for row in rows] for side in ("low", "high"))
        if len(rows) <= MOST_POINTS and None not in low and None not in high:
            interval: Any = {"low": low, "high": high, "bars": True}
            sampled = (dataclasses.replace(sampled[0], **interval),)
    shown = _lines(stages, [("demonstrations/success", "demonstrations", "c7")])
    return (*rollouts, *shown, *(dataclasses.replace(line, dashed=True) for line in greedy), *sampled)


def _rollout_source(config: Any) -> str:
    rollout = config.get("rollout")
    source = rollout.get("source", "student") if isinstance(rollout, dict) else "student"
    if isinstance(source, str):
        return source
    return "student" if "dataset" in source else "a mixture"  # recordings are no rollouts


def _lines(stages: Sequence[Run], wanted: Sequence[tuple[str, str, str]]) -> tuple[Line, ...]:
    found = []
    for key, label, colour in wanted:
        points = _points(stages, key)
        if any(len(x) for x, _ in points):
            found.append(_averaged(points, label, colour))
    return tuple(found)


def _points(stages: Sequence[Run], key: str, x_key: str = "step") -> list[Points]:
    """(x, y) of every run, at the steps where both were measured."""
    scale = TFLOP if x_key == "total/flops" else 1.0
    found = []
    for stage in stages:
        pairs = [(number(row.get(x_key)), number(row.get(key))) for row in stage.metrics]
        kept = [(x / scale, y) for x, y in pairs if x is not None and y is not None]
        found.append((np.array([x for x, _ in kept]), np.array([y for _, y in kept])))
    return found


def _averaged(
    points: Sequence[Points], label: str, colour: str, align: bool = True, dashed: bool = False
) -> Line:
    """One line: the run's own, or the mean over seeds with a 95 % t-interval.

    ``align``: average at the x that every seed has reached; otherwise (compute, where no two seeds
    share an x) at a common grid by linear interpolation.
    """
    points = [(x, y) for x, y in points if len(x)]
    if len(points) == 1:
        x, y = _binned(*points[0])
        return Line(label, colour, x.tolist(), y.tolist(), dashed=dashed)
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in points))) if align else []
    if shared:
        at = np.array(shared)
        rows = np.array([[dict(zip(x, y, strict=True))[value] for value in shared] for x, y in points])
    else:
        at = np.linspace(max(x[0] for x, _ in points), min(x[-1] for x, _ in points), 40)
        rows = np.array([np.interp(at, x, y) for x, y in points])
    mean = rows.mean(axis=0)
    half = t_factor(len(points)) * rows.std(axis=0, ddof=1)
    (x, y), (_, low), (_, high) = (_binned(at, values) for values in (mean, mean - half, mean + half))
    return Line(label, colour, x.tolist(), y.tolist(), low.tolist(), high.tolist(), dashed=dashed)


def _binned(x: np.ndarray, y: np.ndarray) -> Points:
    if len(x) <= MOST_POINTS:
        return x, y
    bins = [piece.mean() for piece in np.array_split(x, MOST_POINTS)]
    return np.array(bins), np.array([piece.mean() for piece in np.array_split(y, MOST_POINTS)])
