"""The presets that learn from rewards, from their YAML to loss and gradient, against the formulas of their
papers, written out in float64; what each becomes at its ends; and where its gradient vanishes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from engine import (
    T,
    assert_same,
    assigned_to,
    component,
    config_of,
    engine,
    experience_of,
    log_probs,
    plain,
    preset,
)
from rewarded import Rewarded, Seen, deviation, mean, surrogate, unlike, without_own
from rolling import trajectory, turn
from torch import Tensor

from opd_agents.batch import pack
from opd_agents.experience import Experience
from opd_agents.loss import measure
from opd_agents.objectives.measures import measured
from opd_agents.teachers import SampledLogprobs
from opd_agents.types import Outcome

Parts = Callable[[Seen], tuple[Tensor, Tensor]]


def kdrl(beta: float) -> Parts:
    return lambda s: (s.r, s.verified + beta * s.d)


def rlsd(strength: float) -> Parts:
    def parts(s: Seen) -> tuple[Tensor, Tensor]:
        shift = (s.verified.sign() * s.d).exp().clamp(0.8, 1.2)
        return s.r, s.verified * (1 - strength + strength * shift)

    return parts


def grpo(s: Seen) -> tuple[Tensor, Tensor]:
    return s.r, s.verified


def trrd(s: Seen) -> tuple[Tensor, Tensor]:
    return (0.5 * (s.new - s.old) + 0.5 * (s.new - s.teacher)).exp(), s.verified


# Preset, progress of the run, its ratio and advantage, its upper clip.
METHODS: list[tuple[str, float, Parts, float]] = [
    ("grpo", 0.0, grpo, 0.2),
    ("kdrl", 0.7, kdrl(0.002), 0.2),
    ("kdrl_mask", 0.0, lambda s: (s.r, s.verified + (1 - s.success) * 0.02 * s.d), 0.2),
    ("kdrl_annealed", 0.0, kdrl(0.2), 0.2),
    ("kdrl_annealed", 0.25, kdrl(0.1505), 0.2),
    ("kdrl_annealed", 1.0, kdrl(0.002), 0.2),
    ("hdpo_gate", 0.0, lambda s: (s.r, s.verified + s.group_failed * 0.01 * s.d * s.inside), 0.2),
    ("srpo", 0.0, lambda s: (s.r, s.success * s.verified + (1 - s.success) * s.d * s.inside), 0.2),
    ("rlad", 0.0, trrd, 0.28),
    ("rlsd", 0.0, rlsd(0.5), 0.2),
    ("rlsd", 0.5, rlsd(0.25), 0.2),
    ("rlsd", 1.0, grpo, 0.2),
    ("opd_then_rl", 0.39, lambda s: (s.r, s.d * s.inside), 0.2),
    ("opd_then_rl", 0.4, grpo, 0.2),
]


@pytest.mark.parametrize(("method", "progress", "parts", "high"), METHODS)
def test_a_preset_is_its_clipped_surrogate(
    method: str, progress: float, parts: Parts, high: float, desk_chat: Any, rewarded: Rewarded
) -> None:
    """Over the student's own episodes, whatever else is in the batch."""
    episodes = rewarded.episodes
    ratio, advantage = parts(rewarded.seen(episodes))
    expected = rewarded.plain(surrogate(ratio, advantage, high=high).mean())
    batch = [*episodes, rewarded.repaired, rewarded.shown]
    ours = rewarded.trained(preset(method), batch, chat=desk_chat, progress=progress)
    assert_same(ours, expected, rtol=1e-5)


def test_g_opd_extrapolates_and_truncates_the_mismatch_of_the_sampler(rewarded: Rewarded) -> None:
    """Sampled by probabilities that are not quite the trainer's: the weight min(q_old / q_sampler, 5)."""
    off = unlike(rewarded.episodes)
    s = rewarded.seen(off)
    correction = (s.old - s.packed.behaviour.double()).exp()
    assert bool((correction > 5).any()) and bool((correction < 1).any())
    advantage = 1.25 * (s.teacher - s.base) - (s.old - s.base)
    expected = rewarded.plain((correction.clamp(max=5) * surrogate(s.r, advantage)).mean())
    assert_same(rewarded.trained(preset("g_opd"), off), expected, rtol=1e-5)


