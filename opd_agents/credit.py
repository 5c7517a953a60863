"""Trajectories + teacher signal + frozen token terms -> credit, without gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.batch import Packed
from opd_agents.errors import AlignmentError
from opd_agents.objectives import group_advantages, token_terms
from opd_agents.plugins import CreditFunction, Reward
from opd_agents.policies.models import head, hidden_states
from opd_agents.teachers import HiddenStates
from opd_agents.types import Actor, Credit, Outcome, Trajectory

FEW = 32  # tokens, whose mean gap says little


@dataclass(frozen=True, slots=True)
class FrozenTerms:
    """Per action token at the policy that sampled it, [N] in nats: log-prob under the student, and with a
    teacher KL(student || teacher) and the teacher's log-prob of the token."""

    logprob: Tensor
    kl: Tensor | None = None
    teacher_logprob: Tensor | None = None

    def summed(self, total: Callable[[Tensor], Tensor]) -> FrozenTerms:
        """The terms of all ranks, each of which has scored its own tokens; ``total`` sums over ranks."""
        teacher = (None if values is None else total(values) for values in (self.kl, self.teacher_logprob))
        return FrozenTerms(total(self.logprob), *teacher)

    def extended(self, other: FrozenTerms) -> FrozenTerms:
        """These terms followed by those of further trajectories."""
        if (
            self.kl is None
            or other.kl is None
            or self.teacher_logprob is None
            or other.teacher_logprob is None
        ):
            return FrozenTerms(torch.cat([self.logprob, other.logprob]))
        return FrozenTerms(
            torch.cat([self.logprob, other.logprob]),
            torch.cat([self.kl, other.kl]),
            torch.cat([self.teacher_logprob, other.teacher_logprob]),
        )


@torch.no_grad()
def frozen_terms(
    student: PreTrainedModel,
    packed: Packed,
    signal: HiddenStates | None,
    temperature: float,
    max_tokens: int,
    keep: Tensor | None = None,
) -> FrozenTerms:
    """Score every action token (of those where ``keep``, bool [N], holds; the others get 0) once at the
    current weights, at the sampling temperature."""
    size = len(packed.target)
    logprob, kl, teacher_logprob = torch.zeros(size), torch.zeros(size), torch.zeros(size)
    for micro in packed.micro_batches(max_tokens, keep):
        mine = hidden_states(student, micro.ids)[micro.row, micro.column]
        target = packed.target[micro.tokens].to(mine.device)
        if signal is None:
            terms = token_terms(mine, head(student), None, None, target, kind=None, temperature=temperature)
        else:
            theirs = signal.hidden[micro.tokens].to(mine.device)
            terms = token_terms(
                mine, head(student), theirs, signal.head, target, kind="reverse_kl", temperature=temperature
            )
            own = token_terms(theirs, signal.head, None, None, target, kind=None, temperature=temperature)
            assert terms.divergence is not None  # a kind was asked for
            kl[micro.tokens] = terms.divergence.float().cpu()
            teacher_logprob[micro.tokens] = own.logprob.float().cpu()
        logprob[micro.tokens] = terms.logprob.float().cpu()
    return FrozenTerms(logprob) if signal is None else FrozenTerms(logprob, kl, teacher_logprob)


def check_behaviour(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    frozen: FrozenTerms,
    version: int,
    tolerance: float,
    mean: float = math.inf,
) -> float:
    """Largest |re-scored - recorded| log-prob of the student's tokens of policy ``version``.

    Raises AlignmentError where it is above ``tolerance``, or the mean over tokens above ``mean``: another
    temperature, other weights, or misaligned tokens.
    """
    current = torch.tensor(
        [
            trajectories[e].turns[t].actor is Actor.STUDENT
            and trajectories[e].turns[t].policy_version == version
            for e, t in packed.turns
        ]
    )
    fresh = current[packed.turn] & ~packed.behaviour.isnan()
    if not bool(fresh.any()):
        return 0.0
    gap = (frozen.logprob - packed.behaviour)[fresh].abs()
    worst = float(gap.max())
    if not (worst <= tolerance and float(gap.sum()) <= mean * max(len(gap), FEW)):
        raise AlignmentError(
            f"The trainer re-scores the sampled tokens {worst:.3g} nats away from the sampler's log-probs "
            f"(tolerance {tolerance:g}; mean {float(gap.mean()):.3g}, tolerance {mean:g}): the temperature, "
            "the weights or the tokens differ."
        )
    return worst


