"""A chart as inline SVG: text stays text, ids are unique in the page, colours are the page's variables."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# matplotlib draws in placeholder colours; the page's style sheet decides what they are (light, dark, print).
PLACEHOLDERS = {"ink": "#0a0b01", "muted": "#0a0b02", "grid": "#0a0b03"}
PLACEHOLDERS |= {f"c{i}": f"#0a0bc{i}" for i in range(1, 9)}
CYCLE = ("c1", "c2", "c3", "c5", "c6", "c7", "c8", "c4")
SIZE = (5.0, 2.6)  # inches at 72 points: legible at 350 px and at 420 px


@dataclass(frozen=True, slots=True)
class Line:
    """``low`` and ``high`` are an interval; ``bars`` draws it as error bars rather than as a band."""

    label: str
    colour: str  # a key of PLACEHOLDERS
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    bars: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    lines: tuple[Line, ...]
    x_label: str = "step"
    rates: bool = False  # y is a share of 1, drawn in percent from 0 to ``top`` at least
    top: float = 1.0
    note: str = ""
    threshold: float | None = None
    svg: Markup = field(default=Markup())


def draw(chart: Chart, prefix: str) -> Markup:
    """The chart's SVG element; all its ids begin with ``prefix``."""
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    _style(axes, chart)
    for line in chart.lines:
        _draw_line(axes, line)
    if chart.threshold is not None:
        axes.axhline(chart.threshold, color=PLACEHOLDERS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
    _limit(axes, chart)
    buffer = io.StringIO()
    # parse_math: names of runs and components may hold dollar signs.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), prefix, chart.title)


def _style(axes: Axes, chart: Chart) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PLACEHOLDERS["grid"])
    axes.grid(axis="y", color=PLACEHOLDERS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=PLACEHOLDERS["muted"], labelsize=11, length=0, pad=5)
    axes.set_xlabel(chart.x_label, color=PLACEHOLDERS["muted"], fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.x_label == "step", steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 5, 10]))
    axes.margins(x=0.02)


def _limit(axes: Axes, chart: Chart) -> None:
    """Rates from 0 to ``top`` or 100 %; anything else that is never negative from 0."""
    values = [value for line in chart.lines for value in line.y]
    if chart.rates:
        top = chart.top if max(values) <= chart.top else 1.0
        axes.set_ylim(-0.03 * top, 1.03 * top)
        axes.set_yticks([quarter * top / 4 for quarter in range(5)])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    elif min(values) >= 0:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * max(values)) or 1)


def _draw_line(axes: Axes, line: Line) -> None:
    colour = PLACEHOLDERS[line.colour]
    if len(line.low) and line.bars:
        axes.vlines(line.x, line.low, line.high, colors=colour, linewidth=1.2, alpha=0.7)
    elif len(line.low):
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
    marker = "o" if line.bars or len(line.x) == 1 else ""
    style = (0, (4, 2)) if line.dashed else "solid"
    axes.plot(line.x, line.y, color=colour, linewidth=1.6, linestyle=style, marker=marker, markersize=4)


def _inline(svg: str, prefix: str, title: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", svg)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    names = {name for pair in used for name in pair if name}
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in names else "", svg)
    svg = re.sub(r'href="#|url\(#', lambda m: f"{m[0]}{prefix}-", svg)
    svg = re.sub(r'(?<= d=")[^"]*', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for name, placeholder in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\s*\n\s*", "\n", svg).strip()
    label = Markup('<svg role="img" aria-label="{}"').format(title)
    return Markup(svg.replace("<svg", str(label), 1))
