"""Token terms at the policy that sampled, without gradient: what credit, weights and gates read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.batch import Packed
from opd_agents.errors import AlignmentError
from opd_agents.objectives import (
    FullTarget,
    ReferenceTerms,
    SampledTarget,
    Target,
    TopKTarget,
    token_terms,
)
from opd_agents.policies.mixture import log_mixture
from opd_agents.policies.models import head, hidden_states
from opd_agents.teachers import HiddenStates, SampledLogprobs, SpanLogprobs, TeacherSignal, TeacherTopK
from opd_agents.types import Actor, Trajectory

FEW = 32  # tokens, whose mean gap says little
TOP_K = 16  # of which the overlap is told


@dataclass(frozen=True, slots=True)
class FrozenTerms:
    """Per action token at the policy that sampled it, [N] in nats: the student's log-prob and entropy, and of
    each reference what its signal tells."""

    logprob: Tensor
    entropy: Tensor
    references: Mapping[str, ReferenceTerms]

    def summed(self, total: Callable[[Tensor], Tensor]) -> FrozenTerms:
        """The terms of all ranks, each of which has scored its own tokens; ``total`` sums over ranks."""
        references = {name: _each(total, terms) for name, terms in self.references.items()}
        return FrozenTerms(total(self.logprob), total(self.entropy), references)

    def extended(self, other: FrozenTerms) -> FrozenTerms:
        """These terms followed by those of further trajectories."""
        return FrozenTerms(
            torch.cat([self.logprob, other.logprob]),
            torch.cat([self.entropy, other.entropy]),
            {
                name: _each(lambda *values: torch.cat(values), terms, other.references[name])
                for name, terms in self.references.items()
            },
        )

    def where_taught(self, taught: Mapping[str, Tensor]) -> FrozenTerms:
        """A reference that had nothing to say about a token (bool [N]) agrees with the student there."""
        nothing = torch.zeros_like(self.logprob)
        same = ReferenceTerms(self.logprob, nothing, self.entropy, nothing, nothing + 1)

        def heard(name: str, said: Tensor) -> ReferenceTerms:
            return _each(lambda own, other: torch.where(said, own, other), self.references[name], same)

        changed = {name: heard(name, said) for name, said in taught.items()}
        return FrozenTerms(self.logprob, self.entropy, {**self.references, **changed})


def _each(function: Callable[..., Tensor], *terms: ReferenceTerms) -> ReferenceTerms:
    columns = zip(*terms, strict=True)
    return ReferenceTerms(*(None if column[0] is None else function(*column) for column in columns))  # type: ignore[arg-type]


@torch.no_grad()
def frozen_terms(
    student: PreTrainedModel,
    packed: Packed,
    signals: Mapping[str, TeacherSignal],
    temperature: float,
    max_tokens: int,
    keep: Tensor | None = None,
    overlap: int = 0,
) -> FrozenTerms:
    """Score every action token (of those where ``keep``, bool [N], holds; the others get 0) once at the
    current weights, at the sampling temperature; ``overlap`` as of `token_terms`."""
    size = len(packed.target)
    logprob, entropy = torch.zeros(size), torch.zeros(size)
    references: dict[str, list[Tensor | None]] = {}
    for micro in packed.micro_batches(max_tokens, keep):
        hidden = hidden_states(student, micro.ids)[micro.row, micro.column]
        terms = token_terms(
            hidden, head(student), packed.target[micro.tokens].to(hidden.device), temperature=temperature,
            targets=targets(signals, micro.tokens, hidden.device), statistics=True, overlap=overlap,
        )  # fmt: skip
        logprob[micro.tokens] = terms.logprob.float().cpu()
        entropy[micro.tokens] = terms.entropy.float().cpu()
        for name, found in terms.references.items():
            columns = references.setdefault(name, [None if v is None else torch.zeros(size) for v in found])
            for column, values in zip(columns, found, strict=True):
                if column is not None and values is not None:
                    column[micro.tokens] = values.float().cpu()
    nothing = {n: _nothing(signal, size, overlap) for n, signal in signals.items() if n not in references}
    scored = {name: ReferenceTerms(*columns) for name, columns in references.items()}  # type: ignore[arg-type]
    return FrozenTerms(logprob, entropy, scored | nothing)


def _nothing(signal: TeacherSignal, size: int, overlap: int) -> ReferenceTerms:
    """Of a rank that owns no token: zeros of the same fields as on the others."""
    full = isinstance(signal, HiddenStates)
    shared = overlap > 0 and isinstance(signal, HiddenStates | TeacherTopK)
    known = (True, full, full, full, shared)
    return ReferenceTerms(*(torch.zeros(size) if one else None for one in known))  # type: ignore[arg-type]


def targets(signals: Mapping[str, TeacherSignal], tokens: Tensor, device: torch.device) -> dict[str, Target]:
    """The signals at some tokens of the packed table (int64 [n]), on the student's device."""
    return {name: _target(signal, tokens, device) for name, signal in signals.items()}


def _target(signal: TeacherSignal, tokens: Tensor, device: torch.device) -> Target:
    match signal:
        case HiddenStates():
            return FullTarget(signal.hidden[tokens].to(device), signal.head)
        case TeacherTopK():
            columns = (signal.ids, signal.logprobs, signal.sampled)
            return TopKTarget(*(column[tokens].to(device) for column in columns))
        case SampledLogprobs() | SpanLogprobs():
            return SampledTarget(signal.logprobs[tokens].to(device))


def check_behaviour(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    frozen: FrozenTerms,
    version: int,
    tolerance: float,
    mean: float = math.inf,
    teacher_share: float = 0.0,
) -> float:
    """Largest |re-scored - recorded| log-prob of the student's tokens of policy ``version``, in which the
    teacher had its share.

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
    scored = frozen.logprob
    if teacher_share:
        scored = log_mixture(scored, frozen.references["teacher"].logprob, teacher_share)
    gap = (scored - packed.behaviour)[fresh].abs()
    worst = float(gap.max())
    if not (worst <= tolerance and float(gap.sum()) <= mean * max(len(gap), FEW)):
        raise AlignmentError(
            f"The trainer re-scores the sampled tokens {worst:.3g} nats away from the sampler's log-probs "
            f"(tolerance {tolerance:g}; mean {float(gap.mean()):.3g}, tolerance {mean:g}): the temperature, "
            "the weights or the tokens differ."
        )
    return worst
