"""What may be known of a reference's next-token distributions, and what cannot be used is refused.

An inference server that gives log-probs at ids of the student's choice would be one more type here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives.measures import Measure

Head: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states ``[n, H]`` to logits ``[n, V]``, with the bias, adapter or soft cap that belongs to it."""

SLACK = 1e-3  # nats that rounding may put a log-prob, or that of a top k's mass, above 0


class FullTarget(NamedTuple):
    """All of a reference's next-token distributions at N positions, projected by chunk."""

    hidden: Tensor
    """``[N, Ht]``, the states that predict the action tokens."""
    head: Head


class TopKTarget(NamedTuple):
    """A reference's K most probable tokens at N positions, with their log-probs over its whole vocabulary."""

    ids: Tensor
    """``[N, K]`` integers, all different in a row, in any order."""
    logprobs: Tensor
    """``[N, K]`` nats, at least float32."""
    sampled: Tensor
    """``[N]`` nats, log p(action), whether or not the action token is among the K."""


class SampledTarget(NamedTuple):
    """A reference's log-probs of the action tokens, as any serving API gives them."""

    logprob: Tensor
    """``[N]`` nats, at least float32."""


Target: TypeAlias = FullTarget | TopKTarget | SampledTarget


def check_target(name: str, target: Target, rows: int, vocabulary: int) -> None:
    """Refuse (AlignmentError) a target of other rows or another vocabulary than the student's, ids that a row
    repeats, and log-probs that `check_logprobs` refuses."""
    match target:
        case FullTarget(hidden, head):
            if len(hidden) != rows:
                raise AlignmentError(
                    f"token_terms: {rows} positions of the student but {len(hidden)} of {name!r}; give its "
                    "states at the same positions."
                )
            with torch.no_grad():
                theirs = head(hidden[:1]).shape[-1]
            if theirs != vocabulary:
                raise AlignmentError(
                    f"token_terms: the vocabulary of {name!r} has {theirs} entries, the student's "
                    f"{vocabulary}. A divergence needs the same vocabulary on both sides; use models that "
                    "share their tokenizer."
                )
        case TopKTarget(ids, logprobs, sampled):
            check_ids(f"the top-k ids of {name!r}", ids, [rows, ids.shape[-1]], vocabulary)
            check_logprobs(f"the top-k log-probs of {name!r}", logprobs, ids.shape)
            check_logprobs(f"the mass of the top k of {name!r}", logprobs.logsumexp(-1), [rows])
            check_logprobs(f"the log-probs of {name!r}", sampled, [rows])
            ordered = ids.sort(-1).values
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise AlignmentError(f"token_terms: {name!r} names a token twice among one top k.")
        case SampledTarget(logprob):
            check_logprobs(f"the log-probs of {name!r}", logprob, [rows])


def check_ids(what: str, ids: Tensor, shape: Sequence[int], vocabulary: int) -> None:
    """Refuse (AlignmentError) token ids of another shape, or outside of the vocabulary."""
    _check_shape(what, ids, shape)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise AlignmentError(
            f"token_terms: {what} from {int(ids.min())} to {int(ids.max())} do not fit the student's "
            f"vocabulary of {vocabulary}; are they of another tokenizer, or is padding among them?"
        )


def check_logprobs(what: str, logprobs: Tensor, shape: Sequence[int]) -> None:
    """Refuse (AlignmentError) what cannot be log-probs: another shape, half precision, NaN, above 0."""
    _check_shape(what, logprobs, shape)
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise AlignmentError(
            f"token_terms: {what} are {logprobs.dtype}, whose rounding is of the size of what is learned "
            "from. Take the log-softmax in float32; half-precision logits and hidden states are welcome."
        )
    if not bool((logprobs <= SLACK).all()):
        raise AlignmentError(
            f"token_terms: {what} hold NaN or values above 0, which no log-prob has. Are they logits or "
            "probabilities, or of tokens that were not scored?"
        )


def check_behaviour(behaviour: Tensor, shape: Sequence[int]) -> None:
    """Refuse (AlignmentError) what the tokens cannot have been sampled with; NaN: they were not sampled."""
    check_logprobs("behaviour log-probs", behaviour.masked_fill(behaviour.isnan(), 0.0), shape)
    if bool(behaviour.isinf().any()):
        raise AlignmentError("token_terms: a behaviour log-prob is -inf; such a token is never sampled.")


def check_measure(
    name: str, measure: Measure, reference: str, targets: Mapping[str, Target], temperature: float
) -> None:
    """Refuse (ConfigError) a measure that needs more than is known of its target, whose log-probs, where they
    come ready made, are those of ``temperature``."""
    if reference not in targets:
        known = ", ".join(targets) or "none"
        raise ConfigError(f"{name}: it is measured against {reference!r}, but the targets are: {known}.")
    target = targets[reference]
    if isinstance(target, FullTarget):
        return
    k = target.ids.shape[-1] if isinstance(target, TopKTarget) else 0
    gives = f"its top {k} and the sampled token" if k else "the sampled token"
    if measure.signal != "sampled" and not (k and measure.signal == "teacher_top_k"):
        raise ConfigError(
            f"{name}: signal {measure.signal} needs more of {reference!r} than it gives, the log-probs of "
            f"{gives}. Take a reference that gives hidden states (kind local), or `signal: "
            f"{'teacher_top_k' if k else 'sampled'}`."
        )
    if measure.signal == "teacher_top_k" and measure.k and measure.k > k:
        raise ConfigError(f"{name}: k is {measure.k}, but {reference!r} gives only {gives}.")
    if measure.temperature_teacher != temperature:
        raise ConfigError(
            f"{name}: {reference!r} gives log-probs, at temperature {temperature:g}; bringing them to "
            f"{measure.temperature_teacher:g} takes logits. Leave temperature_teacher out, or take a "
            "reference that gives hidden states (kind local)."
        )


def _check_shape(what: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if list(tensor.shape) != list(shape):
        raise AlignmentError(
            f"token_terms: {what} are {list(tensor.shape)} where {list(shape)} would go with the student's "
            "hidden states, one row for each action token."
        )
