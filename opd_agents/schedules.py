"""Places in a run: coefficients (constant, linear, cosine), and whose turn it is by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from opd_agents.config import Scheduled


def value_at(schedule: Scheduled, progress: float) -> float:
    """The coefficient when ``progress`` (0 at the start of the run, 1 at its end) has been made."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    share = min(max(progress, 0.0), 1.0)
    if schedule.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return schedule.start + (schedule.end - schedule.start) * share


def dealt(count: int, weights: Sequence[float]) -> list[int]:
    """How many of the first ``count`` items each of several takers gets, by weight; none ever loses one as
    ``count`` grows. A function of the place alone: a resumed run deals on where it stopped."""
    left, rest, shares = count, sum(map(Fraction, weights)), []
    for weight in map(Fraction, weights):  # exact, so that rounding never adds up to another item
        shares.append(math.floor(left * weight / rest) if rest else 0)
        left, rest = left - shares[-1], rest - weight
    return shares
