"""Ratios, the clipped surrogate and mismatch weights against their closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import (
    assert_close,
    gradient_of,
    normal,
    sequences,
    tables,
)
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import (
    group_advantages,
    mismatch_weights,
    no_ratio,
    reference_advantages,
    shaped_ratio,
    surrogate,
    token_ratio,
    trrd_ratio,
    unit_log_ratios,
    unit_ratio,
    whitened,
)

quick = settings(max_examples=25, deadline=None, derandomize=True)

# Ratios


def test_values_and_gradients_of_the_ratios() -> None:
    logprob, old, reference = (-normal(seed, 6).abs() for seed in (4, 5, 6))
    unit = normal(7, 6)
    stated: list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = [  # ratio, value, d ratio / d logprob
        (lambda x: token_ratio(x, old), logprob.exp() / old.exp(), logprob.exp() / old.exp()),
        (lambda x: unit_ratio(x, unit), unit.exp(), unit.exp()),
        (no_ratio, torch.ones(6), torch.ones(6)),
        (
            lambda x: trrd_ratio(x, old, reference, 0.3),
            (logprob.exp() / old.exp()) ** 0.3 * (logprob.exp() / reference.exp()) ** 0.7,
            (logprob.exp() / old.exp()) ** 0.3 * (logprob.exp() / reference.exp()) ** 0.7,
        ),
        (
            lambda x: shaped_ratio(x, 0.1),
            logprob.exp() / (logprob.exp() + 0.1),
            0.1 * logprob.exp() / (logprob.exp() + 0.1) ** 2,
        ),
    ]
    for ratio, value, slope in stated:
        x = logprob.clone().requires_grad_()
        ours = ratio(x)
        assert_close(ours.detach(), value)
        assert_close(torch.autograd.grad(ours.sum(), x)[0], slope)
    smooth = (lambda x: token_ratio(x, old), stated[3][0], stated[4][0])
    assert all(torch.autograd.gradcheck(f, logprob.clone().requires_grad_()) for f in smooth)


def test_nothing_but_the_current_logprob_is_differentiated() -> None:
    logprob, other = -normal(8, 3).abs(), normal(9, 3).requires_grad_()
    results = [
        token_ratio(logprob, other),
        unit_ratio(logprob, other),
        trrd_ratio(logprob, other, other, 0.5),
        unit_log_ratios(other, torch.zeros(3, dtype=torch.int64), torch.ones(3)),
        mismatch_weights(other, other, "tis", high=2.0),
        reference_advantages(other, torch.zeros(3, dtype=torch.int64), kl=other),
        whitened(other, torch.ones(3)),
        group_advantages(other, torch.zeros(3, dtype=torch.int64)),
        surrogate(logprob, other, clip_low=None, clip_high=None).loss,
    ]
    assert not any(result.requires_grad for result in results)


def test_trrd_is_the_token_ratio_at_alpha_one_and_starts_out_clipped() -> None:
    logprob, old, reference = (-normal(seed, 8).abs() for seed in (10, 11, 12))
    assert torch.equal(trrd_ratio(logprob, old, reference, 1.0), token_ratio(logprob, old))
    assert torch.equal(trrd_ratio(logprob, old, reference, 0.0), token_ratio(logprob, reference))
    d = torch.tensor([-0.4, -0.3, 0.0, 0.4, 0.5], dtype=torch.float64)
    current = torch.full((5,), -2.0, dtype=torch.float64)
    ratio = trrd_ratio(current, current, current + d, 0.5)
    assert_close(ratio, torch.exp(-0.5 * d))
    up = surrogate(ratio, torch.ones(5), clip_low=0.2, clip_high=0.2).clipped
    down = surrogate(ratio, -torch.ones(5), clip_low=0.2, clip_high=0.2).clipped
    assert up.tolist() == [True, False, False, False, False]
    assert down.tolist() == [False, False, False, False, True]


def test_shaped_gradient_is_largest_where_the_probability_is_the_shaping() -> None:
    logprob = torch.linspace(-6, 0, 601, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(shaped_ratio(logprob, 0.1).sum(), logprob)
    assert abs(float(logprob.detach()[slope.argmax()]) - math.log(0.1)) < 0.01


def test_ratios_saturate_instead_of_overflowing() -> None:
    logprob = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([-200.0, -1.0])
    for ratio in (token_ratio(logprob, old), trrd_ratio(logprob, old, old, 0.5), unit_ratio(logprob, -old)):
        for advantage in (1.0, -1.0):
            loss = surrogate(ratio, torch.full((2,), advantage), clip_low=0.2, clip_high=0.2).loss
            (gradient,) = torch.autograd.grad(loss.sum(), logprob, retain_graph=True)
            assert loss.isfinite().all() and gradient[0] == 0 and gradient.isfinite().all()


def test_bad_ratios_are_refused() -> None:
    good, one = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda x: token_ratio(x, good),
        lambda x: token_ratio(good, x),
        lambda x: unit_ratio(good, x),
        lambda x: trrd_ratio(good, good, x, 0.5),
        lambda x: shaped_ratio(x, 0.1),
        no_ratio,
        lambda x: unit_log_ratios(x, one, good + 1),
        lambda x: mismatch_weights(x, good, "tis", high=2.0),
        lambda x: surrogate(good, x, clip_low=0.2, clip_high=0.2).loss,
        lambda x: group_advantages(x, one),
    ):
        for bad in (torch.tensor([0.0, math.nan, 0.0]), good.bfloat16(), torch.zeros(3, 1)):
            with pytest.raises(AlignmentError):
                call(bad)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="trrd_alpha"):
            trrd_ratio(good, good, good, alpha)
    for shaping in (0.0, -0.1, math.inf):
        with pytest.raises(ConfigError, match="shaping"):
            shaped_ratio(good, shaping)


# Units: turns or sequences


@quick
@given(seed=st.integers(0, 10**6), size=st.integers(0, 8))
def test_unit_log_ratios_are_means_over_tokens_of_weight(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    log_ratio, units = random.normal(size=size), random.integers(-2, 3, size=size)
    weights = random.choice([0.0, 0.5, 3.0], size=size)
    expected = np.zeros(size)
    for i in range(size):
        chosen = log_ratio[(units == units[i]) & (weights != 0)]
        expected[i] = chosen.mean() if len(chosen) else 0.0
    log_ratio[weights == 0] = np.nan
    ours = unit_log_ratios(torch.tensor(log_ratio), torch.tensor(units), torch.tensor(weights))
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-13)


def test_unit_ratio_has_the_gradient_of_the_sequence_objective() -> None:
    """GSPO's own objective, (1/E) sum_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean_t log r_t)."""
    all_, (student, old) = sequences(), tables(6, 2)
    old = student + 0.2 * old
    advantages, low, high = normal(13, all_.episodes), 0.06, 0.05
    length = all_.summed(torch.ones(len(all_.state), dtype=torch.float64))

    def objective(logits: Tensor) -> Tensor:
        s = (all_.summed(all_.logprob(logits) - all_.logprob(old)) / length).exp()
        return -torch.minimum(s * advantages, s.clamp(1 - low, 1 + high) * advantages).mean()

    logits = student.clone().requires_grad_()
    logprob = all_.logprob(logits)
    unit = unit_log_ratios(logprob - all_.logprob(old), all_.episode, torch.ones(len(logprob)))
    halves = []
    for half in (slice(None, 11), slice(11, None)):  # cut anywhere, as micro-batches do
        ratio = unit_ratio(logprob[half], unit[half])
        result = surrogate(ratio, advantages[all_.episode][half], clip_low=low, clip_high=high)
        halves.append((result.loss / (length[all_.episode][half] * all_.episodes)).sum())
    assert_close(sum(halves, torch.zeros(())).detach(), objective(student))
    (gradient,) = torch.autograd.grad(halves[0] + halves[1], logits)
    assert_close(gradient, gradient_of(objective, student))
    clipped = surrogate(unit.exp(), advantages[all_.episode], clip_low=low, clip_high=high).clipped
    assert 0 < clipped.sum() < len(clipped)


