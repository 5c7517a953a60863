"""Per-token terms from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_agents.objectives.divergence import entropy, kl_terms, log_distribution, total
from opd_agents.objectives.estimators import of_tokens
from opd_agents.objectives.measures import Measure, measured, measured_sampled, measured_top_k
from opd_agents.objectives.targets import (
    FullTarget,
    Head,
    SampledTarget,
    Target,
    TopKTarget,
    check_behaviour,
    check_ids,
    check_measure,
    check_target,
)

CHUNK_ELEMENTS = 2**23  # 32 MiB in float32


class ReferenceTerms(NamedTuple):
    """What a reference p says of N action tokens, ``[N]`` each, without gradient, at the sampler's
    temperature; KL, entropy and rank need all of p (`FullTarget`) and are None otherwise."""

    logprob: Tensor
    """log p(action), nats."""
    kl: Tensor | None
    """KL(q || p), from the student to the reference, nats; inf where p lacks a token that q has."""
    entropy: Tensor | None
    """Entropy of p, nats."""
    rank: Tensor | None
    """int64: how many tokens p has more probable than the student's most probable one; 0 = they agree."""
    overlap: Tensor | None = None
    """Of the student's probability on its k most probable tokens, the share on those that are among the k of
    p; where it was asked for, and p's k most probable tokens are known."""


class TokenTerms(NamedTuple):
    """Terms of N action tokens, each ``[N]`` in nats, at least float32; all but ``references`` are
    differentiable in the student."""

    logprob: Tensor
    """log q(action), the log-probability of the action token under the student."""
    entropy: Tensor
    """Entropy of the student's distribution."""
    divergences: dict[str, Tensor]
    """Per component the measure of its target."""
    references: dict[str, ReferenceTerms]
    """Per target, where ``statistics`` were asked for; else empty."""