def test_luffy_shapes_the_tokens_of_the_teacher_and_clips_none(rewarded: Rewarded) -> None:
    """-r A on the student's tokens, -A q / (q + 0.1) on the teacher's, A = R - mean of both; over a constant;
    minus 0.001 times the mean entropy of the student's tokens."""
    together = [*rewarded.episodes, rewarded.shown]
    s = rewarded.seen(together)
    shown = s.per_token([float(t.demonstration) for t in together]) == 1
    advantage = s.advantage(lambda reward, group: reward - mean(group))
    assert float(advantage[shown][0]) > 1  # the teacher's reward counts in the group
    log_q = log_probs(rewarded.model, s.packed)
    entropy = -(log_q.exp() * log_q).sum(-1)[~shown].mean()
    q = s.new.exp()
    terms = -advantage * torch.where(shown, q / (q + 0.1), s.r)
    expected = rewarded.plain(terms.sum() / 16384 - 0.001 * entropy)
    assert_same(rewarded.trained(preset("luffy"), together), expected, rtol=2e-5)


def test_hdpo_adds_the_privileged_episodes_of_failed_groups(rewarded: Rewarded) -> None:
    """GRPO with the mean of the others as baseline, plus 0.01 JSD over the teacher's top 64 and the rest, on
    those of the privileged episodes that succeeded."""
    shown = rewarded.shown
    lost = dataclasses.replace(shown, uid="l", outcome=Outcome.FAILURE)
    s, privileged = rewarded.seen(rewarded.episodes), pack([shown])
    log_p, log_q = (log_probs(one, privileged) for one in (rewarded.judge, rewarded.model))
    best = log_p.topk(64).indices
    p, q = (with_rest(one.exp(), best) for one in (log_p.detach(), log_q))
    middle = (p + q) / 2
    jsd = 0.5 * (p * (p / middle).log() + q * (q / middle).log()).sum(-1).mean()
    verified = surrogate(s.r, s.advantage(without_own)).mean()
    batch = [*rewarded.episodes, shown, lost]
    alone = rewarded.plain(jsd)
    assert_same(rewarded.trained({"r": preset("hdpo")["rescue"]}, batch), (0.01 * alone[0], 0.01 * alone[1]))
    ours = rewarded.trained(preset("hdpo"), batch)
    expected = rewarded.plain(verified)
    assert_same(ours, (expected[0] + 0.01 * alone[0], expected[1] + 0.01 * alone[1]), rtol=1e-5)


def with_rest(shares: Tensor, ids: Tensor) -> Tensor:
    head = shares.gather(1, ids)
    return torch.cat([head, 1 - head.sum(-1, keepdim=True)], 1)


def anchored(component: Any) -> Any:
    """To the reference that is at hand."""
    return component.model_copy(update={"reference": "base"})


def test_ema_anchor_adds_the_kl_over_the_top_k_and_a_sampled_tail(rewarded: Rewarded) -> None:
    """GRPO, plus 0.01 times the terms of q's top 32 and, of a sampled token outside, its term over the
    probability that it was sampled with."""
    s, components = rewarded.seen(rewarded.episodes), preset("ema_anchor")
    log_a, log_q = (log_probs(one, s.packed) for one in (rewarded.initial, rewarded.model))
    best = log_q.topk(32).indices
    head_q, head_a = log_q.gather(1, best), log_a.detach().gather(1, best)
    outside = (best != s.packed.target[:, None]).all(1)
    assert 5 < int(outside.sum()) < 0.9 * len(outside)
    tail = (s.new - s.packed.behaviour.double()).exp() * (s.new - rewarded.seen(rewarded.episodes).base)
    kl = ((head_q.exp() * (head_q - head_a)).sum(-1) + outside * tail).mean()
    expected = rewarded.plain(surrogate(s.r, s.verified).mean() + 0.01 * kl)
    ours = {"verifier": components["verifier"], "anchor": anchored(components["anchor"])}
    assert_same(rewarded.trained(ours, [*rewarded.episodes, rewarded.shown]), expected, rtol=1e-5)
    assert components["anchor"].reference == "anchor" and config_of("ema_anchor").references["anchor"].rate


