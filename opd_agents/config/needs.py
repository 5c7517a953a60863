"""What the loss needs of its references: told from the config alone, before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from opd_agents.config.loss import Component, Distill, Policy, Preference, RewardPart, Select
from opd_agents.config.weights import (
    Accepted,
    Agreement,
    BeliefRevision,
    KLCollapse,
    LikelihoodShift,
    Perplexity,
    TeacherEntropy,
    TopTokens,
    Trust,
    TurnDisagreement,
    TurnDivergence,
    Weight,
)

Need: TypeAlias = Literal["spans", "sampled", "teacher_top_k", "student_top_k", "full"]
"""Of a reference's next-token distributions: the log-prob of what was sampled, by spans or by tokens, those
of its own top k or of the student's, or all of them."""


def reference_needs(components: Mapping[str, Component]) -> dict[str, frozenset[Need]]:
    """Per reference (`teacher` among them) what the components, their weights and gates need of it."""
    found: dict[str, set[Need]] = {}
    for component in components.values():
        for reference, need in _of_component(component):
            found.setdefault(reference, set()).add(need)
    return {reference: frozenset(needs) for reference, needs in found.items()}


def reference_top_k(components: Mapping[str, Component]) -> dict[str, int]:
    """The largest k of the teacher top k that the components take of each reference."""
    found: dict[str, int] = {}
    for component in components.values():
        if isinstance(component, Distill) and component.signal == "teacher_top_k" and component.k:
            found[component.reference] = max(component.k, found.get(component.reference, 0))
    return found


def weights_of(component: Component) -> Iterator[Weight]:
    """The weights of a component and the gates of its parts."""
    yield from component.weights
    if isinstance(component, Policy):
        for reference in component.references.values():
            yield from reference.gates
        for reward in component.rewards.values():
            yield from reward.gates


def reward_parts(components: Mapping[str, Component]) -> Iterator[tuple[str, RewardPart]]:
    """The parts of advantages that are of rewards, with their places in the config."""
    for name, component in components.items():
        if isinstance(component, Policy):
            for part, settings in component.rewards.items():
                yield f"loss.components.{name}.rewards.{part}", settings


def selects_of(component: Component) -> list[Select]:
    """What a component looks at; of a preference, both sides."""
    if isinstance(component, Preference):
        return [component.chosen, component.rejected]
    return [component.select]


def _of_component(component: Component) -> Iterator[tuple[str, Need]]:
    match component:
        case Distill():
            # a target between the two needs both whole, unless both are cut to the teacher's top k
            whole = component.geometric != 0 and component.renormalise == "none"
            yield component.reference, "full" if whole else component.signal
        case Policy():
            for part in component.references.values():
                yield part.reference, "full" if part.baseline == "closed_form" else "spans"
            if component.trrd_reference is not None:
                yield component.trrd_reference, "sampled"
        case Preference(reference=str(name)):
            yield name, "sampled"
    yield from _of_weights(list(weights_of(component)))


def _of_weights(weights: Sequence[Weight]) -> Iterator[tuple[str, Need]]:
    for weight in weights:
        match weight:
            case TeacherEntropy() | KLCollapse() | Accepted() | Trust(measure="entropy"):
                yield weight.reference, "full"
            case TopTokens(score="soft_or" | "divergence"):
                yield weight.reference, "full"
            case Agreement() | LikelihoodShift() | BeliefRevision():
                yield weight.reference, "sampled"
            case TurnDivergence() | TurnDisagreement() | Trust():
                yield weight.reference, "sampled"
            case Perplexity() if weight.of != "student":
                yield weight.of, "sampled"
