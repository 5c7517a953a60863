"""Success as a function of compute, fitted over several training seeds, with intervals from a bootstrap.

A success rate is bounded, so it saturates: a power law does not fit its beginning, and where it is fitted to
small compute its end means nothing. What is fitted is the sigmoid in log compute of arXiv:2510.13786,

    success(C) = start + (top - start) / (1 + (half / C) ** steepness),

which is ``start`` without compute, half of the way to ``top`` at ``half``, and nears ``top`` as a power law.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from opd_agents.evaluation.rates import RESAMPLES, SEED, t_factor

Values: TypeAlias = np.ndarray  # float64

HALVES, STEEPNESSES = 90, 24  # the grid; neighbours differ by 7 % in `half`, by 18 % in `steepness`
FINE, REFINED = (
    9,
    3,
)  # places, each way, of a finer grid about the best point of the one before; how many such
HALF_RANGE = (0.02, 10.0)  # of the largest compute
STEEPNESS_RANGE = (0.5, 20.0)
ENUMERATED = 5  # seeds up to which all resamples are enumerated
DRAWN = RESAMPLES // 10
STEPS = 401  # of compute, in which levels are looked for


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Points:
    """What one training seed measured: ``success`` rates at ``compute`` (FLOPs, ascending), float64 [n]."""

    compute: Values
    success: Values


@dataclass(frozen=True, slots=True)
class Curve:
    """Its rates in [0, 1], ``half`` in FLOPs. It falls where ``top`` is below ``start``."""

    start: float
    top: float
    half: float
    steepness: float

    def at(self, compute: Values | float) -> Values:
        return self.start + (self.top - self.start) * _share(compute, self.half, self.steepness)

    def compute_to(self, level: float) -> float:
        """FLOPs at which it comes to ``level``: 0 where it begins there, infinite where it never does."""
        if level <= self.start:
            return 0.0
        if level >= self.top:
            return math.inf
        odds = (level - self.start) / (self.top - level)
        return float(self.half * odds ** (1 / self.steepness))


def _share(compute: Values | float, half: Values | float, steepness: Values | float) -> Values:
    """Of the way from start to top, in [0, 1]."""
    powered = np.power(np.asarray(compute, dtype=np.float64) / half, steepness)
    return powered / (1 + powered)


class Fit:
    """The curve of least squares through the points of all ``seeds`` (two at least), and those of resamples
    of the seeds.

    Whole seeds are resampled, as the points of one are not independent. Of up to five seeds all resamples are
    enumerated, of more 200 are drawn. A resample of n seeds varies less than n new seeds do, and quantiles of
    ten resamples are no bounds: an interval is therefore the estimate and, to either side, Student's t with
    n - 1 degrees of freedom times sqrt(n / (n - 1)) times the standard deviation over resamples. For a mean
    over seeds this is the t-interval.
    """

    def __init__(self, seeds: Sequence[Points]) -> None:
        self.seeds = len(seeds)
        compute, success = (
            np.concatenate([getattr(s, key) for s in seeds]) for key in ("compute", "success")
        )
        owner = np.repeat(np.arange(len(seeds)), [len(one.compute) for one in seeds])
        counts, self.probabilities = resamples(len(seeds))
        search = _Search(compute, success)
        self.curve = search.best(np.ones(len(compute)))
        self.resampled = [search.best(weights[owner]) for weights in counts]
        self.end = float(min(one.compute[-1] for one in seeds))  # as far as all seeds have measured
        self.residual = float(np.sqrt(np.mean((self.curve.at(compute) - success) ** 2)))

    def interval(self, figure: Callable[[Curve], float]) -> Interval:
        """Of what ``figure`` finds of a curve; all numbers where that is not finite in every resample."""
        value, error = figure(self.curve), self.error(figure)
        if not math.isfinite(error):
            return Interval(value, -math.inf, math.inf)
        half = t_factor(self.seeds) * math.sqrt(self.seeds) * error
        return Interval(value, value - half, value + half)

    def error(self, figure: Callable[[Curve], float]) -> float:
        """Its standard error; NaN where it is not finite in every resample."""
        values = np.array([figure(curve) for curve in self.resampled])
        if not np.isfinite(values).all():
            return math.nan
        mean = self.probabilities @ values
        variance = self.probabilities @ (values - mean) ** 2
        return float(np.sqrt(variance * self.seeds / (self.seeds - 1)))

    def band(self, compute: Values) -> tuple[Values, Values, Values]:
        """The success rate at each ``compute`` [n], and the bounds of its intervals, which stay in [0, 1]."""
        value = self.curve.at(compute)
        each = np.array([curve.at(compute) for curve in self.resampled])
        error = np.sqrt(self.probabilities @ (each - self.probabilities @ each) ** 2)
        half = t_factor(self.seeds) * self.seeds / math.sqrt(self.seeds - 1) * error
        return value, np.maximum(0.0, value - half), np.minimum(1.0, value + half)

    def success(self, compute: float) -> Interval:
        """The success rate at ``compute``; its interval does not leave [0, 1]."""
        return Interval(*(float(bound[0]) for bound in self.band(np.array([compute]))))

    def compute_to(self, level: float) -> Interval:
        """FLOPs to ``level``, with all at which the interval of the success holds it; infinite: beyond what
        was measured."""
        at = np.linspace(0.0, self.end, STEPS)
        _, low, high = self.band(at)
        (held,) = np.nonzero((low <= level) & (level <= high))
        reached = self.curve.compute_to(level)
        value = reached if reached <= self.end else math.inf
        if not len(held):
            return Interval(value, value, value)
        last = math.inf if low[-1] <= level else float(at[held[-1]])
        return Interval(value, min(float(at[held[0]]), value), max(last, value))


def resamples(n: int) -> tuple[Values, Values]:
    """How often each of ``n`` seeds is in a resample with replacement (float64 [resamples, n]), and how
    probable the resample is (float64 [resamples])."""
    if n > ENUMERATED:
        drawn = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=DRAWN)
        return drawn.astype(np.float64), np.full(DRAWN, 1 / DRAWN)
    counts = list(_compositions(n, n))
    chances = [math.factorial(n) / math.prod(map(math.factorial, one)) / n**n for one in counts]
    return np.array(counts, dtype=np.float64), np.array(chances)


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to deal ``total`` out to ``parts``."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        yield from ((first, *rest) for rest in _compositions(total - first, parts - 1))


class _Search:
    """Least squares: exact in start and top, which are kept in [0, 1]; in half and steepness on a grid, then
    on ever finer ones about its best point, so that resamples are not rounded to one curve."""

    def __init__(self, compute: Values, success: Values) -> None:
        self.compute, self.success = compute, success
        self.coarse = _grid(HALF_RANGE[0], HALF_RANGE[1], HALVES, *STEEPNESS_RANGE, STEEPNESSES)
        self.coarse[:, 0] *= compute.max()
        self.shares = _share(compute, self.coarse[:, :1], self.coarse[:, 1:])  # [grid, points]

    def best(self, weights: Values) -> Curve:
        """Of points with ``weights`` [points]."""
        found = self._on(self.coarse, self.shares, weights)
        about = [
            (high / low) ** (1 / (size - 1))
            for (low, high), size in ((HALF_RANGE, HALVES), (STEEPNESS_RANGE, STEEPNESSES))
        ]
        for _ in range(REFINED):
            half, steepness = about
            grid = _grid(found.half / half, found.half * half, FINE, found.steepness / steepness,
                         min(found.steepness * steepness, STEEPNESS_RANGE[1]), FINE)  # fmt: skip
            found = self._on(grid, _share(self.compute, grid[:, :1], grid[:, 1:]), weights)
            about = [ratio ** (2 / (FINE - 1)) for ratio in about]
        return found

    def _on(self, grid: Values, shares: Values, weights: Values) -> Curve:
        """The best of the ``grid`` [pairs, 2] of half and steepness, with ``shares`` [pairs, points]."""
        a, b, y = 1 - shares, shares, self.success
        aa, ab, bb = a**2 @ weights, (a * b) @ weights, b**2 @ weights
        ay, by = a @ (weights * y), b @ (weights * y)
        starts, tops = _linear(aa, ab, bb, ay, by)
        losses = starts**2 * aa + 2 * starts * tops * ab + tops**2 * bb - 2 * (starts * ay + tops * by)
        place = np.unravel_index(int(np.argmin(losses)), losses.shape)
        half, steepness = grid[place[1]]
        return Curve(float(starts[place]), float(tops[place]), float(half), float(steepness))


def _grid(low: float, high: float, size: int, least: float, most: float, steps: int) -> Values:
    """All pairs [size * steps, 2] of two geometric series."""
    return np.array(list(itertools.product(np.geomspace(low, high, size), np.geomspace(least, most, steps))))


def _linear(aa: Values, ab: Values, bb: Values, ay: Values, by: Values) -> tuple[Values, Values]:
    """Candidates [5, grid] for start and top, the weights of two regressors a and b of y: the optimum, which
    is the best where it is within [0, 1], and the best with one of them on a bound."""
    tiny = np.finfo(np.float64).tiny
    determinant = np.maximum(aa * bb - ab**2, tiny)
    starts = [np.clip((ay * bb - by * ab) / determinant, 0, 1)]
    tops = [np.clip((by * aa - ay * ab) / determinant, 0, 1)]
    for bound in (0.0, 1.0):
        starts += [np.full_like(aa, bound), np.clip((ay - bound * ab) / np.maximum(aa, tiny), 0, 1)]
        tops += [np.clip((by - bound * ab) / np.maximum(bb, tiny), 0, 1), np.full_like(bb, bound)]
    return np.array(starts), np.array(tops)
