"""The loss as a sum of components with global denominators: what each action token counts, and for what.

``loss = sum_c coef_c * sum_t w_ct l_ct / denominator_c``. The coefficients are fixed once for an update
batch; micro-batches then only sum, so any split gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.batch import MicroBatch, Packed
from opd_agents.config import Component, Select
from opd_agents.errors import AlignmentError
from opd_agents.objectives import Kind, TokenTerms, ppo_surrogate, token_coefficients, token_terms
from opd_agents.policies.models import head, hidden_states
from opd_agents.schedules import value_at
from opd_agents.teachers import HiddenStates
from opd_agents.types import Trajectory


@dataclass(frozen=True, slots=True)
class Plan:
    """Per component, over the N tokens of the packed table: ``coefficients`` (coef * weight / denominator,
    0 where the component does not look) and, for policy components, ``advantages``."""

    components: Mapping[str, Component]
    coefficients: Mapping[str, Tensor]
    advantages: Mapping[str, Tensor]

    @property
    def keep(self) -> Tensor:
        """Tokens that some component needs (bool [N])."""
        return torch.stack(list(self.coefficients.values())).ne(0).any(0)


def selected(packed: Packed, trajectories: Sequence[Trajectory], select: Select) -> Tensor:
    """Weight of every action token [N] for one component: the turn's weight where selected, else 0.

    Raises AlignmentError where tokens are to be selected by spans and a turn has none.
    """
    weights = []
    for episode, index in packed.turns:
        trajectory, turn = trajectories[episode], trajectories[episode].turns[index]
        chosen = (
            (select.actor is None or turn.actor is select.actor)
            and (select.source is None or (select.source == "correction") == (trajectory.branch is not None))
            and (select.outcome is None or trajectory.outcome is select.outcome)
        )
        weights.append(turn.weight if chosen else 0.0)
    result = torch.tensor(weights)[packed.turn]
    if select.spans is None:
        return result
    if bool((packed.kind < 0).any()):
        raise AlignmentError(
            f"select.spans {[kind.value for kind in select.spans]}: some actions were recorded without spans,"
            " so it is not known which of their tokens these are; roll out with a chat, or leave spans out."
        )
    return torch.where(packed.of_kinds(select.spans), result, torch.zeros(()))


def plan(
    packed: Packed,
    components: Mapping[str, Component],
    weights: Mapping[str, Tensor],
    advantages: Mapping[str, Tensor],
    batch: Tensor,
    progress: float,
) -> Plan:
    """Coefficients for one update on the tokens where ``batch`` (bool [N]) holds.

    ``weights`` per component from :func:`selected`; ``advantages`` per policy component and trajectory [E].
    """
    coefficients = {}
    for name, component in components.items():
        here = torch.where(batch, weights[name], torch.zeros(()))
        share = token_coefficients(
            here, packed.turn, packed.episode, component.denominator, component.constant
        )
        coefficients[name] = share * value_at(component.coef, progress)
    return Plan(components, coefficients, {name: value[packed.episode] for name, value in advantages.items()})


def micro_losses(
    student: PreTrainedModel,
    packed: Packed,
    micro: MicroBatch,
    plan: Plan,
    signal: HiddenStates | None,
    temperature: float,
) -> dict[str, Tensor]:
    """Each component's part of the loss in one micro-batch (scalars with gradient)."""
    hidden = hidden_states(student, micro.ids)[micro.row, micro.column]
    theirs = signal.hidden[micro.tokens].to(hidden.device) if signal else None
    their_head = signal.head if signal else None

    def scored(kind: Kind | None, beta: float) -> TokenTerms:
        target = packed.target[micro.tokens].to(hidden.device)
        terms = token_terms(
            hidden, head(student), theirs, their_head, target, kind=kind, beta=beta, temperature=temperature
        )
        distance = None if terms.divergence is None else terms.divergence.cpu()
        return TokenTerms(distance, terms.logprob.cpu(), terms.entropy.cpu())  # with the packed table

    kinds = dict.fromkeys((c.divergence, c.beta) for c in plan.components.values() if c.kind == "distill")
    terms = {kind: scored(*kind) for kind in kinds}
    shared = next(iter(terms.values())) if terms else scored(None, 0.5)  # the log-probs are the same in all
    return {
        name: (
            plan.coefficients[name][micro.tokens]
            * _token_loss(name, c, plan, packed, micro, terms.get((c.divergence, c.beta), shared))
        ).sum()
        for name, c in plan.components.items()
    }


def _token_loss(
    name: str, component: Component, plan: Plan, packed: Packed, micro: MicroBatch, terms: TokenTerms
) -> Tensor:
    """l_t [n] of one component, finite wherever its coefficient is not 0 and 0 elsewhere."""
    active = plan.coefficients[name][micro.tokens] != 0
    # A token that was not sampled has no behaviour log-prob: its ratio is 1.
    recorded, current = packed.behaviour[micro.tokens], terms.logprob.detach()
    behaviour = torch.where(active & ~recorded.isnan(), recorded, current)
    match component.kind:
        case "ce":
            loss = -terms.logprob
        case "policy":
            loss = ppo_surrogate(
                terms.logprob, behaviour, plan.advantages[name][micro.tokens],
                clip_low=component.clip_low, clip_high=component.clip_high,
            ).loss  # fmt: skip
        case "distill":
            if terms.divergence is None:
                raise AssertionError("a distill component always has its divergence")
            loss = terms.divergence
            if component.ratio_clip is not None:
                loss = loss * (current - behaviour).exp().clamp(max=component.ratio_clip)
    return torch.where(active, loss, torch.zeros(()))
