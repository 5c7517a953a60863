"""LockChain as a Markov chain: the expected cost of a policy that sees the last answer only, not sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from opd_agents.envs.lockchain import JAM_SIGNS, LOCK_SIGNS, draw_chain

SIGNS = (*LOCK_SIGNS, *JAM_SIGNS)
ON_TRACK, OFF_TRACK = slice(0, len(LOCK_SIGNS)), slice(len(LOCK_SIGNS), len(SIGNS))
HORIZONS = (8, 16, 32, 64, 128)
TASKS = 100  # of the test split, at each horizon


class Rates(NamedTuple):
    """With which probability a policy turns the right key, and any wrong one, at each of ``SIGNS``; float64
    [2, 32] each: where it is shown the sign, and after a turn in which it turned none, which is answered by
    an error message alone. What is left of 1 is turns without a key: they cost a turn and change nothing."""

    right: np.ndarray
    wrong: np.ndarray

    @property
    def error(self) -> float:
        """On the track: not the right key, mean over the signs of locks."""
        return float(1 - self.right[0, ON_TRACK].mean())

    @property
    def wrong_key(self) -> float:
        """The share of the error that jams; the rest is turns without a key."""
        return float(self.wrong[0, ON_TRACK].mean())

    @property
    def recovers(self) -> float:
        """Off the track: the right key, mean over the signs of jams."""
        return float(self.right[0, OFF_TRACK].mean())


def constant(error: float, off_track: float) -> Rates:
    """A policy that errs with probability ``error`` at every lock, always with a wrong key, and turns the
    right key in a jam with probability ``off_track``."""
    right = np.full((2, len(SIGNS)), 1 - error)
    right[:, OFF_TRACK] = off_track
    return Rates(right, 1 - right)


@dataclass(frozen=True, slots=True)
class Chains:
    """The first ``TASKS`` test tasks: places in ``SIGNS`` of their locks [M, T] and jams [M, T, recovery]."""

    locks: np.ndarray
    jams: np.ndarray
    irreversible: bool


def read_chains(horizon: int, recovery: int = 2, irreversible: bool = False) -> Chains:
    """Of the environment with these options and no turn to spare."""
    place = {sign: index for index, sign in enumerate(SIGNS)}
    drawn = [draw_chain(horizon, recovery, "test", str(task)) for task in range(TASKS)]
    locks = [[place[sign] for sign in chain.locks] for chain in drawn]
    jams = [[[place[sign] for sign in jam] for jam in chain.jams] for chain in drawn]
    return Chains(np.array(locks), np.array(jams), irreversible)


def expected_cost(rates: Rates, chains: Chains, wrong_first: bool = False) -> float:
    """Turns of ``horizon`` that open no lock, a mean over the tasks and the policy's draws.

    ``wrong_first``: the first key is a wrong one, whatever the policy. Goes through the turns with the
    probabilities of all states: free before lock i, jammed there with so many right keys turned, or broken;
    the first two with the sign shown, [0], or an error message, [1].
    """
    n_tasks, horizon = chains.locks.shape
    right, wrong = rates.right[:, chains.locks], rates.wrong[:, chains.locks]
    frees, jams_anew = rates.right[:, chains.jams], rates.wrong[:, chains.jams]
    free = np.zeros((2, n_tasks, horizon + 1))  # before lock i; at the horizon all are open
    jammed, broken = np.zeros_like(frees), np.zeros((n_tasks, horizon))
    free[0, :, 0] = 1.0
    for turn in range(horizon):
        here, stuck, opened = free[..., :-1].sum(0), jammed.sum(0), free[0, :, -1]
        opens, errs = ((free[..., :-1] * share).sum(0) for share in (right, wrong))
        if wrong_first and turn == 0:
            opens, errs = np.zeros_like(here), here
        goes_on, starts_over = ((jammed * share).sum(0) for share in (frees, jams_anew))
        free, jammed = np.zeros_like(free), np.zeros_like(jammed)
        free[0, :, -1] = opened
        free[0, :, 1:] += opens
        free[1, :, :-1] = here - opens - errs
        if chains.irreversible:
            broken += errs
            continue
        free[0, :, :-1] += goes_on[..., -1]
        jammed[0, ..., 1:] = goes_on[..., :-1]
        jammed[0, ..., 0] += errs + starts_over.sum(-1)
        jammed[1] = stuck - goes_on - starts_over
    at_lock = free.sum(0)
    at_lock[:, :-1] += jammed.sum((0, -1)) + broken
    return horizon - float((at_lock @ np.arange(horizon + 1)).mean())


def slope(values: Sequence[float]) -> float:
    """That of log(value) on log(horizon), by least squares over ``HORIZONS``."""
    return float(np.polyfit(np.log(HORIZONS), np.log(values), 1)[0])
