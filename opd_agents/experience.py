"""What one step learns from: trajectories, the teacher's signal on them, and accepted repairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from opd_agents.batch import Packed, pack
from opd_agents.composition import Composed, compose, group_numbers, selected, source_of, weigh
from opd_agents.config import Component, Distill, Policy, Preference
from opd_agents.config.needs import selects_of
from opd_agents.correction import Repair
from opd_agents.credit import assign_credit, factors, with_factors, with_tokens
from opd_agents.discriminator import compared
from opd_agents.errors import AlignmentError, EnvironmentContractError
from opd_agents.frozen import TOP_K, FrozenTerms, check_behaviour, frozen_terms
from opd_agents.judging import NOT_ASKED, NOT_COMPARED, Compared, Judged, Opinions
from opd_agents.plugins import Reward, load_credit, load_reward
from opd_agents.policies.models import forward_flops
from opd_agents.policies.probe import GAPS
from opd_agents.session import Session
from opd_agents.teachers import HiddenStates, SampledLogprobs, SpanLogprobs, TeacherSignal, TeacherTopK
from opd_agents.types import ActionFeedback, Actor, Credit, Outcome, Trajectory, Verdict
from opd_agents.weighting import WeightInputs

VERDICTS = tuple(Verdict)


@dataclass(frozen=True, slots=True)
class Experience:
    """``signals`` of each reference, ``taught`` (bool [N]; of those that may have nothing to say) and
    ``frozen`` belong to ``packed``, that to ``trajectories``: rollouts, then branches.

    Of several ranks each has the same, but for ``signals``, which are filled only where ``owned`` (bool [N])
    says that this rank scores and trains the token.
    """

    trajectories: tuple[Trajectory, ...]
    packed: Packed
    signals: Mapping[str, TeacherSignal]
    taught: Mapping[str, Tensor]
    frozen: FrozenTerms
    owned: Tensor
    repairs: tuple[Repair, ...] = ()
    feedback: tuple[ActionFeedback, ...] = ()  # a judge's, of the rollouts and of alternatives to them
    agreement: Mapping[tuple[str, int], float] = field(default_factory=dict)  # see Alternatives
    proposed: Judged = NOT_ASKED  # what a judge would have corrected in them
    locating_tokens: int = 0  # generated to find what is to be corrected
    keyed: Compared = NOT_COMPARED  # what a judge says of the key steps of what was practised
    likeness: Tensor | None = None  # a discriminator's score of each trajectory (float32 [E]; NaN: of none)

    @property
    def rollouts(self) -> tuple[Trajectory, ...]:
        """Of the source: neither branches, nor demonstrations, nor recordings."""
        others = (t for t in self.trajectories if t.branch is None and not t.demonstration)
        return tuple(t for t in others if not (t.recorded or t.stored))

    @property
    def demonstrations(self) -> tuple[Trajectory, ...]:
        return tuple(t for t in self.trajectories if t.demonstration)

    @property
    def recorded(self) -> tuple[Trajectory, ...]:
        return tuple(t for t in self.trajectories if t.recorded or t.stored)


def score(
    session: Session,
    trajectories: Sequence[Trajectory],
    feedback: tuple[ActionFeedback, ...] = (),
    agreement: Mapping[tuple[str, int], float] = MappingProxyType({}),
) -> Experience:
    """The teacher's signal and the frozen token terms, once per trajectory, beside a judge's ``feedback`` and
    the ``agreement`` with another who acted at the same states.

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
    signals, taught = session.score(packed, trajectories, owned)
    read = bool(packed.rows) and _reads_terms(session, trajectories)
    frozen = frozen_terms(
        session.model, packed, signals, config.rollout.temperature, tokens, owned & read, overlap=TOP_K
    )  # fmt: skip
    frozen = frozen.summed(session.world.sum).where_taught(taught)
    if read:
        mean_context = packed.n_tokens / len(packed.rows) / 2
        session.spend("update", forward_flops(session.model, packed.n_tokens, mean_context))
        check_behaviour(
            packed, trajectories, frozen, session.step, **GAPS[config.student.dtype],
            teacher_share=config.rollout.teacher_share,
        )  # fmt: skip
    return Experience(
        tuple(trajectories), packed, signals, taught, frozen, owned, feedback=feedback, agreement=agreement
    )