def test_the_tail_of_ema_anchor_has_the_gradient_of_the_whole_kl() -> None:
    """In the exact expectation over the sampled token; that of the released code lacks that of q(tail)."""
    random = torch.Generator().manual_seed(0)
    vocabulary, (anchor,) = 50, [preset("ema_anchor")["anchor"]]
    logits, other = (2 * torch.randn(vocabulary, generator=random, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    every = torch.arange(vocabulary)
    log_q, log_a = logits.log_softmax(-1), other.log_softmax(-1)
    q, tail = log_q.detach().exp(), torch.ones(vocabulary, dtype=torch.bool)
    tail[log_q.topk(anchor.k).indices] = False

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    exact = measure(anchor, lambda schedule: 0.0, 1.0)  # nothing of it moves
    whole = gradient((log_q.exp() * (log_q - log_a)).sum())
    rows = (log_q.expand(vocabulary, -1), log_a.expand(vocabulary, -1))
    ours = gradient((q * measured(*rows, exact, every, log_q.detach())).sum())
    torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)
    head = (log_q.exp() * (log_q - log_a))[~tail].sum()
    released = gradient(head + (q * (log_q - log_a).detach() * log_q)[tail].sum())
    torch.testing.assert_close(released, whole - gradient(log_q.exp()[tail].sum()), rtol=1e-9, atol=1e-12)
    assert float((released - whole).abs().max()) > 1e-3


# ---- ends ----

JOINT, DISTILL = "loss.components.joint", "loss.components.distill"
NO_TEACHER = f"{JOINT}.references.teacher.coef=0.0"
NO_SHIFT = f"{JOINT}.rewards.verifier.gates=[{{kind: likelihood_shift, strength: 0.0}}]"
ENDS = [
    ("kdrl", [NO_TEACHER], "grpo", []),
    ("kdrl_mask", [NO_TEACHER], "grpo", []),
    ("kdrl_annealed", [f"{JOINT}.references.teacher.coef.start=0.002"], "kdrl", []),
    ("hdpo_gate", [NO_TEACHER], "grpo", []),
    ("rlad", [f"{JOINT}.trrd_alpha=1.0", f"{JOINT}.clip_high=0.2"], "grpo", []),
    ("rlsd", [NO_SHIFT], "grpo", []),
    (
        "g_opd",
        [f"{DISTILL}.references.teacher.coef=1.0", f"{DISTILL}.references.base.coef=0.0"],
        "thinking_machines",
        [f"{DISTILL}.clip_low=0.2", f"{DISTILL}.clip_high=0.2"],
    ),
]


@pytest.mark.parametrize(("method", "changed", "parent", "as_parent"), ENDS)
def test_at_its_end_a_preset_is_its_parent(
    method: str, changed: list[str], parent: str, as_parent: list[str], desk_chat: Any, rewarded: Rewarded
) -> None:
    def trained(name: str, overrides: Sequence[str]) -> tuple[float, Tensor]:
        components = config_of(name, *overrides).loss.components
        return rewarded.trained(components, rewarded.episodes, chat=desk_chat)

    # But for rounding: G-OPD takes the trainer's log-probs for the sampler's, and corrects by their ratio.
    assert_same(trained(method, changed), trained(parent, as_parent), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "outcome", "parent", "overrides", "progress"),
    [
        ("srpo", Outcome.SUCCESS, "grpo", [], 0.0),
        ("srpo", Outcome.FAILURE, "opd_then_rl", [], 0.0),
        ("kdrl_mask", Outcome.SUCCESS, "grpo", [], 0.0),
        ("kdrl_mask", Outcome.FAILURE, "kdrl", [f"{JOINT}.references.teacher.coef=0.02"], 0.0),
        ("hdpo_gate", Outcome.SUCCESS, "grpo", [], 0.0),
    ],
)
def test_where_a_gate_is_one_for_all_a_preset_is_the_one_parent_or_the_other(
    method: str, outcome: Outcome, parent: str, overrides: list[str], progress: float, desk_chat: Any,
    rewarded: Rewarded,
) -> None:  # fmt: skip
    alike = [dataclasses.replace(t, outcome=outcome) for t in rewarded.episodes]
    wanted = config_of(parent, *overrides).loss.components
    ours, theirs = (
        rewarded.trained(components, alike, chat=desk_chat, progress=progress)
        for components in (preset(method), wanted)
    )
    assert_same(ours, theirs, rtol=1e-9)


