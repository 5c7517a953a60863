"""Rates and means of a sample of episodes, each with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opd_agents.correction.evidence import Arm
from opd_agents.evaluation.rates import bootstrap, wilson


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.value)} ({_short(self.low)} to {_short(self.high)})"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def mean(sums: Sequence[float], counts: Sequence[int]) -> Mean:
    """Sum of ``sums`` over sum of ``counts``, each of one episode, with a bootstrap over episodes: these are
    independent, what is within one is not. Of a single episode the interval is all numbers."""
    value = sum(sums) / sum(counts)
    if not math.isfinite(value):
        return Mean(value, value, value)
    low, high = bootstrap(sums, counts) if len(sums) > 1 else (-math.inf, math.inf)
    return Mean(value, low, high)


def interval(arm: Arm) -> tuple[float, float]:
    """95 %, by Wilson's score; of nothing played, all."""
    low, high = wilson(arm.wins, arm.played) if arm.played else (0.0, 1.0)
    return low, high


def percent(arm: Arm) -> str:
    """Such as `71 % (58-81)`, a share with its interval."""
    if arm.share is None:
        return "none"
    low, high = interval(arm)
    return f"{100 * arm.share:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def paired(pairs: Sequence[tuple[bool, bool]]) -> Mean:
    """How much more often the first of a pair succeeds, with Newcombe's interval (1998, method 10): those of
    Wilson, and the correlation within pairs. It is no point where all pairs went alike, as a bootstrap's."""
    size, both = len(pairs), sum(a and b for a, b in pairs)
    one, other = (Arm(sum(column), size) for column in zip(*pairs, strict=True))
    neither = size - one.wins - other.wins + both
    odds: float = both * neither - (one.wins - both) * (other.wins - both)
    if odds > 0:  # his continuity correction
        odds = max(0.0, odds - size / 2)
    margins = one.wins * (size - one.wins) * other.wins * (size - other.wins)
    phi = odds / math.sqrt(margins) if margins else 0.0
    p, q = one.wins / size, other.wins / size
    (p_low, p_high), (q_low, q_high) = interval(one), interval(other)

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    return Mean(p - q, p - q - half(p - p_low, q_high - q), p - q + half(p_high - p, q - q_low))