def token_terms(
    student_hidden: Tensor,
    student_head: Head,
    action_ids: Tensor,
    *,
    temperature: float = 1.0,
    targets: Mapping[str, Target] = {},
    measures: Mapping[str, tuple[str, Measure]] = {},
    behaviour: Tensor | None = None,
    statistics: bool = False,
    overlap: int = 0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenTerms:
    """Log-prob, entropy and any number of divergences of N action tokens from hidden states.

    Arguments: ``student_hidden [N, Hs]``, the states that *predict* the action tokens (rows gathered by the
    caller, shifted by one), and ``action_ids [N]`` (integers); ``targets``, what references say at the same
    positions, by name; ``measures``, per component the name of its target and how far it is (see `Measure`).
    Nothing is averaged or weighted.

    ``logprob``, ``entropy`` and ``references`` belong to softmax(logits / ``temperature``), the sampler's, so
    that ``logprob`` compares with the log-probs recorded in sampling. A measure has temperatures of its own
    for both sides, applied to logits; log-probs that come ready made (`TopKTarget`, `SampledTarget`) are
    those of ``temperature``, and no other. ``behaviour [N]`` are the log-probs the tokens were sampled with,
    which measures that sample divide by; None, and NaN where a token was not sampled, stand for the current
    log-prob, detached. ``overlap`` is the k of that statistic (0: it is left out); of a target that gives
    fewer, as many.

    Differentiable in ``student_hidden`` and in whatever the student head holds; targets are taken without
    gradient. A chunk takes one projection of the student and one of each `FullTarget` that is asked for, and
    one softmax per distinct temperature of each, whatever the number of measures. When N * V exceeds
    ``chunk_elements`` the rows are taken in chunks of at most that many logits (at least one row), and each
    chunk is computed anew in the backward pass, statistics included. The peak does not depend on N: about 6
    tensors of ``chunk_elements``, and of each measure 2 (the KLs and tvd) to 7 (jsd) more. Below it the one
    chunk is kept.

    Raises AlignmentError where rows, vocabularies or ids do not fit together, and for log-probs that are NaN,
    above 0 or in half precision; ConfigError for a measure that its target cannot serve; and what the
    measures raise.
    """
    with torch.no_grad():
        vocabulary = student_head(student_hidden[:1]).shape[-1]
    rows, size = len(student_hidden), max(1, chunk_elements // vocabulary)
    check_ids("action ids", action_ids, [rows], vocabulary)
    if behaviour is not None:
        check_behaviour(behaviour, [rows])
    for name, target in targets.items():
        check_target(name, target, rows, vocabulary)
    for name, (reference, measure) in measures.items():
        check_measure(name, measure, reference, targets, temperature)
    base = {temperature}
    of_student = base | {measure.temperature_student for _, measure in measures.values()}
    of_targets = {name: _temperatures(name, measures) | (base if statistics else set()) for name in targets}

    def terms(chunk: slice, hidden: Tensor) -> TokenTerms:
        ids = action_ids[chunk]
        log_q = _tempered(student_head(hidden), of_student)
        own = log_q[temperature]
        logprob = of_tokens(own, ids)
        drawn = logprob.detach() if behaviour is None else _drawn(behaviour[chunk], logprob)
        known = {name: _known(target, chunk, of_targets[name]) for name, target in targets.items()}
        divergences = {
            name: _divergence(measure, log_q[measure.temperature_student], known[reference], ids, drawn)
            for name, (reference, measure) in measures.items()
        }
        told = known.items() if statistics else ()
        references = {name: _statistics(own, p, ids, temperature, overlap) for name, p in told}
        return TokenTerms(logprob, entropy(own), divergences, references)

    if rows <= size:
        return terms(slice(None), student_hidden)
    chunks = [slice(start, start + size) for start in range(0, rows, size)]
    # The gradient of a split is one concatenation, that of a slice would be as long as all rows.
    parts = zip(chunks, student_hidden.split(size), strict=True)
    return _joined([checkpoint(terms, chunk, hidden, use_reentrant=False) for chunk, hidden in parts])


def _temperatures(target: str, measures: Mapping[str, tuple[str, Measure]]) -> set[float]:
    """Those at which measures look at a target."""
    return {measure.temperature_teacher for name, measure in measures.values() if name == target}


def _drawn(behaviour: Tensor, logprob: Tensor) -> Tensor:
    """The log-probs that tokens were sampled with; the current ones where there are none."""
    behaviour = behaviour.detach()
    return torch.where(behaviour.isnan(), logprob.detach(), behaviour)


_Known: TypeAlias = dict[float, Tensor] | TopKTarget | SampledTarget
"""A target at the rows of a chunk; all of a distribution as log-probs [n, V] by temperature."""


def _tempered(logits: Tensor, temperatures: Iterable[float]) -> dict[float, Tensor]:
    return {temperature: log_distribution(logits, temperature) for temperature in temperatures}


def _known(target: Target, chunk: slice, temperatures: Set[float]) -> _Known:
    """Without gradient; what nobody asks for is not projected."""
    match target:
        case FullTarget(hidden, head):
            with torch.no_grad():
                return _tempered(head(hidden[chunk]), temperatures) if temperatures else {}
        case TopKTarget(ids, logprobs, sampled):
            return TopKTarget(ids[chunk], logprobs[chunk].detach(), sampled[chunk].detach())
        case SampledTarget(logprob):
            return SampledTarget(logprob[chunk].detach())


def _divergence(
    measure: Measure, log_q: Tensor, target: _Known, action_ids: Tensor, behaviour: Tensor
) -> Tensor:
    """The measure [n] between the student and a target, at its temperatures."""
    match target:
        case TopKTarget(ids, logprobs, sampled) if measure.signal == "teacher_top_k" and measure.k:
            best, places = logprobs.topk(measure.k)
            best_ids = ids.gather(-1, places)
            return measured_top_k(log_q, best_ids, best, sampled, measure, action_ids, behaviour)
        case TopKTarget(sampled=logprob) | SampledTarget(logprob):
            return measured_sampled(of_tokens(log_q, action_ids), logprob, behaviour, measure)
        case _:
            return measured(log_q, target[measure.temperature_teacher], measure, action_ids, behaviour)


@torch.no_grad()
def _statistics(
    log_q: Tensor, target: _Known, action_ids: Tensor, temperature: float, k: int
) -> ReferenceTerms:
    match target:
        case SampledTarget(logprob):
            return ReferenceTerms(logprob, None, None, None)
        case TopKTarget(ids, logprobs, sampled):
            places = logprobs.topk(min(k, ids.shape[-1])).indices
            shared = _overlap(log_q, ids.gather(-1, places)) if k else None
            return ReferenceTerms(sampled, None, None, None, shared)
        case _:
            log_p = target[temperature]
            chosen = of_tokens(log_p, log_q.argmax(-1))
            rank = (log_p > chosen[:, None]).sum(-1)
            return ReferenceTerms(
                of_tokens(log_p, action_ids), total(kl_terms(log_q, log_p)), entropy(log_p), rank,
                _overlap(log_q, log_p.topk(min(k, log_p.shape[-1])).indices) if k else None,
            )  # fmt: skip


def _overlap(log_q: Tensor, ids: Tensor) -> Tensor:
    """Of q's probability on its k most probable tokens the share on those among ``ids`` [n, k]: [n]."""
    best = log_q.topk(ids.shape[-1])
    among = (best.indices[:, :, None] == ids[:, None, :]).any(-1)
    probability = best.values.exp()
    return (probability * among).sum(-1) / probability.sum(-1)


def _joined(chunks: Sequence[TokenTerms]) -> TokenTerms:
    """The terms of all rows, of those of consecutive chunks."""
    divergences, references = chunks[0].divergences, chunks[0].references
    return TokenTerms(
        torch.cat([chunk.logprob for chunk in chunks]),
        torch.cat([chunk.entropy for chunk in chunks]),
        {name: torch.cat([chunk.divergences[name] for chunk in chunks]) for name in divergences},
        {name: _joined_reference([chunk.references[name] for chunk in chunks]) for name in references},
    )


def _joined_reference(chunks: Sequence[ReferenceTerms]) -> ReferenceTerms:
    def joined(parts: list[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known) if known else None

    return ReferenceTerms(
        torch.cat([chunk.logprob for chunk in chunks]),
        joined([chunk.kl for chunk in chunks]),
        joined([chunk.entropy for chunk in chunks]),
        joined([chunk.rank for chunk in chunks]),
        joined([chunk.overlap for chunk in chunks]),
    )
