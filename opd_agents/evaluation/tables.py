"""An evaluation in the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# Spent on making a policy, by its key, with the column's label.
COSTS = {"generated_tokens": "tokens", "teacher_tokens": "teacher", "flops": "FLOPs", "seconds": "seconds"}
_NAMESPACE = re.compile(r"^[\w-]+/")  # of an environment's id
SHOWN_GROUPS = 12  # of a breakdown; --json and --out hold all


def table(result: Mapping[str, Any]) -> Group:
    """An evaluation's policies, 80 columns wide; with what they cost to make, where known."""
    rows = result["policies"]
    costs = {name: label for name, label in COSTS.items() if name in rows[0]}
    view = _table("policy", "sampled", "greedy", "turns", "invalid", *costs.values())
    for row in rows:
        view.add_row(
            row["policy"] + (f" ({row['errors']} errors)" if row["errors"] else ""),
            _rate(row["success"], row["interval"]), f"{100 * row['success_greedy']:.1f}",
            f"{row['turns']:.1f}", f"{row['invalid_calls']:.2f}", *(_short(row[name]) for name in costs),
        )  # fmt: skip
    title = "success in % (95 % Wilson interval), turns and invalid calls an episode"
    return _titled(f"{result['suite']}: {title}", view)


def tables(result: Mapping[str, Any]) -> Group:
    """All that an evaluation found: the policies, their further figures, comparisons, seeds, gates, and
    success by group."""
    from rich.console import Group

    parts = [table(result), _further(result["policies"])]
    parts += [view for view in (_compared(result), _seeds(result["seeds"]), _gates(result["gates"])) if view]
    parts += _groups(result["policies"])
    return Group(*(line for part in parts for line in (part, "")))


def _further(rows: Sequence[Mapping[str, Any]]) -> Group:
    """A line for each figure, a column for each policy."""
    view = _table("", *(row["policy"] for row in rows))
    lines = {label: [figure(row) for row in rows] for label, figure in _LINES.items()}
    for name, sign in (("pass_at", "pass@"), ("pass_all", "pass^")):
        for k in [k for k in rows[0][name] if k != "1"]:
            lines[f"{sign}{k}, %"] = [f"{100 * row[name][k]:.1f}" for row in rows]
    lines["success without known-bad tasks, %"] = [_without_bad(row) for row in rows]
    for label, cells in lines.items():
        if any(cells):
            view.add_row(label, *cells)
    return _titled("", view)


_LINES = {
    "success over tasks, % (bootstrap)": lambda row: _rate(row["success"], row["interval_tasks"]),
    "reward": lambda row: f"{row['reward']:.3f}",
    "refused calls an episode": lambda row: f"{row['refused_calls']:.2f}",
    "repeated calls an episode": lambda row: f"{row['repeated_calls']:.2f}",
    "first error at turn": lambda row: _number(row["first_error_turn"]),
    "recovered after an error, %": lambda row: _recovered(row),
    "unfinished episodes": lambda row: str(row["unfinished"] or ""),
    "tokens an episode": lambda row: f"{row['tokens_per_episode']:.0f}" if row["tokens_per_episode"] else "",
    "seconds in all": lambda row: f"{row['spent'].get('seconds', 0):.1f}",
    "FLOPs": lambda row: _short(row["spent"]["flops"]) if "flops" in row["spent"] else "",
    "API cost": lambda row: f"{row['spent']['cost']:.4g}" if "cost" in row["spent"] else "",
}


def _compared(result: Mapping[str, Any]) -> Group | None:
    rows = result["comparisons"]
    if not rows:
        return None
    view = _table("policy", "sampled", "p", "greedy", "p")
    alone = len({row["baseline"] for row in rows}) == 1
    for row in rows:
        cells = [
            cell
            for part in (row, row["greedy"])
            for cell in (_points(part["difference"], part["interval"]), f"{part['mcnemar']['p']:.2g}")
        ]
        view.add_row(row["policy"] if alone else f"{row['policy']} to {row['baseline']}", *cells)
    to = f" to {rows[0]['baseline']}" if alone else ""
    return _titled(f"Difference{to} on the same tasks, in points (95 %); p of McNemar's exact test", view)


