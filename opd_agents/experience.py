"""What one step learns from: trajectories, the teacher's signal on them, and accepted repairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_agents import envs
from opd_agents.batch import Packed, pack
from opd_agents.config import Component
from opd_agents.correction import Repair, correct
from opd_agents.credit import (
    FrozenTerms,
    advantages,
    assign_credit,
    check_behaviour,
    frozen_terms,
    with_factors,
)
from opd_agents.errors import AlignmentError, EnvironmentContractError
from opd_agents.plugins import load_credit, load_reward
from opd_agents.policies.models import forward_flops
from opd_agents.session import Session
from opd_agents.teachers import HiddenStates
from opd_agents.types import Actor, Credit, Trajectory

# How far the trainer's log-probs may be from the sampler's, in nats. A bfloat16 logit between 32 and 64, as
# large models have, is known to 0.25 only: one token says little there, but all of them tell other weights.
GAPS = {"float32": {"tolerance": 1e-3}, "bfloat16": {"tolerance": 5.0, "mean": 0.2}}


@dataclass(frozen=True, slots=True)
class Experience:
    """``signal`` and ``frozen`` belong to ``packed``, that to ``trajectories``: rollouts, then branches.

    Of several ranks each has the same, but for ``signal``, which is filled only where ``owned`` (bool [N])
    says that this rank scores and trains the token.
    """

    trajectories: tuple[Trajectory, ...]
    packed: Packed
    signal: HiddenStates | None
    frozen: FrozenTerms | None
    owned: Tensor
    repairs: tuple[Repair, ...] = ()

    @property
    def rollouts(self) -> tuple[Trajectory, ...]:
        return tuple(t for t in self.trajectories if t.branch is None and not t.recorded)

    @property
    def recorded(self) -> tuple[Trajectory, ...]:
        return tuple(t for t in self.trajectories if t.recorded)


def score(session: Session, trajectories: Sequence[Trajectory]) -> Experience:
    """The teacher's signal and the frozen token terms, once per trajectory.

    Raises AlignmentError where the trainer's log-probs are not the sampler's, EnvironmentContractError where
    every episode failed.
    """
    session.student_sampler.release()
    config, packed = session.config, pack(trajectories)
    played = [trajectory for trajectory in trajectories if not trajectory.recorded]
    if played and all(trajectory.error for trajectory in played):
        raise EnvironmentContractError(
            f"All {len(played)} episodes of step {session.step + 1} failed; the first, "
            f"{played[0].task} of {played[0].env_id}: {played[0].error}"
        )
    tokens, owned = config.trainer.micro_batch_tokens, session.world.owned(packed)
    signal = (
        session.teacher.score(packed, tokens, owned) if session.teacher and session.needs_signal else None
    )
    if signal is not None and len(signal.hidden) != len(packed.target):
        raise AlignmentError(
            f"The teacher gave {len(signal.hidden)} hidden states for {len(packed.target)} action tokens: it "
            "must give one before every action token, in the order of the packed table."
        )
    sampled = any(
        turn.logprobs is not None and turn.actor is Actor.STUDENT for t in trajectories for turn in t.turns
    )
    if not packed.turns or (signal is None and not sampled):
        return Experience(tuple(trajectories), packed, signal, None, owned)
    frozen = frozen_terms(session.model, packed, signal, config.rollout.temperature, tokens, owned)
    frozen = frozen.summed(session.world.sum)
    mean_context = packed.n_tokens / len(packed.rows) / 2
    session.totals["flops"] += forward_flops(session.model, packed.n_tokens, mean_context)
    check_behaviour(packed, trajectories, frozen, session.step, **GAPS[config.student.dtype])
    return Experience(tuple(trajectories), packed, signal, frozen, owned)


def with_repairs(session: Session, experience: Experience) -> Experience:
    """The experience and its accepted repairs, within the share of tokens that the config grants them."""
    settings, teacher, frozen = session.config.correction, session.teacher, experience.frozen
    if settings is None or teacher is None or frozen is None or frozen.teacher_logprob is None:
        return experience
    totals, share = session.totals, settings.token_share
    rolled_out = totals["generated_tokens"] - totals["correction_tokens"]
    rolled_out += sum(trajectory.n_action_tokens for trajectory in experience.trajectories)
    repairs = correct(
        experience.trajectories, experience.packed, frozen.teacher_logprob, settings,
        stream=(session.config.seed, session.step),
        token_budget=share / (1 - share) * rolled_out - totals["correction_tokens"],
        student=session.student_sampler, teacher=teacher.greedy, make=envs.make, chat=session.chat,
        limits=session.limits, temperature=session.config.rollout.temperature, world=session.world,
    )  # fmt: skip
    branches = [repair.branch for repair in repairs if repair.branch is not None]
    return _joined(experience, score(session, branches), tuple(repairs))


def _joined(experience: Experience, branches: Experience, repairs: tuple[Repair, ...]) -> Experience:
    signal, frozen = experience.signal, experience.frozen
    if signal and branches.signal:
        signal = HiddenStates(torch.cat([signal.hidden, branches.signal.hidden]), signal.head)
    if frozen and branches.frozen:
        frozen = frozen.extended(branches.frozen)
    trajectories = experience.trajectories + branches.trajectories
    owned = torch.cat([experience.owned, branches.owned])
    return Experience(trajectories, pack(trajectories), signal, frozen, owned, repairs)


def credit(
    components: Mapping[str, Component], experience: Experience
) -> tuple[dict[str, Tensor], list[list[Credit]]]:
    """Group-relative advantages per policy component [E], and the credit of every action."""
    trajectories = experience.trajectories
    own = {n: load_reward(c.reward, f"loss.components.{n}.reward") for n, c in components.items() if c.reward}
    rewards = {
        name: advantages(trajectories, component.normalise, own.get(name))
        for name, component in components.items()
        if component.kind == "policy"
    }
    verdicts = {(r.parent.uid, r.turn): "accepted" if r.accepted else "rejected" for r in experience.repairs}
    credits = assign_credit(experience.packed, trajectories, experience.frozen, rewards, verdicts)
    functions = {
        n: load_credit(c.credit, f"loss.components.{n}.credit") for n, c in components.items() if c.credit
    }
    if functions:
        credits = with_factors(experience.packed, trajectories, credits, functions)
    return rewards, credits
