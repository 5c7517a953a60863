"""Divergences between next-token distributions, over the full vocabulary.

Throughout the package p is the teacher and q the student, in this order of mind and not of arguments:
arguments name the student first. Everything is in nats, in at least float32 and in log space, and
differentiable in the student only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError, UnknownName

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Kind,
    *,
    beta: float = 0.5,
    temperature_student: float = 1.0,
    temperature_teacher: float = 1.0,
) -> Tensor:
    """Divergence per position: ``[..., V], [..., V] -> [...]`` nats, nothing averaged, the teacher detached.

    With q = softmax(student_logits / temperature_student) and p likewise of the teacher:

    - ``forward_kl``: KL(p || q), from teacher to student, mode-covering;
    - ``reverse_kl``: KL(q || p), from student to teacher, mode-seeking; q is differentiated in both places;
    - ``jsd``: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, the generalised
      Jensen-Shannon divergence of GKD (arXiv 2306.13649); m is differentiated through q.

    ``beta`` matters to ``jsd`` only and lies strictly inside (0, 1): JSD(beta) itself goes to 0 at both ends
    (while JSD / beta -> forward KL and JSD / (1 - beta) -> reverse KL), so an end is refused instead of
    silently meaning another divergence of another scale. No T^2 factor is applied.

    float16 and bfloat16 are computed in float32, float64 in float64. A logit of -inf means probability
    exactly 0, on either side, and 0 log 0 = 0. A KL that is infinite, because its first distribution has mass
    where the second has none, is returned as ``inf`` with a gradient of zero at that position (no finite one
    exists): drop such positions or treat them as an error, since 0 * inf is NaN. ``jsd`` is always finite. A
    row of -inf only is no distribution and gives NaN. Rounding may leave values of about -1e-7 in float32
    where p = q.

    Raises AlignmentError where the shapes differ, UnknownName for another kind, ConfigError for beta or a
    temperature out of range.
    """
    check_kind(kind, beta)
    if student_logits.shape != teacher_logits.shape:
        raise AlignmentError(
            f"divergence: student logits {list(student_logits.shape)} and teacher logits "
            f"{list(teacher_logits.shape)} differ in shape. Both must score the same positions over one "
            "vocabulary; check that the two models share their tokenizer."
        )
    log_q = log_distribution(student_logits, temperature_student)
    log_p = log_distribution(teacher_logits.detach(), temperature_teacher)
    return DIVERGENCES[kind](log_q, log_p, beta)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it already is; no copy where nothing changes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature), last axis, in at least float32; ConfigError if T is unusable."""
    if not 0 < temperature < math.inf:
        raise ConfigError(
            f"temperature is {temperature}, but it must be finite and above 0 (1 leaves the logits alone)."
        )
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def entropy(log_q: Tensor) -> Tensor:
    """Entropy in nats: normalised log-probs ``[..., V] -> [...]``, differentiable, with 0 log 0 = 0."""
    return -(log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0.0)).sum(-1)


def check_kind(kind: str, beta: float) -> None:
    """Refuse an unknown kind (UnknownName) and a beta that its kind cannot take (ConfigError)."""
    if kind not in DIVERGENCES:
        raise UnknownName("divergence", kind, DIVERGENCES, "opd_agents.objectives.DIVERGENCES")
    if kind == "jsd" and not 0 < beta < 1:
        raise ConfigError(
            f"jsd: beta is {beta}, but must lie strictly between 0 and 1: JSD(beta) vanishes at both ends. "
            "Use kind forward_kl for the limit beta -> 0 and reverse_kl for beta -> 1."
        )


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of normalised log-probs, -inf allowed in both."""
    absent = log_a == -math.inf
    unmatched = (log_b == -math.inf) & ~absent
    # -inf is replaced before the subtraction: its derivative would be NaN even where a zero multiplies it.
    difference = log_a.masked_fill(absent, 0.0) - log_b.masked_fill(absent | unmatched, 0.0)
    return (log_a.exp() * difference).sum(-1).masked_fill(unmatched.any(-1), math.inf)


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    # Where neither side has mass, logaddexp(-inf, -inf) has a NaN derivative; the value is not used.
    absent = (log_q == -math.inf) & (log_p == -math.inf)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q.masked_fill(absent, 0.0) + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


# Every kind by its name: (student log-probs, detached teacher log-probs, beta), [..., V] -> [...].
DIVERGENCES: Mapping[Kind, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda log_q, log_p, beta: _kl(log_p, log_q),
    "reverse_kl": lambda log_q, log_p, beta: _kl(log_q, log_p),
    "jsd": _jsd,
}