def advantages(trajectories: Sequence[Trajectory], normalise: str, reward: Reward | None = None) -> Tensor:
    """Group-relative advantage of each trajectory [E]; 0 for branches, errors and ungrouped episodes.

    ``reward`` of a trajectory is what is compared; None: what the environment gave.
    An unfinished episode counts with the reward that it has, an episode whose environment failed not at all.
    """
    names = {group: number for number, group in enumerate(sorted({t.group for t in trajectories}))}
    counted = [
        i
        for i, t in enumerate(trajectories)
        if t.group and t.branch is None and t.outcome is not Outcome.ERROR
    ]
    result = torch.zeros(len(trajectories))
    if counted:
        given = [reward(trajectories[i]) if reward else trajectories[i].reward for i in counted]
        rewards = torch.tensor(given, dtype=torch.float32)
        groups = torch.tensor([names[trajectories[i].group] for i in counted])
        result[counted] = group_advantages(rewards, groups, normalise=normalise)  # type: ignore[arg-type]
    return result


def assign_credit(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    frozen: FrozenTerms | None,
    rewards: Mapping[str, Tensor],
    corrections: Mapping[tuple[str, int], str],
) -> list[list[Credit]]:
    """One ``Credit`` per turn of each trajectory; ``rewards`` maps a name to per-trajectory advantages [E],
    ``corrections`` (trajectory uid, turn) to the verdict on a repair."""
    count = packed.per_turn(torch.ones(len(packed.target)))
    kl = packed.per_turn(frozen.kl) if frozen and frozen.kl is not None else None
    teacher = (
        packed.per_turn(frozen.teacher_logprob) if frozen and frozen.teacher_logprob is not None else None
    )
    credits: list[list[Credit]] = [[] for _ in trajectories]
    for number, (episode, index) in enumerate(packed.turns):
        trajectory = trajectories[episode]
        credits[episode].append(
            Credit(
                kl_sum=None if kl is None else float(kl[number]),
                kl_mean=None if kl is None else float(kl[number] / count[number].clamp(min=1)),
                teacher_logprob=None if teacher is None else float(teacher[number]),
                advantage={name: float(values[episode]) for name, values in rewards.items()},
                correction=corrections.get((trajectory.uid, index)),
                weight=trajectory.turns[index].weight,
            )
        )
    return credits


def with_factors(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    credits: Sequence[Sequence[Credit]],
    functions: Mapping[str, CreditFunction],
) -> list[list[Credit]]:
    """The credits with the ``factors`` that each component's credit function gives."""
    turns: list[list[int]] = [[] for _ in trajectories]
    for episode, index in packed.turns:
        turns[episode].append(index)
    result = []
    for trajectory, own, indices in zip(trajectories, credits, turns, strict=True):
        given = {name: function(trajectory, own) for name, function in functions.items()} if own else {}
        chosen = [{name: values[index] for name, values in given.items()} for index in indices]
        result.append([replace(credit, factors=f) for credit, f in zip(own, chosen, strict=True)])
    return result


def factors(packed: Packed, credits: Sequence[Sequence[Credit]], component: str) -> Tensor:
    """The factor of every action token [N] in a component that has a credit function."""
    in_order = [iter(own) for own in credits]
    by_turn = [next(in_order[episode]).factors[component] for episode, _ in packed.turns]
    return torch.tensor(by_turn, dtype=torch.float32)[packed.turn]
