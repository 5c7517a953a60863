"""Rates with their uncertainty: intervals, pass@k, and tests of a difference. All intervals are of 95 %.

Episodes of one task are not independent of each other. ``wilson`` takes them as if they were, and is right
where each task was played once; ``bootstrap`` resamples whole tasks, and is right for any number of samples,
but says nothing where all tasks went alike (its interval is then a point): look at both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
SEED = 0  # of the resamples: figures are the same whenever they are made


def wilson(successes: int, episodes: int) -> list[float]:
    """95 % Wilson score interval of a success rate."""
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return [round(float(interval.low), 6), round(float(interval.high), 6)]


def bootstrap(sums: Sequence[float], counts: Sequence[int]) -> list[float]:
    """95 % percentile interval of sum(sums) / sum(counts) with as many tasks drawn, with replacement, as
    there are; ``sums`` and ``counts`` have one entry a task."""
    tasks = len(sums)
    drawn = np.random.default_rng(SEED).multinomial(tasks, np.full(tasks, 1 / tasks), size=RESAMPLES)
    means = (drawn @ np.asarray(sums, dtype=np.float64)) / (drawn @ np.asarray(counts, dtype=np.float64))
    low, high = np.quantile(means, [0.025, 0.975])
    return [round(float(low), 6), round(float(high), 6)]


def pass_at(k: int, samples: int, successes: int) -> float:
    """The chance that at least one of ``k`` samples of a task succeeds: 1 - C(n-c, k) / C(n, k), unbiased for
    k <= n (arXiv:2107.03374)."""
    return 1 - math.comb(samples - successes, k) / math.comb(samples, k)


def pass_all(k: int, samples: int, successes: int) -> float:
    """The chance that all of ``k`` samples of a task succeed, pass^k: C(c, k) / C(n, k), unbiased for k <= n
    (arXiv:2406.12045)."""
    return math.comb(successes, k) / math.comb(samples, k)


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p-value of McNemar's test: whether, of the tasks that one policy alone solved, each
    had solved half. 1 where there are none."""
    from scipy.stats import binomtest

    discordant = first_only + second_only
    return float(binomtest(first_only, discordant, 0.5).pvalue) if discordant else 1.0


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The mean over training seeds with its 95 % t-interval; None for the interval of a single seed."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "interval": None}
    half = t_factor(n) * statistics.stdev(values)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def t_factor(n: int) -> float:
    """Half-width of the 95 % t-interval of a mean of ``n`` values, in their standard deviations."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1)) / float(n) ** 0.5
