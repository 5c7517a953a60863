"""Places in a run: coefficients (constant, by progress, by a metric), an early end, and whose turn it is by
weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from opd_agents.config.base import Adaptive, Ramp, Schedule, Section, Switch
from opd_agents.config.sections import Until
from opd_agents.errors import AlignmentError, ConfigError


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a run is. ``progress``: 0 at its start, 1 at its end; ``adapted``: the present value of every
    adaptive schedule, by its JSON, from :func:`adapt`; empty before the first step is done."""

    progress: float
    adapted: Mapping[str, float]


def value_at(schedule: float | Schedule, clock: Clock) -> float:
    """The coefficient at this point of the run."""
    share = min(max(clock.progress, 0.0), 1.0)
    match schedule:
        case Adaptive():
            return clock.adapted.get(schedule.model_dump_json(), schedule.start)
        case Switch():
            return schedule.start if share < schedule.at else schedule.end
        case Ramp():
            share = min(share / schedule.until, 1.0)
            if schedule.kind == "cosine":
                share = (1 - math.cos(math.pi * share)) / 2
            return schedule.start + (schedule.end - schedule.start) * share
        case constant:
            return float(constant)


def schedules_in(config: object, place: str = "") -> dict[str, Schedule]:
    """Every schedule in a section, by its dotted place there."""
    match config:
        case Ramp() | Switch() | Adaptive():
            return {place: config}
        case Section() | dict():
            parts = dict(config)
        case list():
            parts = dict(enumerate(config))
        case _:
            return {}
    found: dict[str, Schedule] = {}
    for key, part in parts.items():
        found |= schedules_in(part, f"{place}.{key}" if place else str(key))
    return found


def adaptive_schedules(config: object) -> list[Adaptive]:
    """Those anywhere in a section, each once: two that are equal move as one."""
    return list(dict.fromkeys(one for one in schedules_in(config).values() if isinstance(one, Adaptive)))


def adapt(
    schedules: Sequence[Adaptive],
    adapted: Mapping[str, float],
    row: Mapping[str, object],
    occasional: Collection[str] = (),
) -> dict[str, float]:
    """The values after a step whose metrics are ``row``: times exp(rate) where the metric is above its
    target, exp(-rate) where it is below, unchanged where it is on it or was not measured; within the bounds.

    Raises ConfigError at the first step (``adapted`` is empty) for a metric that it does not have, except for
    ``occasional`` ones, which only some steps measure; AlignmentError for a metric that is no number.
    """
    result = {}
    for schedule in schedules:
        key = schedule.model_dump_json()
        value = adapted.get(key, schedule.start)
        metric = _measured(schedule.metric, row, "A schedule of kind adaptive", not adapted, occasional)
        if metric is None:
            result[key] = value
            continue
        direction = (metric > schedule.target) - (metric < schedule.target)
        result[key] = min(max(value * math.exp(schedule.rate * direction), schedule.low), schedule.high)
    return result


def watch(
    ends: Sequence[Until],
    watched: Mapping[str, Sequence[float]],
    row: Mapping[str, object],
    occasional: Collection[str] = (),
) -> dict[str, list[float]]:
    """The last values of every metric that may end the run, the newest last, after a step whose metrics are
    ``row``: as many as two windows hold. Raises as :func:`adapt`."""
    result = {}
    for metric in dict.fromkeys(one.metric for one in ends):
        value = _measured(metric, row, "trainer.until", not watched, occasional)
        values = [*watched.get(metric, ()), *([] if value is None else [value])]
        result[metric] = values[-2 * max(one.window for one in ends if one.metric == metric) :]
    return result


def reached(ends: Sequence[Until], watched: Mapping[str, Sequence[float]]) -> str | None:
    """Which of the ends the values of :func:`watch` have come to, in words; None before that."""
    for one in ends:
        values = watched.get(one.metric, ())
        if len(values) < one.window * (1 if one.gain is None else 2):
            continue
        last, earlier = _mean(values[-one.window :]), _mean(values[-2 * one.window : -one.window])
        named = one.metric + (f" over {one.window}" if one.window > 1 else "")
        if one.above is not None and last >= one.above:
            return f"{named}: {last:.4g}, at least {one.above:g}"
        if one.below is not None and last <= one.below:
            return f"{named}: {last:.4g}, at most {one.below:g}"
        if one.gain is not None and (
            last - earlier < one.gain if one.gain >= 0 else last - earlier > one.gain
        ):
            return f"{named}: {last:.4g} after {earlier:.4g}, a gain short of {one.gain:g}"
    return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _measured(
    metric: str, row: Mapping[str, object], follower: str, first: bool, occasional: Collection[str]
) -> float | None:
    """Its value in this step, None where there is none. Raises as :func:`adapt`."""
    value = row.get(metric)
    if value is None:
        if first and metric not in {*row, *occasional}:
            known = {name for name, other in row.items() if isinstance(other, (int, float))} | {*occasional}
            raise ConfigError(
                f"{follower} follows the metric {metric!r}, which the first step does not have."
                f" It has {', '.join(sorted(known))}."
            )
        return None
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise AlignmentError(
            f"The metric {metric} is {value!r}, so {follower[0].lower()}{follower[1:]} cannot follow it."
        )
    return value


def dealt(count: int, weights: Sequence[float]) -> list[int]:
    """How many of the first ``count`` items each of several takers gets, by weight; none ever loses one as
    ``count`` grows. A function of the place alone: a resumed run deals on where it stopped."""
    left, rest, shares = count, sum(map(Fraction, weights)), []
    for weight in map(Fraction, weights):  # exact, so that rounding never adds up to another item
        shares.append(math.floor(left * weight / rest) if rest else 0)
        left, rest = left - shares[-1], rest - weight
    return shares
