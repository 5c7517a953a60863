"""Per-token terms from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives.divergence import DIVERGENCES, Kind, check_kind, entropy, log_distribution

Head = Callable[[Tensor], Tensor]
"""Hidden states ``[n, H]`` to logits ``[n, V]``, with the bias, adapter or soft cap that belongs to it."""

CHUNK_ELEMENTS = 2**23  # 32 MiB in float32


class TokenTerms(NamedTuple):
    """Terms of N action tokens, each ``[N]`` in nats, at least float32, differentiable in the student."""

    divergence: Tensor | None
    """Divergence between teacher and student at each position; None where no kind was asked for."""
    logprob: Tensor
    """log q(action), the log-probability of the action token under the student."""
    entropy: Tensor
    """Entropy of the student's distribution."""


def token_terms(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    action_ids: Tensor,
    *,
    kind: Kind | None,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenTerms:
    """Divergence, log-prob and entropy of N action tokens from hidden states.

    Arguments: ``student_hidden [N, Hs]`` and ``teacher_hidden [N, Ht]``, the states that *predict* the action
    tokens (rows gathered by the caller, shifted by one), and ``action_ids [N]`` (integers). Nothing is
    averaged or weighted. All three terms belong to softmax(logits / temperature), ``temperature`` being that
    of the sampler, so that ``logprob`` compares with the log-probs recorded in sampling; the divergence
    applies it to both models. ``kind`` and ``beta`` as in `divergence`; with ``kind=None`` the teacher may be
    None and is not read.

    Differentiable in ``student_hidden`` and in whatever the student head holds; the teacher is run without
    gradient. When N * V exceeds ``chunk_elements`` the rows are taken in chunks of at most that many logits
    (at least one row), and each chunk's logits are computed anew in the backward pass, for one more
    projection of each model: the peak is about ten tensors of ``chunk_elements`` whatever N is. Below it the
    one chunk is kept.

    Raises AlignmentError where rows, vocabularies or ids do not fit together, ConfigError where a kind is
    asked for without a teacher, and what `divergence` raises.
    """
    vocabulary = student_head(student_hidden[:1].detach()).shape[-1]
    _check_rows(student_hidden, action_ids, vocabulary)
    if kind is not None:
        check_kind(kind, beta)
        _check_teacher(kind, len(student_hidden), vocabulary, teacher_hidden, teacher_head)

    def terms(rows: slice) -> TokenTerms:
        log_q = log_distribution(student_head(student_hidden[rows]), temperature)
        distance = None
        if kind is not None and teacher_hidden is not None and teacher_head is not None:
            with torch.no_grad():
                log_p = log_distribution(teacher_head(teacher_hidden[rows]), temperature)
            distance = DIVERGENCES[kind](log_q, log_p, beta)
        return TokenTerms(distance, log_q.gather(-1, action_ids[rows, None]).squeeze(-1), entropy(log_q))

    size = max(1, chunk_elements // vocabulary)
    if len(student_hidden) <= size:
        return terms(slice(None))
    starts = range(0, len(student_hidden), size)
    chunks = [checkpoint(terms, slice(start, start + size), use_reentrant=False) for start in starts]
    return TokenTerms(
        None if kind is None else torch.cat([chunk.divergence for chunk in chunks]),
        torch.cat([chunk.logprob for chunk in chunks]),
        torch.cat([chunk.entropy for chunk in chunks]),
    )


def _check_rows(student_hidden: Tensor, action_ids: Tensor, vocabulary: int) -> None:
    if action_ids.shape != student_hidden.shape[:1]:
        raise AlignmentError(
            f"token_terms: {list(student_hidden.shape)} hidden states need as many action ids, "
            f"not {list(action_ids.shape)}."
        )
    if action_ids.numel() and not 0 <= int(action_ids.min()) <= int(action_ids.max()) < vocabulary:
        raise AlignmentError(
            f"token_terms: action ids from {int(action_ids.min())} to {int(action_ids.max())} do not fit the "
            f"student's vocabulary of {vocabulary}; are they of another tokenizer, or is padding among them?"
        )


def _check_teacher(
    kind: str, rows: int, vocabulary: int, teacher_hidden: Tensor | None, teacher_head: Head | None
) -> None:
    if teacher_hidden is None or teacher_head is None:
        raise ConfigError(
            f"{kind} needs the teacher's hidden states and head, but got none. Use a teacher that gives "
            "them, or leave the divergence out."
        )
    if len(teacher_hidden) != rows:
        raise AlignmentError(
            f"token_terms: {rows} positions of the student but {len(teacher_hidden)} of the teacher; "
            "give the teacher's states at the same positions."
        )
    with torch.no_grad():
        theirs = teacher_head(teacher_hidden[:1]).shape[-1]
    if theirs != vocabulary:
        raise AlignmentError(
            f"token_terms: the teacher's vocabulary has {theirs} entries, the student's {vocabulary}. "
            "A divergence needs the same vocabulary on both sides; use models that share their tokenizer."
        )
