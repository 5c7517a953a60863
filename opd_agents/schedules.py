"""Places in a run: coefficients (constant, by progress, by a metric), and whose turn it is by weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from opd_agents.config.base import Adaptive, Ramp, Schedule, Section, Switch
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
        key, metric = schedule.model_dump_json(), row.get(schedule.metric)
        value = adapted.get(key, schedule.start)
        if metric is None:
            if not adapted and schedule.metric not in {*row, *occasional}:
                _refuse_unknown(schedule.metric, row, occasional)
            result[key] = value
            continue
        if not isinstance(metric, (int, float)) or math.isnan(metric):
            raise AlignmentError(
                f"The metric {schedule.metric} is {metric!r}, so a schedule cannot follow it."
            )
        direction = (metric > schedule.target) - (metric < schedule.target)
        result[key] = min(max(value * math.exp(schedule.rate * direction), schedule.low), schedule.high)
    return result


def _refuse_unknown(metric: str, row: Mapping[str, object], occasional: Collection[str]) -> None:
    known = sorted({name for name, value in row.items() if isinstance(value, (int, float))} | {*occasional})
    raise ConfigError(
        f"A schedule of kind adaptive follows the metric {metric!r}, which the first step does not have."
        f" It has {', '.join(known)}."
    )


def dealt(count: int, weights: Sequence[float]) -> list[int]:
    """How many of the first ``count`` items each of several takers gets, by weight; none ever loses one as
    ``count`` grows. A function of the place alone: a resumed run deals on where it stopped."""
    left, rest, shares = count, sum(map(Fraction, weights)), []
    for weight in map(Fraction, weights):  # exact, so that rounding never adds up to another item
        shares.append(math.floor(left * weight / rest) if rest else 0)
        left, rest = left - shares[-1], rest - weight
    return shares