def _seeds(rows: Sequence[Mapping[str, Any]]) -> Group | None:
    if not rows:
        return None
    view = _table("runs", "seeds", "sampled", "greedy", "difference")
    for row in rows:
        gain = row.get("difference")
        rates = (_mean(row["success"]), _mean(row["success_greedy"]))
        points = _points(gain["mean"], gain["interval"]) if gain else ""
        view.add_row(row["policy"], str(len(row["seeds"])), *rates, points)
    return _titled("Success over training seeds, in % (95 % t-interval)", view)


def _gates(rows: Sequence[Mapping[str, Any]]) -> Group | None:
    if not rows:
        return None
    view = _table("gate", "policy", "value", "bound", "")
    for row in rows:
        sign = "[green]passed[/]" if row["passed"] else "[bold red]FAILED[/]"
        view.add_row(row["gate"], row["policy"], _number(row["value"], 4), _number(row["bound"], 4), sign)
    return _titled("Gates", view)


def _groups(rows: Sequence[Mapping[str, Any]]) -> Iterator[Group]:
    """Success of every policy by group, of the breakdowns that have several."""
    from rich.text import Text

    for name in dict.fromkeys(name for row in rows for name in row["by"]):
        groups = list(dict.fromkeys(group for row in rows for group in row["by"].get(name, {})))
        if len(groups) < 2:
            continue
        view = _table("", *(row["policy"] for row in rows))
        for group in groups[:SHOWN_GROUPS]:
            found = [row["by"].get(name, {}).get(group) for row in rows]
            cells = [f"{100 * f['success']:.1f} ({f['episodes']})" if f else "" for f in found]
            view.add_row(Text(_NAMESPACE.sub("", group)[:48]), *cells)
        more = len(groups) - SHOWN_GROUPS
        what = "tool, of the episodes that used it" if name == "tool" else name
        rest = f"; {more} more in --json" if more > 0 else ""
        yield _titled(f"Success in % (episodes) by {what}{rest}", view)


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    view = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    view.add_column(first, no_wrap=True)
    for name in others:
        view.add_column(name, justify="right", no_wrap=True)
    return view


def _titled(title: str, view: Table) -> Group:
    from rich.console import Group
    from rich.text import Text

    return Group(*([Text(title, style="italic")] if title else []), view)


def _rate(value: float, interval: Sequence[float]) -> str:
    low, high = (round(100 * bound) for bound in interval)
    return f"{100 * value:.1f} ({low}-{high})"


def _points(value: float, interval: Sequence[float] | None) -> str:
    bounds = "" if interval is None else " ({:+.0f} to {:+.0f})".format(*(100 * bound for bound in interval))
    return f"{100 * value:+.1f}{bounds}"


def _mean(figure: Mapping[str, Any]) -> str:
    if figure["interval"] is None:
        return f"{100 * figure['mean']:.1f}"
    return f"{100 * figure['mean']:.1f} ± {100 * (figure['interval'][1] - figure['mean']):.1f}"


def _recovered(row: Mapping[str, Any]) -> str:
    return (
        f"{_rate(row['recovery'], row['interval_recovery'])} of {row['with_error']}"
        if row["with_error"]
        else ""
    )


def _without_bad(row: Mapping[str, Any]) -> str:
    if (kept := row.get("without_known_bad")) is None:
        return ""
    return f"{_rate(kept['success'], kept['interval'])}, {kept['excluded']} left out"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}g}" if digits > 2 else f"{value:.{digits}f}"


def _short(value: float) -> str:
    """Three digits with a unit: 412k, 1.46T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
