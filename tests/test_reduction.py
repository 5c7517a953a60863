"""Denominators as loops, and any split into micro-batches."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import Denominator, token_coefficients

quick = settings(max_examples=60, deadline=None, derandomize=True)
CONSTANT = 40.0


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_mean(
    values: np.ndarray,
    weights: np.ndarray,
    counted: np.ndarray,
    turns: np.ndarray,
    episodes: np.ndarray,
    denominator: Denominator,
) -> float:
    """The weighted losses ``values`` reduced in loops; turns are counted within each episode."""
    values, weights = values * counted, weights * counted
    units = {
        "token": [counted],
        "turn": [counted & (episodes == e) & (turns == t) for e in set(episodes) for t in set(turns)],
        "episode": [counted & (episodes == e) for e in set(episodes)],
        "selected": [weights != 0],
    }
    if denominator == "constant":
        return float(values.sum() / CONSTANT)
    if denominator == "weights":
        return float(values.sum() / weights.sum()) if weights.any() else 0.0
    means = [values[unit].mean() for unit in units[denominator] if unit.any()]
    return float(np.mean(means)) if means else 0.0


@quick
@given(
    tokens=st.integers(1, 40),
    denominator=st.sampled_from(get_args(Denominator)),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_split_gives_the_gradient_of_the_mean(
    tokens: int, denominator: Denominator, kept: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    turns, episodes = random.integers(0, 4, tokens), random.integers(0, 3, tokens)
    counted = random.random(tokens) < kept
    weights = random.choice([0.0, 1.0, 0.5, 2.0 if denominator == "weights" else -2.0], tokens)
    features, parameter = normal(seed, tokens, 3), normal(seed + 1, 3).requires_grad_()
    coefficients = token_coefficients(
        torch.tensor(weights),
        torch.tensor(counted),
        torch.tensor(turns),
        torch.tensor(episodes),
        denominator,
        CONSTANT if denominator == "constant" else None,
    )

    def losses(rows: Tensor) -> Tensor:
        return torch.tanh(features[rows] @ parameter).square()

    whole = (coefficients * losses(torch.arange(tokens))).sum()
    values = weights * losses(torch.arange(tokens)).detach().numpy()
    expected = plain_mean(values, weights, counted, turns, episodes, denominator)
    assert whole.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    (gradient,) = torch.autograd.grad(whole, parameter)
    cuts = np.sort(random.integers(0, tokens + 1, random.integers(0, 6)))
    for part in np.split(random.permutation(tokens), cuts):
        rows = torch.tensor(part, dtype=torch.long)
        (coefficients[rows] * losses(rows)).sum().backward()
    torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


# Two turns of an episode and one of another; the last token of each is not selected, the second weighs 0.
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0, 3.0])
COUNTED = torch.tensor([True, True, True, False, True, False])
TURNS = torch.tensor([0, 0, 1, 1, 0, 0])
EPISODES = torch.tensor([0, 0, 0, 0, 1, 1])
EXPECTED: dict[Denominator, list[float]] = {
    "token": [1 / 4, 0, 0.5 / 4, 0, 2 / 4, 0],
    "turn": [1 / 6, 0, 0.5 / 3, 0, 2 / 3, 0],
    "episode": [1 / 6, 0, 0.5 / 6, 0, 2 / 2, 0],
    "selected": [1 / 3, 0, 0.5 / 3, 0, 2 / 3, 0],
    "weights": [1 / 3.5, 0, 0.5 / 3.5, 0, 2 / 3.5, 0],
    "constant": [1 / 40, 0, 0.5 / 40, 0, 2 / 40, 0],
}


@pytest.mark.parametrize("denominator", get_args(Denominator))
def test_what_each_denominator_counts(denominator: Denominator) -> None:
    constant = CONSTANT if denominator == "constant" else None
    rest = (TURNS, EPISODES, denominator, constant)
    assert token_coefficients(WEIGHTS, COUNTED, *rest).tolist() == pytest.approx(EXPECTED[denominator])
    for nothing in (
        token_coefficients(torch.zeros(6), COUNTED, *rest),
        token_coefficients(WEIGHTS, torch.zeros(6, dtype=torch.bool), *rest),
    ):
        assert nothing.tolist() == [0.0] * 6


@pytest.mark.parametrize("denominator", ["selected", "weights"])
def test_only_a_mask_and_only_a_sum_of_weights_forget_their_scale(denominator: Denominator) -> None:
    """Twice the weights: twice the loss, unless it is divided by them. Of a mask both are the same mean."""
    once = token_coefficients(WEIGHTS, COUNTED, TURNS, EPISODES, denominator)
    twice = token_coefficients(2 * WEIGHTS, COUNTED, TURNS, EPISODES, denominator)
    torch.testing.assert_close(twice, once if denominator == "weights" else 2 * once)
    mask = token_coefficients(WEIGHTS.ne(0).float(), COUNTED, TURNS, EPISODES, denominator)
    torch.testing.assert_close(mask, torch.tensor([1.0, 0, 1, 0, 1, 0]) / 3)


def test_coefficients_have_no_gradient_and_at_least_float32() -> None:
    weights = WEIGHTS.clone().requires_grad_()
    assert not token_coefficients(weights, COUNTED, TURNS, EPISODES, "weights").requires_grad
    for given_, expected in (("float64", "float64"), ("bfloat16", "float32"), ("bool", "float32")):
        dtype = getattr(torch, given_)
        result = token_coefficients(WEIGHTS.to(dtype), COUNTED, TURNS, EPISODES, "token")
        assert result.dtype == getattr(torch, expected)


def test_bad_denominators_are_refused() -> None:
    table = (WEIGHTS, COUNTED, TURNS, EPISODES)
    with pytest.raises(ConfigError, match="episode"):
        token_coefficients(*table, "sequence")  # type: ignore[arg-type]
    cases: list[tuple[Denominator, float | None]] = [("constant", None), ("constant", 0.0), ("token", 5.0)]
    for denominator, constant in cases:
        with pytest.raises(ConfigError, match="constant"):
            token_coefficients(*table, denominator, constant)


def test_bad_tables_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"counted \[6\], turns \[2\]"):
        token_coefficients(WEIGHTS, COUNTED, TURNS[:2], EPISODES, "token")
    with pytest.raises(AlignmentError, match="mask"):
        token_coefficients(WEIGHTS, COUNTED.long(), TURNS, EPISODES, "token")
    with pytest.raises(AlignmentError, match="negative"):
        token_coefficients(-WEIGHTS, COUNTED, TURNS, EPISODES, "weights")
    for bad in (math.nan, math.inf):
        with pytest.raises(AlignmentError, match="finite"):
            token_coefficients(WEIGHTS.clone().fill_(bad), COUNTED, TURNS, EPISODES, "token")
