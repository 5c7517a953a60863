"""The results of exposure_bias.py: which claims hold, by the rule in exposure_bias.yaml; tables and a plot.

A *point* is an arm, a setting and a seed with their figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from exposure_bias_chain import HORIZONS
from figures import svg

from opd_agents.report.groups import mean_over_seeds


class Claim(NamedTuple):
    """``near`` None: above ``ABOVE``."""

    arm: str
    setting: str
    figure: str
    near: float | None = None


CLAIMS: Mapping[str, Claim] = {  # by their numbers in the YAML
    "1": Claim("behaviour_cloning", "recovery 4", "slope", 2.0),
    "2": Claim("opd", "recovery 4", "slope", 1.0),
    "3": Claim("behaviour_cloning less opd", "recovery 4", "slope"),
    "4": Claim("behaviour_cloning", "recovery 1", "slope", 1.0),
    "5": Claim("opd", "recovery 1", "slope", 1.0),
    "6a": Claim("behaviour_cloning", "irreversible", "slope", 2.0),
    "6b": Claim("opd", "irreversible", "slope", 2.0),
    "7a": Claim("behaviour_cloning", "recovery 4", "excess_slope", 1.0),
    "7b": Claim("opd", "recovery 4", "excess_slope", 0.0),
    "8": Claim("noise_injected", "recovery 4", "slope", 1.0),
    "9": Claim("verified_correction", "recovery 4", "slope", 1.0),
    "10": Claim("opd", "recovery 4", "off_closed_form", 0.0),
}
NEAR, ABOVE = 0.25, 0.5
COLOURS = {
    "behaviour_cloning": "C3",
    "verified_correction": "C4",
    "opd_reverse_kl": "C9",
    "noise_injected": "C1",
    "opd": "C0",
}


def interval(values: Sequence[float]) -> list[float]:
    """95 % t-interval of the mean over seeds."""
    mean = mean_over_seeds(values)
    assert mean.half is not None  # there are several seeds
    return [mean.value - mean.half, mean.value + mean.half]


def of_seeds(points: Sequence[Mapping[str, Any]], arm: str, setting: str, figure: str) -> list[float]:
    return [point[figure] for point in points if (point["arm"], point["setting"]) == (arm, setting)]


def judge(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every claim with its mean, its interval and what became of it."""
    found = {}
    for number, claim in CLAIMS.items():
        first, _, second = claim.arm.partition(" less ")
        values = np.array(of_seeds(points, first, claim.setting, claim.figure))
        if second:
            values = values - of_seeds(points, second, claim.setting, claim.figure)
        low, high = interval(values.tolist())
        told = {"mean": float(values.mean()), "interval": [low, high], "end": verdict(low, high, claim.near)}
        found[number] = claim._asdict() | told
    return found


def verdict(low: float, high: float, near: float | None) -> str:
    """How a claim ends, by the rule in the YAML."""
    least, most = (ABOVE, np.inf) if near is None else (near - NEAR, near + NEAR)
    if least <= low and high <= most:
        return "reproduced"
    return "contradicted" if high < least or low > most else "undecided"


def table(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: means over seeds, and 95 % t-intervals of the slopes."""
    columns = (
        "arm, setting, labels, error %, wrong key %, right in a jam %, cost at 8, at 128, slope, closed form"
    )
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---" * 10 + "|"
    for arm, setting in dict.fromkeys((point["arm"], point["setting"]) for point in points):
        mine = [point for point in points if (point["arm"], point["setting"]) == (arm, setting)]

        def mean(figure: str, mine: Sequence[Mapping[str, Any]] = mine) -> Any:
            return np.mean([point[figure] for point in mine], axis=0)

        low, high = interval([point["slope"] for point in mine])
        cost = mean("cost")
        yield (
            f"| {_words(arm)} | {setting} | {mean('labels'):,.0f} | {100 * mean('error'):.3f} "
            f"| {100 * mean('wrong_key'):.3f} | {100 * mean('recovers'):.1f} "
            f"| {cost[0]:.3g} | {cost[-1]:.3g} | {mean('slope'):.2f} ± {(high - low) / 2:.2f} "
            f"| {mean('closed_form'):.2f} |"
        )


def ends(claims: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| claim | arm | setting | figure | claimed | found | end |"
    yield "|---|---|---|---|---|---|---|"
    for number, one in claims.items():
        low, high = one["interval"]
        claimed = f"above {ABOVE:g}" if one["near"] is None else f"near {one['near']:g}"
        yield (
            f"| {number} | {_words(one['arm'])} | {one['setting']} | {_words(one['figure'])} | {claimed} "
            f"| {one['mean']:.2f} ({low:.2f} to {high:.2f}) | **{one['end']}** |"
        )


def checks(rollouts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| arm | horizon | episodes | cost computed | cost played |"
    yield "|---|---|---|---|---|"
    for one in rollouts:
        played = f"{one['played']:.2f} ± {one['standard_error']:.2f}"
        name = f"{_words(one['arm'])}, {one['setting']}"
        yield f"| {name} | {one['horizon']} | {one['episodes']} | {one['computed']:.2f} | {played} |"


def _words(name: str) -> str:
    return name.replace("_", " ")


def plot(points: Sequence[Mapping[str, Any]]) -> str:
    """SVG: cost over error against the horizon in three settings, and the excess cost of a wrong first key;
    geometric means over seeds, with their least and most."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(13, 4.4), layout="constrained")
    panels = sheet.subplots(1, 4)
    shown = [
        ("recovery 1", "cost"),
        ("recovery 4", "cost"),
        ("irreversible", "cost"),
        ("recovery 4", "excess"),
    ]
    for axes, (setting, figure) in zip(panels, shown, strict=True):
        for arm, colour in COLOURS.items():
            values = np.array(of_seeds(points, arm, setting, figure))
            if not len(values):
                continue
            if figure == "cost":
                values = values / np.array(of_seeds(points, arm, setting, "error"))[:, None]
            middle = np.exp(np.log(values).mean(0))
            axes.plot(HORIZONS, middle, color=colour, marker="o", markersize=3, label=_words(arm))
            axes.fill_between(HORIZONS, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        for power, style in ((1, ":"), (2, "--")) if figure == "cost" else ():
            line = [horizon**power / 2 for horizon in HORIZONS]
            axes.plot(HORIZONS, line, style, color="0.6", linewidth=1, label=f"slope {power}")
        what = "cost / error" if figure == "cost" else "excess cost of a wrong first key"
        axes.set(xscale="log", yscale="log", xlabel="horizon", ylabel=what, title=setting)
        axes.set_xticks(HORIZONS, [str(horizon) for horizon in HORIZONS])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    sheet.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    return svg(sheet, "exposure_bias")