def test_kdrl_is_grpo_and_the_second_order_estimate_as_a_loss_on_the_first_update(rewarded: Rewarded) -> None:
    """As the paper has it. Off the sampling weights the ratio and its clip are on both parts of the one."""
    mine = {"actor": "student", "source": "rollout"}
    k2 = component(
        kind="distill", coef=0.002, select=mine, signal="sampled", estimator="k2", ratio="detached"
    )
    apart, experience = preset("grpo") | {"k2": k2}, rewarded.experience(rewarded.episodes)
    for now, same in ((rewarded.past, True), (rewarded.model, False)):
        one, other = engine(now, experience, preset("kdrl"))[1], engine(now, experience, apart)[1]
        gap = float((one - other).norm()) / float(other.norm())
        assert gap < 1e-5 if same else gap > 1e-3


def test_rlsd_never_turns_an_advantage_round(rewarded: Rewarded) -> None:
    experience = rewarded.experience(rewarded.episodes)
    ours = assigned_to(experience, preset("rlsd")).composed["joint"].advantage
    plainly = assigned_to(experience, preset("grpo")).composed["grpo"].advantage
    assert torch.equal(ours.sign(), plainly.sign()) and bool((plainly > 0).any() and (plainly < 0).any())
    share = (ours / plainly)[plainly != 0]
    assert float(share.min()) == pytest.approx(0.9) and float(share.max()) == pytest.approx(1.1)


def test_rlad_starts_clipped_where_the_teacher_is_far(rewarded: Rewarded) -> None:
    """At the first update the ratio is exp(-d / 2): no gradient for d above 0.446 nats where A < 0, or below
    -0.494 where A > 0."""
    s = rewarded.seen(rewarded.episodes, rewarded.past)
    dropped = ((s.verified < 0) & (s.d > 0.4463)) | ((s.verified > 0) & (s.d < -0.4937))
    assert 0.2 < float(dropped.double().mean()) < 0.8
    slope = ~dropped * s.verified * (-0.5 * s.d).exp()
    expected = plain(rewarded.past, -(slope * s.new).mean())[1]
    ours = engine(rewarded.past, rewarded.experience(rewarded.episodes), preset("rlad"))[1]
    assert float((ours - expected).norm()) <= 1e-5 * float(expected.norm())


# ---- where the gradient vanishes ----


@pytest.fixture(scope="module")
def equals(rewarded: Rewarded) -> Experience:
    """Of equal rewards, with references that are the student."""
    equal = [dataclasses.replace(t, reward=0.3) for t in [*rewarded.episodes, rewarded.shown]]
    return experience_of(rewarded.student, equal, {"teacher": rewarded.past, "base": rewarded.past})


REWARDED = ["grpo", "kdrl", "kdrl_mask", "kdrl_annealed", "g_opd", "rlad", "rlsd", "hdpo", "hdpo_gate"]


@pytest.mark.parametrize("method", [*REWARDED, "srpo", "opd_then_rl"])
def test_equal_rewards_and_a_teacher_that_is_the_student_teach_nothing(
    method: str, desk_chat: Any, rewarded: Rewarded, equals: Experience
) -> None:
    gradient = engine(rewarded.past, equals, preset(method), chat=desk_chat)[1]
    assert float(gradient.norm()) < 1e-5  # of log-probs in float32


class Enumerated(NamedTuple):
    """Every token of the vocabulary as the answer at some states, each counted as often as the student would
    draw it: the mean over tokens is the expectation over the student's draws."""

    experience: Experience
    states: list[Tensor]
    log_q: Tensor  # [states, V]
    log_base: Tensor

    def taught_by(self, teacher: Tensor) -> Experience:
        """With a teacher of these log-probs [states, V]."""
        told, frozen = SampledLogprobs(teacher.flatten()), self.experience.frozen
        said = frozen.references["base"]._replace(
            logprob=told.logprobs.float(), kl=None, entropy=None, rank=None
        )
        return dataclasses.replace(
            self.experience,
            signals={**self.experience.signals, "teacher": told},
            frozen=dataclasses.replace(frozen, references={**frozen.references, "teacher": said}),
        )


