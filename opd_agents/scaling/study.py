"""Arms beside each other: what each reaches at which compute, and which of them can be told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_agents.scaling.arms import Arm, read_arms
from opd_agents.scaling.curve import Curve, Fit, Interval

LEVELS = (0.5, 0.7, 0.9)
BAND = 60  # places of a curve that is drawn
MISSED = 0.08  # of a success rate, from where on a curve does not describe what was measured


def study(paths: Sequence[Path], levels: Sequence[float] = LEVELS, metric: str = "success") -> dict[str, Any]:
    """Fit every arm and compare each with the first; JSON values, of intervals [value, low, high], where None
    is beyond what was measured. Raises RunFolderError as :func:`read_arms`."""
    arms = read_arms(paths, metric)
    fits = [Fit(arm.seeds) for arm in arms]
    against = [_compared(arms[0], fits[0], *pair, levels) for pair in zip(arms[1:], fits[1:], strict=True)]
    return {
        "metric": f"eval/{metric}",
        "levels": list(levels),
        "arms": [_described(arm, fit, arms[0], levels) for arm, fit in zip(arms, fits, strict=True)],
        "comparisons": against,
        "conclusions": [*_conclusions(arms[0].name, against), *_cautions(arms, fits)],
    }


def difference(one: Fit, other: Fit, compute: float) -> Interval:
    """How much higher the success of ``one`` is at ``compute``; the seeds of both taken as independent, which
    is on the safe side where they share what helps or hinders."""

    def success(curve: Curve) -> float:
        return float(curve.at(compute))

    return _apart(
        one, other, success(one.curve) - success(other.curve), one.error(success), other.error(success)
    )


def ratio(one: Fit, other: Fit, level: float) -> Interval | None:
    """The compute that ``one`` needs to come to ``level`` for that of ``other``; None where either does not
    come to it within what it has measured, or begins there, or does not in every resample."""

    def logarithm(curve: Curve) -> float:
        found = curve.compute_to(level)
        return math.log(found) if 0 < found < math.inf else math.nan

    both = [fit.curve.compute_to(level) for fit in (one, other)]
    errors = [fit.error(logarithm) for fit in (one, other)]
    within = all(0 < c <= fit.end for c, fit in zip(both, (one, other), strict=True))
    if not within or any(map(math.isnan, errors)):
        return None
    found = _apart(one, other, math.log(both[0] / both[1]), *errors)
    return Interval(*map(math.exp, found))


def _apart(one: Fit, other: Fit, value: float, first: float, second: float) -> Interval:
    """A difference with the standard errors of both sides: Welch's interval."""
    from scipy.stats import t

    variance = first**2 + second**2
    if not variance:
        return Interval(value, value, value)
    freedom = variance**2 / (first**4 / (one.seeds - 1) + second**4 / (other.seeds - 1))
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Interval(value, value - half, value + half)


def _described(arm: Arm, fit: Fit, baseline: Arm, levels: Sequence[float]) -> dict[str, Any]:
    total = sum(arm.parts.values()) if arm.parts else 0.0
    at = np.linspace(0.0, fit.end, BAND)
    value, low, high = fit.band(at)
    return {
        "name": arm.name,
        "changes": {} if arm is baseline else arm.changes(baseline),
        "seeds": len(arm.seeds),
        "flops": total or float(np.mean([one.compute[-1] for one in arm.seeds])),
        "shares": {part: own / total for part, own in arm.parts.items()} if arm.parts and total else None,
        "uncounted_tokens": arm.uncounted,
        "parameters": dict(arm.parameters),
        "size_ratio": arm.size_ratio,
        "rollouts_per_prompt": arm.config.get("rollout.group_size"),
        "episodes_per_step": arm.config.get("rollout.episodes_per_step"),
        "updates_per_step": arm.config.get("trainer.updates_per_step"),
        "curve": {
            "start": _json(fit.interval(lambda curve: curve.start)),
            "top": _json(fit.interval(lambda curve: curve.top)),
            "half": _json(Interval(*map(_exp, fit.interval(lambda curve: math.log(curve.half))))),
            "steepness": _json(Interval(*map(_exp, fit.interval(lambda curve: math.log(curve.steepness))))),
        },
        "residual": fit.residual,
        "measured_to": fit.end,
        "success": _json(fit.success(fit.end)),
        "compute_to": {f"{level:g}": _json(fit.compute_to(level)) for level in levels},
        "points": [[one.compute.tolist(), one.success.tolist()] for one in arm.seeds],
        "band": [at.tolist(), value.tolist(), low.tolist(), high.tolist()],
    }