# The surrogate

CLIP_TABLE = [  # advantage, ratio -> loss, clipped, d loss / d logprob (clip_low 0.2, clip_high 0.3)
    (2.0, 1.0, -2.0, False, -2.0),
    (2.0, 1.25, -2.5, False, -2.5),
    (2.0, 1.5, -2.6, True, 0.0),
    (2.0, 0.5, -1.0, False, -1.0),
    (-2.0, 1.0, 2.0, False, 2.0),
    (-2.0, 1.5, 3.0, False, 3.0),
    (-2.0, 0.9, 1.8, False, 1.8),
    (-2.0, 0.5, 1.6, True, 0.0),
    (0.0, 5.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize("advantage, ratio, loss, clipped, slope", CLIP_TABLE)
def test_surrogate_clips_pessimistically(
    advantage: float, ratio: float, loss: float, clipped: bool, slope: float
) -> None:
    old = torch.tensor([-1.5], dtype=torch.float64)
    logprob = (old + math.log(ratio)).requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    ours = surrogate(token_ratio(logprob, old), advantages, clip_low=0.2, clip_high=0.3)
    ours.loss.sum().backward()
    assert ours.loss.item() == pytest.approx(loss)
    assert logprob.grad is not None and logprob.grad.item() == pytest.approx(slope)
    assert ours.clipped.item() is clipped and ours.ratio.item() == pytest.approx(ratio)
    assert not ours.ratio.requires_grad


def test_each_side_is_clipped_by_its_own_bound() -> None:
    """Clip-higher lets what has become likelier grow on; without a bound nothing is clipped."""
    ratio = torch.tensor([1.25, 1.29, 0.75, 0.5])
    up, down = torch.ones(4), -torch.ones(4)

    def clipped(advantages: Tensor, low: float | None, high: float | None) -> list[bool]:
        return [bool(x) for x in surrogate(ratio, advantages, clip_low=low, clip_high=high).clipped]

    assert clipped(up, 0.2, 0.2) == [True, True, False, False]
    assert clipped(up, 0.2, 0.28) == [False, True, False, False]
    assert clipped(down, 0.2, 0.28) == [False, False, True, True]
    assert clipped(up, 0.2, None) == clipped(down, None, 0.2) == [False] * 4
    unclipped = surrogate(ratio, down, clip_low=None, clip_high=None)
    assert torch.equal(unclipped.loss, ratio) and not unclipped.clipped.any()
    with pytest.raises(ConfigError, match="clip_low"):
        surrogate(ratio, up, clip_low=-0.1, clip_high=0.2)
    with pytest.raises(AlignmentError, match=r"ratio \[4\], advantages \[3\]"):
        surrogate(ratio, up[:3], clip_low=0.2, clip_high=0.2)


def test_on_policy_surrogate_has_the_gradient_of_reinforce() -> None:
    all_, (student,) = sequences(), tables(7, 1)
    advantages = normal(14, len(all_.state))
    expected = gradient_of(lambda logits: -(advantages @ all_.logprob(logits)), student)
    for ratio in (lambda x: token_ratio(x, x.detach()), no_ratio):
        loss = lambda logits, ratio=ratio: (  # noqa: E731
            surrogate(ratio(all_.logprob(logits)), advantages, clip_low=0.2, clip_high=0.2).loss.sum()
        )
        assert_close(gradient_of(loss, student), expected)


# Samplers whose probabilities are not quite the trainer's


def test_mismatch_weights_truncate_or_drop() -> None:
    ratios = torch.tensor([0.3, 0.5, 1.0, 2.0, 2.5], dtype=torch.float64)
    behaviour = -normal(15, 5).abs()
    old = behaviour + ratios.log()
    assert_close(mismatch_weights(old, behaviour, "tis", high=2.001), [0.3, 0.5, 1.0, 2.0, 2.001])
    assert_close(mismatch_weights(old, behaviour, "icepop", low=0.499, high=2.001), [0.0, 0.5, 1.0, 2.0, 0.0])
    for kind, low, high in (
        ("tis", 0.5, 2.0),
        ("icepop", None, 2.0),
        ("icepop", 2.0, 2.0),
        ("icepop", 0.0, 2.0),
        ("tis", None, 0.0),
        ("mis", None, 2.0),
    ):
        with pytest.raises(ConfigError, match="mismatch"):
            mismatch_weights(old, behaviour, kind, low=low, high=high)  # type: ignore[arg-type]


def test_mismatch_weights_undo_the_sampler_s_own_distribution() -> None:
    """What the sampler draws, weighted, has the trainer's expectation, but for what a bound takes away."""
    old, behaviour = (normal(seed, 7).log_softmax(-1) for seed in (16, 17))
    anything, ratio = normal(18, 7), (old - behaviour).exp()
    exact = mismatch_weights(old, behaviour, "tis", high=1e9) * behaviour.exp() @ anything
    assert_close(exact, old.exp() @ anything)
    dropped = mismatch_weights(old, behaviour, "icepop", low=0.5, high=1.5) * behaviour.exp() @ anything
    kept = (ratio >= 0.5) & (ratio <= 1.5)
    assert 0 < kept.sum() < 7
    assert_close(dropped, old.exp()[kept] @ anything[kept])
