"""The results of a sweep: figures of its cells, means over seeds, and success over compute."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import svg
from rich.table import Table

from opd_agents.evaluation.rates import t_factor
from opd_agents.report.formatting import ABSENT, count
from opd_agents.report.groups import mean_over_seeds
from opd_agents.report.reading import Run, number, read_run
from opd_agents.runs import write_whole

Curve = tuple[np.ndarray, np.ndarray]  # float64 [n] each: cumulative FLOPs ascending, success


def measured(folder: Path) -> dict[str, float]:
    """All figures of a finished cell: of its evaluation (``success``), of its last training steps
    (``distill/kl``), and of all its stages together (``total/flops``, ``total/seconds``)."""
    values: dict[str, float] = {}
    totals: dict[str, float] = {}
    for _, stage in read_run(folder).training():
        last = {key: value for row in stage.metrics for key in row if (value := number(row[key])) is not None}
        values |= last
        for key in filter(lambda key: key.startswith("total/"), last):
            totals[key] = totals.get(key, 0.0) + last[key]
    evaluation = json.loads((folder / "cell.json").read_text(encoding="utf-8"))["evaluation"]
    figures = {key: value for key in evaluation if (value := number(evaluation[key])) is not None}
    return values | totals | figures


def write(folder: Path, name: str, metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """results.json, .csv and .svg in ``folder``; returns the table of labels x metrics.

    Whether a cell was done now or skipped, as done before, makes no difference to the files.
    """
    rows = [{**row, "status": "failed" if row["status"] == "failed" else "done"} for row in rows]
    labels: dict[str, dict[str, Any]] = {}
    view = Table(title=f"{name}: mean and 95 % t-interval over seeds")
    for column in ("run", "cells", *metrics):
        view.add_column(column, justify="left" if column == "run" else "right")
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        done = [row["values"] for row in mine if row["status"] != "failed"]
        labels[label] = {metric: _mean([v[metric] for v in done if metric in v]) for metric in metrics}
        view.add_row(label, f"{len(done)} of {len(mine)}", *map(_text, labels[label].values()))
    view.caption = _unknown(metrics, rows)
    data = {"name": name, "metrics": list(metrics), "labels": labels, "cells": list(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", json.dumps(data, indent=1) + "\n")
    write_whole(folder / "results.csv", _csv(metrics, rows))
    write_whole(folder / "results.svg", plot(folder, rows))
    return view


def _mean(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"n": 0, "mean": None, "half": None}
    mean = mean_over_seeds(values)
    return {"n": len(values), "mean": mean.value, "half": mean.half}


def _text(mean: Mapping[str, Any]) -> str:
    """``0.812 ± 0.034``; a single seed has no interval."""
    texts = [
        count(value) if abs(value) >= 1000 else f"{value:.3g}"
        for value in (mean["mean"], mean["half"])
        if value is not None
    ]
    return " ± ".join(texts) or ABSENT


def _unknown(metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """About a metric that no finished cell has."""
    known = sorted({key for row in rows for key in row["values"]})
    missing = [metric for metric in metrics if known and metric not in known]
    near = {metric: difflib.get_close_matches(metric, known, n=1) for metric in missing}
    hints = [f"{m!r} (did you mean {found[0]!r}?)" if found else repr(m) for m, found in near.items()]
    return f"Measured in no cell: {', '.join(hints)}. results.json holds all that was." if hints else None


def _csv(metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "seed", "status", *metrics, "error"])
    for row in rows:
        values = [row["values"].get(metric, "") for metric in metrics]
        writer.writerow([row["label"], row["seed"], row["status"], *values, row["error"]])
    return text.getvalue()


def plot(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG of success over the FLOPs of all stages, for each label the mean over seeds and its interval: in
    validation where all finished cells were validated, else of the rollouts."""
    import matplotlib
    from matplotlib.figure import Figure

    runs: dict[str, list[Run]] = {}
    for row in rows:
        if row["status"] != "failed":
            run = read_run(folder / row["label"] / f"seed-{row['seed']}")
            runs.setdefault(row["label"], []).append(run)
    validated = all(len(_curve(run, "eval/success")[0]) for group in runs.values() for run in group)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for label, group in runs.items():
        curves = [_curve(run, "eval/success" if validated else "rollout/success") for run in group]
        x, mean, half = _averaged([curve for curve in curves if len(curve[0])])
        (line,) = axes.plot(x, mean, marker="o" if len(x) < 20 else "", markersize=3, label=label)
        axes.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.16, linewidth=0)
    axes.set(xlabel="FLOPs", ylabel="success in validation" if validated else "success of rollouts")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    if runs:
        figure.legend(frameon=False, loc="outside right upper")
    return svg(figure, "sweep")


def _curve(run: Run, key: str) -> Curve:
    points, before = [], 0.0
    for _, stage in run.training():
        pairs = [(number(row.get("total/flops")), number(row.get(key))) for row in stage.metrics]
        points += [(before + x, y) for x, y in pairs if x is not None and y is not None]
        before += max((x for x, _ in pairs if x is not None), default=0.0)
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _averaged(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and half-width of the 95 % t-interval. Several seeds are interpolated between the first and the
    last x that all have, for no two spend the same."""
    if len(curves) < 2:
        x, y = curves[0] if curves else (np.empty(0), np.empty(0))
        return x, y, np.zeros_like(y)
    at = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 40)
    values = np.array([np.interp(at, x, y) for x, y in curves])
    return at, values.mean(0), t_factor(len(curves)) * values.std(0, ddof=1)