def _compared(baseline: Arm, first: Fit, arm: Arm, fit: Fit, levels: Sequence[float]) -> dict[str, Any]:
    compute = min(first.end, fit.end)
    found = difference(fit, first, compute)
    ratios = {f"{level:g}": ratio(fit, first, level) for level in levels}
    return {
        "arm": arm.name,
        "baseline": baseline.name,
        "compute": compute,
        "difference": _json(found),
        "told_apart": found.excludes_zero,
        "compute_ratio": {level: one and _json(one) for level, one in ratios.items()},
    }


def _conclusions(baseline: str, against: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is told apart, who is not, and how often chance alone tells somebody apart."""
    said, told = [], set[str]()
    for one in against:
        value, low, high = (100 * bound for bound in one["difference"])
        if one["told_apart"]:
            told.add(one["arm"])
            side = "above" if value > 0 else "below"
            said.append(
                f"{one['arm']} is {side} {baseline} at {one['compute']:.3g} FLOPs, by {abs(value):.1f} points"
                f" (95 %: {min(abs(low), abs(high)):.1f} to {max(abs(low), abs(high)):.1f})."
            )
        for level, times in one["compute_ratio"].items():
            if times and not times[1] <= 1 <= times[2]:
                told.add(one["arm"])
                said.append(
                    f"{one['arm']} needs {times[0]:.2f} times the compute of {baseline} to come to"
                    f" {100 * float(level):g} % (95 %: {times[1]:.2f} to {times[2]:.2f})."
                )
    if same := [one["arm"] for one in against if one["arm"] not in told]:
        said.append(f"Not told apart from {baseline} by any of these figures: {', '.join(same)}.")
    looks = sum(1 + sum(map(bool, one["compute_ratio"].values())) for one in against)
    if looks > 1:
        said.append(f"These are {looks} comparisons at 95 % each: chance alone tells one in twenty apart.")
    return said


def _cautions(arms: Sequence[Arm], fits: Sequence[Fit]) -> list[str]:
    """What the figures do not hold, and where a curve does not fit."""
    said = []
    for arm, fit in zip(arms, fits, strict=True):
        if arm.uncounted:
            said.append(
                f"{arm.name}: {arm.uncounted:,.0f} tokens a seed, of models whose FLOPs nobody knows, are in"
                " no figure."
            )
        if arm.parts is None:
            said.append(f"{arm.name} was trained before FLOPs were counted in parts.")
        if (missed := _missed(arm, fit)) > MISSED:
            said.append(
                f"{arm.name}: the curve misses the mean over seeds by up to {100 * missed:.0f} points, so"
                " that its compute to a level is rough; look at the plot."
            )
        if fit.curve.top < fit.curve.start:
            said.append(f"{arm.name}: success falls with compute; no level is reached by it.")
    return said


def _missed(arm: Arm, fit: Fit) -> float:
    """How far the curve is from the mean over seeds at most, at their first, second, ... evaluation."""
    common = min(len(one.compute) for one in arm.seeds)
    off = [(one.success - fit.curve.at(one.compute))[:common] for one in arm.seeds]
    return float(np.abs(np.mean(off, axis=0)).max())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _json(found: Interval) -> list[float | None]:
    return [bound if math.isfinite(bound) else None for bound in found]
