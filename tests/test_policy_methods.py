"""Policy gradients of the field, put together from the parts, against their plain formulas; expected
gradients and fixed points exactly, on a tabular policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from tabular import (
    VOCABULARY,
    assert_close,
    gradient_of,
    normal,
    reference_gradient,
    reinforce,
    sequence_kl,
    sequences,
    tables,
)
from torch import Tensor

from opd_agents.objectives import (
    Baseline,
    group_advantages,
    no_ratio,
    reference_advantages,
    shaped_ratio,
    surrogate,
    token_ratio,
    trrd_ratio,
)

# Methods of the field, each from the parts above against its plain formula. Of a batch of two groups of three
# episodes: success c, group advantage, d = log p - log pi_old, whether the whole group failed.


class Batch(NamedTuple):
    logprob: Tensor
    old: Tensor
    reference: Tensor
    episode: Tensor
    rewards: Tensor
    groups: Tensor

    @property
    def d(self) -> Tensor:
        return reference_advantages(self.reference - self.old, self.episode)

    @property
    def verified(self) -> Tensor:
        return group_advantages(self.rewards, self.groups, eps=1e-4)[self.episode]

    @property
    def success(self) -> Tensor:
        return self.rewards[self.episode]

    @property
    def failed(self) -> Tensor:
        """1 on the tokens of groups without success."""
        return torch.tensor([0.0] * 3 + [1.0] * 3, dtype=torch.float64)[self.episode]


def batch(seed: int) -> Batch:
    episode = torch.arange(6).repeat_interleave(torch.tensor([4, 2, 5, 1, 3, 4]))
    old, gap, distance = normal(seed, 19), normal(seed + 1, 19), normal(seed + 2, 19)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    old = -old.abs() - 0.5
    return Batch(
        old + 0.25 * gap, old, old + 0.5 * distance, episode, rewards, torch.tensor([0] * 3 + [1] * 3)
    )


def r(b: Batch, logprob: Tensor) -> Tensor:
    return token_ratio(logprob, b.old)


def rescaled(b: Batch, strength: float) -> Tensor:
    likelier = torch.exp(b.verified.sign() * b.d).clamp(0.8, 1.2)
    return (1 - strength + strength * likelier) * b.verified


BETA = 0.3
Parts = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
# By name: (ratio, advantage) from the package, then the plain (ratio, advantage) of one token from log pi,
# log pi_old, log p, success c, the group's mean and standard deviation, and whether all of it failed.
METHODS: dict[str, tuple[Parts, Callable[..., tuple[float, float]]]] = {
    "GRPO": (
        lambda b, x: (r(b, x), b.verified),
        lambda x, o, p, c, m, s, failed: (math.exp(x - o), (c - m) / s),
    ),
    "OPD": (
        lambda b, x: (r(b, x), b.d),
        lambda x, o, p, c, m, s, failed: (math.exp(x - o), p - o),
    ),
    "KDRL": (
        lambda b, x: (r(b, x), b.verified + BETA * b.d),
        lambda x, o, p, c, m, s, failed: (math.exp(x - o), (c - m) / s + BETA * (p - o)),
    ),
    "KDRL-mask": (
        lambda b, x: (r(b, x), b.verified + (1 - b.success) * BETA * b.d),
        lambda x, o, p, c, m, s, failed: (math.exp(x - o), (c - m) / s + (0 if c else BETA * (p - o))),
    ),
    "SRPO": (
        lambda b, x: (r(b, x), b.success * b.verified + (1 - b.success) * b.d),
        lambda x, o, p, c, m, s, failed: (math.exp(x - o), (c - m) / s if c else p - o),
    ),
    "HDPO": (
        lambda b, x: (r(b, x), b.verified + b.failed * BETA * b.d),
        lambda x, o, p, c, m, s, failed: (math.exp(x - o), (c - m) / s + (BETA * (p - o) if failed else 0)),
    ),
    "TRRD": (
        lambda b, x: (trrd_ratio(x, b.old, b.reference, 0.5), b.verified),
        lambda x, o, p, c, m, s, failed: (math.exp(0.5 * (x - o) + 0.5 * (x - p)), (c - m) / s),
    ),
    "RLSD": (
        lambda b, x: (r(b, x), rescaled(b, 0.5)),
        lambda x, o, p, c, m, s, failed: (
            math.exp(x - o),
            (0.5 + 0.5 * min(max(math.exp(math.copysign(1, c - m) * (p - o)), 0.8), 1.2)) * (c - m) / s,
        ),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_follow_their_plain_formulas(name: str) -> None:
    b = batch(20)
    composed, plain = METHODS[name]
    x = b.logprob.clone().requires_grad_()
    ratio, advantages = composed(b, x)
    ours = surrogate(ratio, advantages, clip_low=0.2, clip_high=0.28)
    (slopes,) = torch.autograd.grad(ours.loss.sum(), x)
    clipped = 0
    for t, episode in enumerate(b.episode.tolist()):
        members = b.rewards[b.groups == b.groups[episode]]
        rho, advantage = plain(
            float(b.logprob[t]), float(b.old[t]), float(b.reference[t]), float(b.rewards[episode]),
            float(members.mean()), float(members.std()) + 1e-4, not members.any(),
        )  # fmt: skip
        kept = rho * advantage <= min(max(rho, 0.8), 1.28) * advantage
        clipped += not kept
        loss = -min(rho * advantage, min(max(rho, 0.8), 1.28) * advantage)
        assert ours.loss[t].item() == pytest.approx(loss, abs=1e-12)
        assert slopes[t].item() == pytest.approx(-rho * advantage if kept else 0.0, abs=1e-12)
    assert 0 < clipped < len(x)


@pytest.mark.parametrize("name", ["KDRL", "KDRL-mask", "HDPO", "SRPO"])
def test_methods_whose_group_failed_learn_from_the_reference_alone(name: str) -> None:
    b = batch(30)
    advantages = METHODS[name][0](b, b.logprob)[1]
    share = 1.0 if name == "SRPO" else BETA
    failed = b.failed != 0
    assert_close(advantages[failed], share * b.d[failed])
    assert (b.verified[failed] == 0).all()


def test_a_rescaled_advantage_keeps_its_sign_and_ends_at_its_parent() -> None:
    b = batch(40)
    assert torch.equal(rescaled(b, 1.0).sign(), b.verified.sign())
    assert torch.equal(rescaled(b, 0.0), b.verified)


def test_a_switch_of_coefficients_is_one_method_and_then_the_other() -> None:
    b = batch(50)
    for distil, reward, name in ((1.0, 0.0, "OPD"), (0.0, 1.0, "GRPO")):
        ours = surrogate(
            r(b, b.logprob), distil * b.d + reward * b.verified, clip_low=0.2, clip_high=0.2
        ).loss
        ratio, advantages = METHODS[name][0](b, b.logprob)
        assert torch.equal(ours, surrogate(ratio, advantages, clip_low=0.2, clip_high=0.2).loss)


# Expected gradients and fixed points of those methods, exact


def test_joint_advantage_has_the_gradient_of_reward_minus_kl() -> None:
    """A = reward + beta * return of d, and the same with k2, (log q - log p)^2 / 2, as a loss of its own."""
    all_, (student, teacher) = sequences(), tables(8, 2)
    rewards, beta = normal(19, all_.episodes), 0.3
    verified = group_advantages(
        rewards, torch.zeros(all_.episodes, dtype=torch.int64), baseline="none", normalise="none"
    )[all_.episode]
    d = all_.logprob(teacher) - all_.logprob(student)
    whole = verified + beta * reference_advantages(d, all_.episode, discount=1.0)
    assert_close(
        all_.expected_gradient(reinforce(whole), student),
        gradient_of(
            lambda logits: -(all_.probability(logits) @ rewards) + beta * sequence_kl(logits, teacher),
            student,
        ),
    )
    now = verified + beta * reference_advantages(d, all_.episode)
    k2 = all_.expected_gradient(
        lambda logprob: reinforce(verified)(logprob) + beta * (logprob - all_.logprob(teacher)).square() / 2,
        student,
    )
    assert_close(all_.expected_gradient(reinforce(now), student), k2)


def tempered_sequences(target: Tensor) -> Tensor:
    """Logits of the tabular policy whose sequences have log-probabilities ``target`` [E], normalised."""
    all_ = sequences()
    mass = target.new_zeros(all_.states, VOCABULARY)
    mass.index_put_((all_.state, all_.token), target.softmax(0)[all_.episode], accumulate=True)
    return mass.log()


def test_fixed_points() -> None:
    """Equal models; q proportional to p exp(r / beta) of KL-regularised reward; and the extrapolation p^l
    ref^(1 - l) of a rewarded log-ratio."""
    all_, (teacher, base) = sequences(), tables(9, 2)
    rewards, beta, scale = normal(21, all_.episodes), 0.7, 1.25
    assert reference_gradient(teacher, teacher, discount=0.5).abs().max() == 0
    log_p, log_base = (all_.summed(all_.logprob(table)) for table in (teacher, base))

    def gradient(student: Tensor, parts: dict[float, Tensor], reward: Tensor) -> Tensor:
        advantages = reward[all_.episode]
        for coefficient, table in parts.items():
            d = all_.logprob(table) - all_.logprob(student)
            advantages = advantages + coefficient * reference_advantages(d, all_.episode, discount=1.0)
        return all_.expected_gradient(reinforce(advantages), student)

    best = tempered_sequences(log_p + rewards / beta)
    assert gradient(best, {beta: teacher}, rewards).abs().max() < 1e-12
    assert gradient(teacher, {beta: teacher}, rewards).abs().max() > 1e-2
    beyond = tempered_sequences(scale * log_p + (1 - scale) * log_base)
    nothing = torch.zeros(all_.episodes, dtype=torch.float64)
    assert gradient(beyond, {scale: teacher, 1 - scale: base}, nothing).abs().max() < 1e-12
    assert gradient(teacher, {scale: teacher, 1 - scale: base}, nothing).abs().max() > 1e-2


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_equal_rewards_are_a_fixed_point_whatever_the_ratio(baseline: Baseline) -> None:
    b = batch(60)
    equal = group_advantages(torch.full((6,), 0.1), b.groups, baseline=baseline)[b.episode]
    x = b.logprob.clone().requires_grad_()
    for ratio in (r(b, x), trrd_ratio(x, b.old, b.reference, 0.5), shaped_ratio(x, 0.1), no_ratio(x)):
        loss = surrogate(ratio, equal, clip_low=0.2, clip_high=0.2).loss
        assert torch.autograd.grad(loss.sum(), x)[0].abs().max() == 0