def next_tokens(one: Any, states: Sequence[Tensor]) -> Tensor:
    """Log-probs [states, V]."""
    return torch.stack([(one(ids[None]).logits[0, -1] / T).log_softmax(-1) for ids in states])


@pytest.fixture(scope="module")
def enumerated(rewarded: Rewarded) -> Enumerated:
    """A state in the first turn and one in the second, and for each a group of episodes of one token."""
    states = [torch.tensor(one.context_ids) for one in rewarded.episodes[0].turns[:2]]
    log_q, log_base = (next_tokens(one, states).detach() for one in (rewarded.past, rewarded.initial))
    size = log_q.shape[1]
    trajectories = [
        trajectory(
            [turn(ids.tolist(), [token], weight=size * float(log_p.exp()), logprobs=(float(log_p),))],
            uid=f"{state}/{token}", group=f"s{state}", reward=float(token * 7 % 11) / 10,
            outcome=Outcome.SUCCESS if token % 3 else Outcome.FAILURE,
        )
        for state, (ids, row) in enumerate(zip(states, log_q, strict=True))
        for token, log_p in enumerate(row)
    ]  # fmt: skip
    experience = experience_of(rewarded.student, trajectories, {"base": rewarded.initial})
    return Enumerated(experience, states, log_q, log_base)


def test_opd_then_rl_starts_with_the_gradient_of_the_whole_reverse_kl(
    rewarded: Rewarded, enumerated: Enumerated
) -> None:
    """In expectation over the tokens that the student may draw; every token counted, the end among them."""
    log_p, log_q = (next_tokens(one, enumerated.states) for one in (rewarded.judge, rewarded.past))
    kl = (log_q.exp() * (log_q - log_p.detach())).sum(-1).mean()
    expected = plain(rewarded.past, kl)[1]
    components = config_of("opd_then_rl", f"{JOINT}.references.teacher.gates=[]").loss.components
    ours = engine(rewarded.past, enumerated.taught_by(log_p.detach()), components)[1]
    assert float((ours - expected).norm()) <= 1e-5 * float(expected.norm())


def test_g_opd_rests_beyond_the_teacher(rewarded: Rewarded, enumerated: Enumerated) -> None:
    """The student that is p^1.25 p_0^-0.25, normalised, has no expected gradient; one that is p has."""
    log_q, log_base = enumerated.log_q, enumerated.log_base
    log_p = ((log_q + 0.25 * log_base) / 1.25).log_softmax(-1)
    torch.testing.assert_close((1.25 * log_p - 0.25 * log_base).log_softmax(-1), log_q)
    assert_at_rest("g_opd", log_p, rewarded, enumerated)


@pytest.mark.parametrize(("method", "beta"), [("kdrl", 0.002), ("kdrl_annealed", 0.2)])
def test_kdrl_rests_at_the_teacher_tilted_by_the_advantage(
    method: str, beta: float, rewarded: Rewarded, enumerated: Enumerated
) -> None:
    """q is in proportion to p exp(A / beta), the solution of reward maximisation with a KL to the teacher."""
    rewards = [t.reward for t in enumerated.experience.trajectories[: enumerated.log_q.shape[1]]]
    spread = deviation(rewards) + 1e-4
    advantage = torch.tensor([(one - mean(rewards)) / spread for one in rewards], dtype=torch.float64)
    assert_at_rest(method, (enumerated.log_q - advantage / beta).log_softmax(-1), rewarded, enumerated)


def assert_at_rest(method: str, teacher: Tensor, rewarded: Rewarded, enumerated: Enumerated) -> None:
    """With this teacher, as it is not with one that is the student."""
    at_rest, alike = (
        engine(rewarded.past, enumerated.taught_by(one), preset(method))[1]
        for one in (teacher, enumerated.log_q)
    )
    assert float(at_rest.norm()) < 1e-4 * float(alike.norm())
