"""What was found of the arms, for people: tables, a Markdown page, and a plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from opd_agents.report.formatting import ABSENT
from opd_agents.runs import write_whole

Row: TypeAlias = dict[str, str]

COLUMNS = 3  # of the plot's panels
WIDTH = 140  # of the tables, in characters
NARROW = 22  # characters of any other column
UNITS = (*((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")),)
ABOUT = {
    "arms": "What an arm changes, and what a seed computed: for rollouts, the teacher and updates.",
    "curves": "What it came to, and the compute that it took; with 95 % intervals over seeds.",
    "comparisons": "Beside the first arm, at the compute that both have spent, in points of success; and the"
    " compute that it needs for that of the first.",
}


def tables(found: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of each table by what it shows; an empty one is left out."""
    rows = {
        "arms": [_arm(one, _unit(found)) for one in found["arms"]],
        "curves": [_curve(one, found["levels"], _unit(found)) for one in found["arms"]],
        "comparisons": [_comparison(one, found["levels"], _unit(found)) for one in found["comparisons"]],
    }
    return {about: those for about, those in rows.items() if those}


def _arm(one: Mapping[str, Any], unit: tuple[float, str]) -> Row:
    changes = ", ".join(f"{key}={value}" for key, value in one["changes"].items())
    shares, ratio = one["shares"], one["size_ratio"]
    return {
        "arm": one["name"],
        "changes": changes or ABSENT,
        "seeds": str(one["seeds"]),
        unit[1]: f"{one['flops'] / unit[0]:.3g}" + (" and more" if one["uncounted_tokens"] else ""),
        "rollouts : teacher : updates, %": " : ".join(f"{100 * v:.0f}" for v in (shares or {}).values())
        or ABSENT,
        "weights, teacher / student": ABSENT if ratio is None else f"{ratio:.2g}",
        "rollouts per prompt": str(one["rollouts_per_prompt"]),
        "episodes, updates a step": f"{one['episodes_per_step']}, {one['updates_per_step']}",
    }


def _unit(found: Mapping[str, Any]) -> tuple[float, str]:
    """In which all compute of the tables is told."""
    most = max(one["measured_to"] for one in found["arms"])
    return next(unit for unit in UNITS if most >= unit[0] or unit == UNITS[-1])


def _curve(one: Mapping[str, Any], levels: Sequence[float], unit: tuple[float, str]) -> Row:
    size, name = unit
    row = {
        "arm": one["name"],
        "start, %": _rate(one["curve"]["start"]),
        f"spent, {name}": f"{one['measured_to'] / size:.3g}",
        "success there, %": _rate(one["success"]),
        "top of the curve, %": _rate(one["curve"]["top"]),
    }
    for level in levels:
        found = one["compute_to"][f"{level:g}"]
        row[f"{name} to {100 * level:g} %"] = _compute(found, one["measured_to"], size)
    return row | {"residual, points": f"{100 * one['residual']:.1f}"}


def _comparison(one: Mapping[str, Any], levels: Sequence[float], unit: tuple[float, str]) -> Row:
    value, low, high = (100 * bound for bound in one["difference"])
    row = {
        "arm": one["arm"],
        f"at, {unit[1]}": f"{one['compute'] / unit[0]:.3g}",
        "difference, points": f"{value:+.1f} ({low:+.1f} to {high:+.1f})",
        "told apart": "yes" if one["told_apart"] else "no",
    }
    for level in levels:
        times = one["compute_ratio"][f"{level:g}"]
        row[f"times the compute to {100 * level:g} %"] = (
            ABSENT if times is None else f"{times[0]:.2f} ({times[1]:.2f} to {times[2]:.2f})"
        )
    return row


def _rate(found: Sequence[float | None]) -> str:
    value, low, high = (math.nan if bound is None else 100 * min(1.0, max(0.0, bound)) for bound in found)
    return f"{value:.1f} ({low:.0f}-{high:.0f})"


def _compute(found: Sequence[float | None], end: float, size: float) -> str:
    """What is beyond the end of what was measured is not known."""
    value, low, high = (f"> {end / size:.3g}" if bound is None else f"{bound / size:.2g}" for bound in found)
    return value if found[1] is None else f"{value} ({low} to {high})"


def terminal(found: Mapping[str, Any]) -> Group:
    """All tables, and what is concluded."""
    parts: list[Table | Text] = []
    for about, rows in tables(found).items():
        table = Table(title=ABOUT[about], title_justify="left", box=None, header_style="bold", pad_edge=False)
        for column in rows[0]:
            most = None if column == "changes" else NARROW  # a long title must not break a key of the config
            table.add_column(column, overflow="fold", max_width=most)
        for row in rows:
            table.add_row(*map(escape, row.values()))
        parts += [table, Text()]
    return Group(*parts, *(Text(line) for line in found["conclusions"]))


def page(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"# Success against compute\n\n![{found['metric']} over FLOPs](scaling.svg)\n"]
    for about, rows in tables(found).items():
        lines += [ABOUT[about] + "\n", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines + [f"- {line}" for line in found["conclusions"]]) + "\n"


def plot(found: Mapping[str, Any]) -> str:
    """SVG: a panel for each arm but the first, which stands in all of them in grey: curves with their bands,
    and what each seed measured."""
    import matplotlib
    from matplotlib.figure import Figure

    first, *others = found["arms"]
    shown = others or [first]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, one in zip(panels, shown, strict=False):
        if one is not first:
            _draw(axes, first, "0.5", "o")
        _draw(axes, one, "C0", "s")
        axes.set(xlabel="FLOPs", ylabel="success in validation", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper left", fontsize=8)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    text = io.StringIO()
    # parse_math: names of runs may hold dollar signs
    with matplotlib.rc_context({"svg.hashsalt": "scaling", "text.parse_math": False}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw(axes: Any, one: Mapping[str, Any], colour: str, marker: str) -> None:
    at, value, low, high = one["band"]
    axes.plot(at, value, color=colour, linewidth=1.6, label=one["name"])
    axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
    for compute, success in one["points"]:
        axes.plot(compute, success, marker, color=colour, markersize=3, alpha=0.6, linestyle="none")


def write(found: Mapping[str, Any], folder: Path) -> None:
    """scaling.json, .md and .svg in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "scaling.json", json.dumps(found, indent=1) + "\n")
    write_whole(folder / "scaling.md", page(found))
    write_whole(folder / "scaling.svg", plot(found))
