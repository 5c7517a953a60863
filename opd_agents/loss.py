"""The loss as a sum of components with global denominators: what each action token counts, and for what.

``loss = sum_c coef_c * sum_t w_ct l_ct / denominator_c``. The coefficients are fixed once for an update
batch; micro-batches then only sum, so any split gives the same gradient. So is what looks beyond a token:
the ratio of a whole turn or episode, and the slopes of a loss on pairs of episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.batch import MicroBatch, Packed
from opd_agents.composition import group_numbers, selected
from opd_agents.config import Component, CrossEntropy, Distill, Entropy, Policy, Preference
from opd_agents.experience import Assigned, Experience
from opd_agents.frozen import targets
from opd_agents.objectives import (
    Measure,
    TokenTerms,
    episode_pairs,
    mismatch_weights,
    no_ratio,
    shaped_ratio,
    surrogate,
    token_coefficients,
    token_ratio,
    token_slopes,
    token_terms,
    trrd_ratio,
    unit_log_ratios,
    unit_ratio,
)
from opd_agents.policies.models import head, hidden_states
from opd_agents.teachers import TeacherSignal
from opd_agents.types import Trajectory
from opd_agents.weighting import At

TokenLoss: TypeAlias = Callable[[TokenTerms, Tensor], Tensor]
"""l_t [n] of n tokens, from their terms and their places in the packed table (int64 [n])."""


@dataclass(frozen=True, slots=True)
class Part:
    """One component in one update: ``coefficients`` [N] are coef * weight / denominator, 0 where it does not
    look, and multiply its ``loss``; ``measure`` is what that reads of which reference, if any. Where the
    loss clips, it marks in ``clipped`` (bool [N]) the tokens that it has left without a gradient."""

    coefficients: Tensor
    loss: TokenLoss
    measure: tuple[str, Measure] | None = None
    clipped: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of one update by name, over the N tokens of the packed table."""

    parts: Mapping[str, Part]

    @property
    def keep(self) -> Tensor:
        """Tokens that some component needs (bool [N])."""
        return torch.stack([part.coefficients for part in self.parts.values()]).ne(0).any(0)


def looks_beyond(component: Component) -> bool:
    """Whether a component's gradient needs the current log-probs of whole turns or episodes first."""
    return isinstance(component, Preference) or (
        isinstance(component, Policy) and component.ratio in ("turn", "sequence")
    )


def plan(
    experience: Experience,
    components: Mapping[str, Component],
    assigned: Assigned,
    batch: Tensor,
    at: At,
    temperature: float,
    current: Tensor,
) -> Plan:
    """One update on the tokens where ``batch`` (bool [N]) holds. ``current``: log-probs [N] at the weights
    that are updated, looked at for components that look beyond a token only."""
    packed, parts = experience.packed, {}
    for name, component in components.items():
        if isinstance(component, Preference):
            parts[name] = _preference(component, experience, batch, assigned.coefs[name], current)
            continue
        weights = torch.where(batch, assigned.weights[name], torch.zeros(()))
        counted = assigned.counted[name] & batch
        share = assigned.coefs[name] * token_coefficients(
            weights, counted, packed.turn, packed.episode, component.denominator, component.constant
        )
        match component:
            case Policy():
                advantages = assigned.composed[name].advantage
                parts[name] = _policy(component, experience, share, counted, advantages, current)
            case Distill():
                told = (component.reference, measure(component, at, temperature))
                parts[name] = Part(share, partial(_distilled, name, component, packed), told)
            case CrossEntropy():
                parts[name] = Part(share, lambda terms, tokens: -terms.logprob)
            case Entropy():
                parts[name] = Part(share, lambda terms, tokens: -terms.entropy)
    return Plan(parts)


def measure(component: Distill, at: At, temperature: float) -> Measure:
    """The component's measure at this step; temperatures that it does not give are the rollout's."""
    return Measure(
        divergence=component.divergence,
        beta=component.beta or 0.5,
        alpha=component.alpha or 0.1,
        geometric=at(component.geometric),
        clip=component.clip,
        signal=component.signal,
        k=component.k,
        tail=component.tail,
        renormalise=component.renormalise,
        estimator=component.estimator,
        ratio=component.ratio,
        temperature_student=component.temperature_student or temperature,
        temperature_teacher=component.temperature_teacher or temperature,
    )


def _distilled(name: str, component: Distill, packed: Packed, terms: TokenTerms, tokens: Tensor) -> Tensor:
    loss = terms.divergences[name]
    if component.ratio_clip is None:
        return loss
    current, recorded = terms.logprob.detach(), packed.behaviour[tokens]
    ratio = (current - torch.where(recorded.isnan(), current, recorded)).exp()
    return loss * ratio.clamp(max=component.ratio_clip)