def _reads_terms(session: Session, trajectories: Sequence[Trajectory]) -> bool:
    """Whether anything looks at the terms: not where the likelihood of another's actions is all there is."""
    components = session.config.loss.components.values()
    sampled = any(
        turn.logprobs is not None and turn.actor is Actor.STUDENT for t in trajectories for turn in t.turns
    )
    return sampled or any(component.kind != "ce" or component.weights for component in components)


def with_likeness(session: Session, experience: Experience) -> Experience:
    """The experience, with the scores of the discriminator where there is one, as it is before this step."""
    discriminator, scored = session.discriminator, compared(experience.trajectories)
    if discriminator is None:
        return experience
    likeness = session.world.from_main(lambda: discriminator.scores(experience.packed, scored))
    return replace(experience, likeness=likeness)


def joined(experience: Experience, branches: Experience, repairs: tuple[Repair, ...]) -> Experience:
    trajectories = experience.trajectories + branches.trajectories
    signals = {name: _followed(one, branches.signals[name]) for name, one in experience.signals.items()}
    taught = {name: torch.cat([one, branches.taught[name]]) for name, one in experience.taught.items()}
    frozen = experience.frozen.extended(branches.frozen)
    owned = torch.cat([experience.owned, branches.owned])
    return Experience(
        trajectories, pack(trajectories), signals, taught, frozen, owned, repairs, experience.feedback,
        experience.agreement, experience.proposed, experience.locating_tokens, experience.keyed,
    )  # fmt: skip


def _followed(first: TeacherSignal, then: TeacherSignal) -> TeacherSignal:
    """One signal for the tokens of both."""
    match first, then:
        case HiddenStates(), HiddenStates():
            return HiddenStates(torch.cat([first.hidden, then.hidden]), first.head)
        case TeacherTopK(), TeacherTopK():
            pairs = ((first.ids, then.ids), (first.logprobs, then.logprobs), (first.sampled, then.sampled))
            return TeacherTopK(*(torch.cat(pair) for pair in pairs))
        case SampledLogprobs(), SampledLogprobs():
            return SampledLogprobs(torch.cat([first.logprobs, then.logprobs]))
        case SpanLogprobs(), SpanLogprobs():
            return SpanLogprobs(
                torch.cat([first.logprobs, then.logprobs]), torch.cat([first.joined, then.joined])
            )
    raise AlignmentError("A reference gave one kind of signal on rollouts and another on repairs.")


@dataclass(frozen=True, slots=True)
class Assigned:
    """What the components make of an experience, without gradient: ``coefs`` at this step, the tokens that
    each selects (``counted``, bool [N]) and their ``weights`` [N], the advantages of policy components, the
    credit of every action."""

    coefs: Mapping[str, float]
    counted: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    composed: Mapping[str, Composed]
    credits: Sequence[Sequence[Credit]]


