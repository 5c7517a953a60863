"""Advantages against plain formulas, and their expected gradients exactly, on a tabular policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from tabular import (
    assert_close,
    gradient_of,
    normal,
    reference_gradient,
    reinforce,
    sequence_kl,
    sequences,
    state_kl_gradient,
    tables,
)
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import (
    Baseline,
    Normalise,
    divergence,
    group_advantages,
    reference_advantages,
    whitened,
)

quick = settings(max_examples=25, deadline=None, derandomize=True)

# Advantages of rewards


@quick
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    baseline=st.sampled_from(["group", "leave_one_out"]),
    normalise=st.sampled_from(["std", "batch_std", "none"]),
)
def test_group_advantages_follow_the_plain_formula(
    sizes: list[int], seed: int, baseline: Baseline, normalise: Normalise
) -> None:
    random = np.random.default_rng(seed)
    groups = random.permutation(np.repeat(10 * np.arange(len(sizes)) - 7, sizes))
    rewards = random.choice([0.0, 0.1, 0.5, 1.0], size=len(groups))
    expected = np.zeros_like(rewards)
    for i, group in enumerate(groups):
        members = rewards[groups == group]
        if len(set(members)) == 1:
            continue
        others = rewards[(groups == group) & (np.arange(len(groups)) != i)]
        centre = members.mean() if baseline == "group" else others.mean()
        spread = {"std": members, "batch_std": rewards, "none": None}[normalise]
        expected[i] = (rewards[i] - centre) / (1.0 if spread is None else spread.std(ddof=1) + 1e-3)
    ours = group_advantages(
        torch.tensor(rewards), torch.tensor(groups), baseline=baseline, normalise=normalise, eps=1e-3
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("normalise", ["std", "batch_std", "none"])
def test_constant_groups_have_exactly_no_advantage(normalise: Normalise, baseline: Baseline) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 1.0, 0.0], dtype=torch.float64)
    assert rewards[:3].sum() / 3 != rewards[0]  # the mean rounds
    groups = torch.tensor([4, 4, 4, 9, 2, 2])
    advantages = group_advantages(rewards, groups, baseline=baseline, normalise=normalise, eps=1e-12)
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[4] == -advantages[5] > 0
    alike = group_advantages(rewards[:4], groups[:4], baseline=baseline, normalise=normalise, eps=1e-12)
    assert alike.tolist() == [0.0] * 4


@pytest.mark.parametrize("size", [2, 3, 7])
def test_leaving_one_out_is_the_group_mean_stretched(size: int) -> None:
    rewards, groups = normal(1, 4 * size), torch.arange(4).repeat(size)
    mean = group_advantages(rewards, groups, baseline="group", normalise="none")
    assert_close(
        group_advantages(rewards, groups, baseline="leave_one_out", normalise="none"),
        mean * size / (size - 1),
    )


@pytest.mark.parametrize("baseline, share", [("none", 1.0), ("leave_one_out", 1.0), ("group", 1 / 2)])
def test_expected_gradient_is_that_of_the_mean_reward(baseline: Baseline, share: float) -> None:
    """Over all pairs of sequences, drawn independently; the own reward in the mean costs GRPO (n - 1) / n."""
    all_, (student,) = sequences(), tables(1, 1)
    rewards = normal(2, all_.episodes)
    probability = all_.probability(student)
    expected = torch.zeros_like(student)
    for other in range(all_.episodes):  # the partner in a group of two
        pairs = torch.cat([rewards, rewards[other].expand(all_.episodes)])
        groups = torch.arange(all_.episodes).repeat(2)
        own = group_advantages(pairs, groups, baseline=baseline, normalise="none")[: all_.episodes]
        expected += probability[other] * all_.expected_gradient(reinforce(own[all_.episode]), student)
    assert_close(expected, share * gradient_of(lambda logits: -(all_.probability(logits) @ rewards), student))


# Advantages of a reference


@quick
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    discount=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    include_now=st.booleans(),
    length_normalise=st.booleans(),
    clip=st.sampled_from([None, 0.7]),
)
def test_reference_advantages_follow_the_plain_formula(
    lengths: list[int],
    seed: int,
    discount: float,
    include_now: bool,
    length_normalise: bool,
    clip: float | None,
) -> None:
    """Episodes interleaved in any way; d beyond the clip; no rows at all."""
    include_now = include_now or discount == 0
    random = np.random.default_rng(seed)
    episodes = random.permutation(np.repeat(np.arange(len(lengths)), lengths))
    d = random.normal(size=len(episodes))
    cut = d if clip is None else d.clip(-clip, clip)
    expected = []
    for t in range(len(d)):
        later = [k for k in range(t + 1, len(d)) if episodes[k] == episodes[t]]
        total = include_now * cut[t] + sum(discount ** (n + 1) * cut[k] for n, k in enumerate(later))
        expected.append(total / (max(len(later) + include_now, 1) if length_normalise else 1))
    ours = reference_advantages(
        torch.tensor(d),
        torch.tensor(episodes),
        discount=discount,
        include_now=include_now,
        length_normalise=length_normalise,
        clip=clip,
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-13)


def test_long_returns_neither_underflow_nor_explode() -> None:
    d = normal(3, 20_000)
    ours = reference_advantages(d, torch.zeros(20_000, dtype=torch.int64), discount=0.5)
    assert_close(ours, torch.tensor(lfilter([1.0], [1.0, -0.5], d.numpy()[::-1])[::-1].copy()))
    half = reference_advantages(d.float(), torch.zeros(20_000, dtype=torch.int64), discount=0.5)
    assert half.dtype == torch.float32  # summed in float64 all the same
    torch.testing.assert_close(half.double(), ours, rtol=1e-6, atol=1e-6)


def kl_of_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(student, teacher, "reverse_kl")[sequences().state]


def test_without_discount_the_gradient_is_that_of_the_kl_at_every_state() -> None:
    student, teacher = tables(2, 2)
    expected = state_kl_gradient(student, teacher)
    assert_close(reference_gradient(student, teacher), expected)
    assert_close(reference_gradient(student, teacher, kl=kl_of_rows(student, teacher)), expected)


def test_discount_one_gives_the_gradient_of_the_kl_of_sequences() -> None:
    student, teacher = tables(3, 2)
    expected = gradient_of(lambda logits: sequence_kl(logits, teacher), student)
    assert_close(reference_gradient(student, teacher, discount=1.0), expected)
    assert (expected - state_kl_gradient(student, teacher)).abs().max() > 1e-2


def test_long_term_part_and_exact_own_kl_make_up_the_kl_of_sequences() -> None:
    student, teacher = tables(4, 2)
    long_term = reference_gradient(student, teacher, discount=1.0, include_now=False)
    assert_close(
        long_term + state_kl_gradient(student, teacher),
        gradient_of(lambda logits: sequence_kl(logits, teacher), student),
    )


@pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
def test_closed_form_baseline_is_unbiased_and_less_noisy(discount: float) -> None:
    all_, (student, teacher) = sequences(), tables(5, 2)
    d, kl = all_.logprob(teacher) - all_.logprob(student), kl_of_rows(student, teacher)
    plain = reference_advantages(d, all_.episode, discount=discount)
    based = reference_advantages(d, all_.episode, discount=discount, kl=kl)
    assert_close(based, plain + kl)
    assert_close(
        all_.expected_gradient(reinforce(based), student), all_.expected_gradient(reinforce(plain), student)
    )
    probability = all_.probability(student)[all_.episode]
    assert abs(float(probability @ (d + kl))) < 1e-14  # E_q[d] = -KL(q || p)
    assert probability @ (d + kl).square() < probability @ d.square()
    # Baselines of later states, which follow from the token, would cancel what it causes.
    centred = reference_advantages(d + kl, all_.episode, discount=discount)
    assert_close(all_.expected_gradient(reinforce(centred), student), state_kl_gradient(student, teacher))


def test_reference_advantages_refuse_what_means_nothing() -> None:
    d, episodes = torch.tensor([0.1, -0.2, 0.3]), torch.zeros(3, dtype=torch.int64)
    for settings_, message in (
        ({"discount": 1.1}, "in \\[0, 1\\]"),
        ({"clip": 0.0}, "above 0"),
        ({"include_now": False}, "no d at all"),
        ({"kl": d, "length_normalise": True}, "closed-form"),
        ({"kl": d, "include_now": False, "discount": 1.0}, "closed-form"),
    ):
        with pytest.raises(ConfigError, match=message):
            reference_advantages(d, episodes, **settings_)
    impossible = torch.tensor([0.1, -math.inf, 0.3])
    with pytest.raises(AlignmentError, match="d is not finite in 1 of 3"):
        reference_advantages(impossible, episodes)
    assert reference_advantages(impossible, episodes, clip=5.0)[1] == -5
    for broken, message in (
        (torch.tensor([0.1, math.nan, 0.3]), "not finite"),
        (d[:2], r"d \[2\], episodes \[3\]"),
        (d.half(), "float16"),
    ):
        with pytest.raises(AlignmentError, match=message):
            reference_advantages(broken, episodes, clip=5.0)
    with pytest.raises(AlignmentError, match="kl"):
        reference_advantages(d, episodes, kl=torch.zeros(2))


@quick
@given(seed=st.integers(0, 10**6), size=st.integers(0, 6))
def test_whitening_looks_at_tokens_of_weight_alone(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    advantages, weights = random.normal(size=size), random.choice([0.0, 0.5, 2.0], size=size)
    chosen = advantages[weights != 0]
    expected = np.zeros(size)
    if len(chosen) > 1:
        expected[weights != 0] = (chosen - chosen.mean()) / (chosen.std(ddof=1) + 1e-8)
    advantages[weights == 0] = np.inf
    ours = whitened(torch.tensor(advantages), torch.tensor(weights))
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-13)


def test_whitening_of_equal_advantages_is_exactly_zero() -> None:
    equal = torch.full((7,), 0.1, dtype=torch.float64)
    assert whitened(equal, torch.ones(7)).tolist() == [0.0] * 7
    with pytest.raises(AlignmentError, match="not finite"):
        whitened(torch.tensor([1.0, math.nan]), torch.ones(2))


def test_impossible_pairs_of_baseline_and_scale_are_refused() -> None:
    rewards, groups = torch.tensor([1.0, 1.0]), torch.tensor([0, 0])
    assert torch.equal(group_advantages(rewards, groups, baseline="none", normalise="none"), rewards)
    for normalise in ("std", "batch_std"):
        with pytest.raises(ConfigError, match="spread"):
            group_advantages(rewards, groups, baseline="none", normalise=normalise)
    with pytest.raises(ConfigError, match="normalise is 'mean'"):
        group_advantages(rewards, groups, normalise="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="baseline is 'mean'"):
        group_advantages(rewards, groups, baseline="mean")  # type: ignore[arg-type]
    with pytest.raises(AlignmentError, match="groups"):
        group_advantages(rewards, torch.zeros(3))