def _policy(
    component: Policy,
    experience: Experience,
    share: Tensor,
    counted: Tensor,
    advantages: Tensor,
    current: Tensor,
) -> Part:
    packed, frozen = experience.packed, experience.frozen
    # A token that was not sampled has no behaviour log-prob: its ratio starts from the student's own.
    old = torch.where(packed.behaviour.isnan(), frozen.logprob, packed.behaviour)
    if component.mismatch is not None and component.mismatch_high is not None:
        share = share * mismatch_weights(
            frozen.logprob, old, component.mismatch, low=component.mismatch_low, high=component.mismatch_high
        )
        old = frozen.logprob
    ratio = _ratio(component, experience, old, counted, current)
    advantages = torch.where(share != 0, advantages, torch.zeros(()))
    clipped = torch.zeros(len(share), dtype=torch.bool)

    def loss(terms: TokenTerms, tokens: Tensor) -> Tensor:
        found = surrogate(
            ratio(terms.logprob, tokens), advantages[tokens],
            clip_low=component.clip_low, clip_high=component.clip_high,
        )  # fmt: skip
        clipped[tokens] = found.clipped
        return found.loss

    return Part(share, loss, clipped=clipped)


def _ratio(
    component: Policy, experience: Experience, old: Tensor, counted: Tensor, current: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The ratio [n] to ``old`` [N], of current log-probs [n] and the places of their tokens."""
    packed, references = experience.packed, experience.frozen.references
    match component:
        case Policy(ratio="turn" | "sequence"):
            units = packed.turn if component.ratio == "turn" else packed.episode
            unit = unit_log_ratios(current - old, units, counted.float())
            return lambda logprob, tokens: unit_ratio(logprob, unit[tokens])
        case Policy(ratio="trrd", trrd_alpha=float(alpha), trrd_reference=str(name)):
            beside = torch.where(counted, references[name].logprob, old)  # others may have none
            return lambda logprob, tokens: trrd_ratio(logprob, old[tokens], beside[tokens], alpha)
        case Policy(ratio="shaped", shaping=float(shaping)):
            return lambda logprob, tokens: shaped_ratio(logprob, shaping)
        case Policy(ratio="none"):
            return lambda logprob, tokens: no_ratio(logprob)
        case _:
            return lambda logprob, tokens: token_ratio(logprob, old[tokens])


def _preference(
    component: Preference, experience: Experience, batch: Tensor, coef: float, current: Tensor
) -> Part:
    """All pairs whose parts are in the batch; their tokens are those that are selected."""
    packed, trajectories = experience.packed, experience.trajectories
    chosen, rejected = (
        (selected(packed, trajectories, select) != 0) & batch
        for select in (component.chosen, component.rejected)
    )
    units, pairs = _pairs(component, packed, trajectories, chosen, rejected)
    anchor = experience.frozen.references[component.reference].logprob if component.reference else None
    found = token_slopes(
        component.form, current, chosen | rejected, units, pairs,
        beta=component.beta, reference=anchor,
    )  # fmt: skip
    in_pairs = torch.tensor([unit for pair in pairs for unit in pair], dtype=torch.int64)
    active = (chosen | rejected) & torch.isin(units, in_pairs)
    value = found.losses.mean() / active.sum() if pairs else torch.zeros(())

    def loss(terms: TokenTerms, tokens: Tensor) -> Tensor:
        """Slopes have the gradient; all tokens together have the value."""
        return found.slopes[tokens] * (terms.logprob - terms.logprob.detach()) + value

    return Part(coef * active, loss)


def _pairs(
    component: Preference,
    packed: Packed,
    trajectories: Sequence[Trajectory],
    chosen: Tensor,
    rejected: Tensor,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The unit [N] of each token, its episode or its turn, and the pairs (chosen, rejected) of units."""
    if component.pairs == "episodes":
        size = len(trajectories)
        sides = [torch.zeros(size).index_add(0, packed.episode, m.float()) > 0 for m in (chosen, rejected)]
        return packed.episode, episode_pairs(group_numbers(trajectories), *sides)
    numbers = {(trajectories[e].uid, turn): number for number, (e, turn) in enumerate(packed.turns)}
    theirs, mine = (set(packed.turn[side].tolist()) for side in (chosen, rejected))
    pairs = []
    for one in trajectories:
        if one.branch is None or one.branch.tried:
            continue
        other, own = numbers[one.uid, one.branch.turn], numbers[one.branch.parent, one.branch.turn]
        if other in theirs and own in mine:
            pairs.append((other, own) if one.branch.better else (own, other))
    return packed.turn, pairs


def micro_losses(
    student: PreTrainedModel,
    packed: Packed,
    micro: MicroBatch,
    plan: Plan,
    signals: Mapping[str, TeacherSignal],
    temperature: float,
) -> dict[str, Tensor]:
    """Each component's part of the loss in one micro-batch (scalars with gradient)."""
    hidden = hidden_states(student, micro.ids)[micro.row, micro.column]
    device, tokens = hidden.device, micro.tokens
    measures = {name: part.measure for name, part in plan.parts.items() if part.measure is not None}
    needed = {name: signals[name] for name in {reference for reference, _ in measures.values()}}
    terms = token_terms(
        hidden, head(student), packed.target[tokens].to(device), temperature=temperature,
        targets=targets(needed, tokens, device), measures=measures,
        behaviour=packed.behaviour[tokens].to(device),
    )  # fmt: skip
    distances = {name: value.cpu() for name, value in terms.divergences.items()}  # with the packed table
    terms = TokenTerms(terms.logprob.cpu(), terms.entropy.cpu(), distances, {})
    losses = {}
    for name, part in plan.parts.items():
        share = part.coefficients[tokens]
        losses[name] = (share * torch.where(share != 0, part.loss(terms, tokens), torch.zeros(()))).sum()
    return losses