def credit(session: Session, experience: Experience) -> Assigned:
    """Weights, advantages and credit at this step's coefficients."""
    components, at = session.config.loss.components, session.at
    packed, trajectories = experience.packed, experience.trajectories
    opinions = Opinions(experience.feedback)
    shared = _weight_inputs(session, experience, opinions)
    chosen, weights, composed = {}, {}, dict[str, Composed]()
    for name, component in components.items():
        if isinstance(component, Preference):
            continue
        base = selected(packed, trajectories, component.select)
        chosen[name] = (base != 0) & _taught(component, experience)
        inputs = replace(shared, selected=chosen[name])
        weights[name] = base * chosen[name] * weigh(component.weights, inputs, at)
        if isinstance(component, Policy):
            own = {
                n: load_reward(part.reward, f"loss.components.{name}.rewards.{n}.reward")
                for n, part in component.rewards.items()
                if part.reward
            }
            own |= {n: _likeness(experience) for n, part in component.rewards.items() if part.discriminator}
            composed[name] = compose(component, packed, trajectories, inputs, at, own, opinions)
    verdicts = {
        (r.parent.uid, r.turn): "accepted" if r.accepted else "rejected"
        for r in experience.repairs
        if not r.control
    }
    credits = assign_credit(
        packed, trajectories, experience.frozen, composed, verdicts, opinions, experience.agreement
    )
    functions = {
        n: load_credit(c.credit, f"loss.components.{n}.credit") for n, c in components.items() if c.credit
    }
    credits = with_factors(packed, trajectories, credits, functions)
    weights |= {name: weights[name] * factors(packed, credits, name) for name in functions}
    coefs = {name: at(component.coef) for name, component in components.items()}
    learned = _learned(experience, components, coefs, weights)
    credits = with_tokens(packed, trajectories, credits, experience.frozen, composed, learned)
    return Assigned(coefs, chosen, weights, composed, credits)


def _learned(
    experience: Experience,
    components: Mapping[str, Component],
    coefs: Mapping[str, float],
    weights: Mapping[str, Tensor],
) -> Tensor:
    """The tokens (bool [N]) that some component learns from; of one on pairs, those that may be in a pair."""
    packed, result = experience.packed, torch.zeros(len(experience.packed.target), dtype=torch.bool)
    for name, component in components.items():
        selects = selects_of(component) if isinstance(component, Preference) else ()
        seen = [selected(packed, experience.trajectories, select) for select in selects] or [weights[name]]
        for values in seen if coefs[name] else ():
            result |= values != 0
    return result


def _likeness(experience: Experience) -> Reward:
    """The discriminator's score of a trajectory as its reward; NaN where there is none."""
    assert experience.likeness is not None  # see with_likeness
    uids = (trajectory.uid for trajectory in experience.trajectories)
    known = dict(zip(uids, experience.likeness.tolist(), strict=True))
    return lambda trajectory: known[trajectory.uid]


def _taught(component: Component, experience: Experience) -> Tensor:
    """Where a divergence's reference had something to say (bool [N])."""
    if isinstance(component, Distill) and component.reference in experience.taught:
        return experience.taught[component.reference]
    return torch.ones(len(experience.packed.target), dtype=torch.bool)


def _weight_inputs(session: Session, experience: Experience, opinions: Opinions) -> WeightInputs:
    packed, trajectories, frozen = experience.packed, experience.trajectories, experience.frozen
    counted = [
        source_of(t) in ("rollout", "practice") and not t.recorded and t.outcome is not Outcome.ERROR
        for t in trajectories
    ]
    said = [opinions.of(trajectories[episode].uid, turn) for episode, turn in packed.turns]
    scores = [math.nan if one is None or one.score is None else float(one.score) for one in said]
    verdicts = [-1 if one is None or one.verdict is None else VERDICTS.index(one.verdict) for one in said]
    places = [(trajectories[episode].uid, turn) for episode, turn in packed.turns]
    agreement = [experience.agreement.get(place, math.nan) for place in places]
    return WeightInputs(
        packed.target, packed.turn, packed.episode, torch.ones(len(packed.target), dtype=torch.bool),
        frozen.logprob, frozen.entropy, frozen.references,
        {name: one.spans for name, one in experience.signals.items() if isinstance(one, SpanLogprobs)},
        group_numbers(trajectories), torch.tensor([t.success for t in trajectories]), torch.tensor(counted),
        session.chat.end_ids, session.chat.token_id,
        torch.tensor(scores, dtype=torch.float32)[packed.turn],
        torch.tensor(verdicts, dtype=torch.int64)[packed.turn],
        torch.tensor(agreement, dtype=torch.float32)[packed.turn],
    )  # fmt: skip
