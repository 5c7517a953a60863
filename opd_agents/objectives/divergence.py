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

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "alpha", "tvd"]


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Kind,
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature_student: float = 1.0,
    temperature_teacher: float = 1.0,
) -> Tensor:
    """Divergence per position: ``[..., V], [..., V] -> [...]`` nats, nothing averaged, the teacher detached.

    With q = softmax(student_logits / temperature_student) and p likewise of the teacher:

    - ``forward_kl``: KL(p || q), from teacher to student, mode-covering;
    - ``reverse_kl``: KL(q || p), from student to teacher, mode-seeking; q is differentiated in both places;
    - ``jsd``: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, the generalised
      Jensen-Shannon divergence of GKD (arXiv 2306.13649);
    - ``skew_kl``: KL(p || alpha p + (1 - alpha) q), and ``skew_reverse_kl``: KL(q || alpha q + (1 - alpha) p)
      (DistiLLM, arXiv 2402.03898), which tend to the two KLs as alpha -> 0 and to 0 as alpha -> 1;
    - ``alpha``: Amari's (1 - sum_v p^alpha q^(1 - alpha)) / (alpha (1 - alpha)), which tends to the reverse
      KL as alpha -> 0 and to the forward KL as alpha -> 1, accurate near both; 4 (1 - sum_v sqrt(p q)), four
      times the squared Hellinger distance, at 1/2;
    - ``tvd``: the total variation sum_v |p - q| / 2, with a gradient of 0 where p(v) = q(v).

    All mixtures are differentiated through q. ``beta`` matters to ``jsd`` only, ``alpha`` to the skew kinds
    and ``alpha`` only, and both lie strictly inside (0, 1): JSD(beta) itself goes to 0 at both ends (while
    JSD / beta -> forward KL and JSD / (1 - beta) -> reverse KL), so an end is refused instead of silently
    meaning another divergence of another scale. No T^2 factor is applied.

    float16 and bfloat16 are computed in float32, float64 in float64. A logit of -inf means probability
    exactly 0, on either side, and 0 log 0 = 0. A KL that is infinite, because its first distribution has mass
    where the second has none, is returned as ``inf`` with a gradient of zero at that position (no finite one
    exists): drop such positions or treat them as an error, since 0 * inf is NaN. The other kinds are always
    finite. A row of -inf only is no distribution and gives NaN. Rounding may leave values of about -1e-7 in
    float32 where p = q.

    Raises AlignmentError where the shapes differ, UnknownName for another kind, ConfigError for beta, alpha
    or a temperature out of range.
    """
    check_kind(kind, beta, alpha)
    if student_logits.shape != teacher_logits.shape:
        raise AlignmentError(
            f"divergence: student logits {list(student_logits.shape)} and teacher logits "
            f"{list(teacher_logits.shape)} differ in shape. Both must score the same positions over one "
            "vocabulary; check that the two models share their tokenizer."
        )
    log_q = log_distribution(student_logits, temperature_student)
    log_p = log_distribution(teacher_logits.detach(), temperature_teacher)
    return total(contributions(log_q, log_p, kind, beta, alpha))


def contributions(log_q: Tensor, log_p: Tensor, kind: Kind, beta: float, alpha: float) -> Tensor:
    """What each candidate token adds to the divergence: log-probs ``[..., V], [..., V] -> [..., V]`` nats.

    The sum over V is `divergence`; a part of V gives a partial sum. One term may be negative in the KLs and
    in ``jsd``; those of ``alpha``, (alpha p + (1 - alpha) q - p^alpha q^(1 - alpha)) / (alpha (1 - alpha)),
    and ``tvd`` never are. ``inf``, with no gradient, where a KL is infinite.

    Every term is homogeneous in (p, q), c(s q, s p) = s c(q, p): subtracting one number from both log-probs
    divides by its exponential without leaving log space.
    """
    return DIVERGENCES[kind](log_q, log_p, beta, alpha)


def total(terms: Tensor) -> Tensor:
    """Sum of `contributions` over the last axis; a row that is infinite has no gradient anywhere."""
    value = terms.sum(-1)
    return value.masked_fill(value == math.inf, math.inf)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it already is; no copy where nothing changes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature), last axis, in at least float32; ConfigError if T is unusable."""
    check_temperature(temperature)
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def entropy(log_q: Tensor) -> Tensor:
    """Entropy in nats: normalised log-probs ``[..., V] -> [...]``, differentiable, with 0 log 0 = 0."""
    return -(log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0.0)).sum(-1)


def check_temperature(temperature: float) -> None:
    """Refuse (ConfigError) what no logits can be divided by."""
    if not 0 < temperature < math.inf:
        raise ConfigError(
            f"temperature is {temperature}, but it must be finite and above 0 (1 leaves the logits alone)."
        )


def check_kind(kind: str, beta: float, alpha: float) -> None:
    """Refuse an unknown kind (UnknownName) and a beta or alpha that its kind cannot take (ConfigError)."""
    if kind not in DIVERGENCES:
        raise UnknownName("divergence", kind, DIVERGENCES, "opd_agents.objectives.DIVERGENCES")
    if kind == "jsd" and not 0 < beta < 1:
        raise ConfigError(
            f"jsd: beta is {beta}, but must lie strictly between 0 and 1: JSD(beta) vanishes at both ends. "
            "Use kind forward_kl for the limit beta -> 0 and reverse_kl for beta -> 1."
        )
    if kind in _ENDS_OF_ALPHA and not 0 < alpha < 1:
        raise ConfigError(
            f"{kind}: alpha is {alpha}, but must lie strictly between 0 and 1. {_ENDS_OF_ALPHA[kind]}"
        )


_ENDS_OF_ALPHA = {
    "skew_kl": "Use kind forward_kl for alpha = 0; at 1 the divergence is 0.",
    "skew_reverse_kl": "Use kind reverse_kl for alpha = 0; at 1 the divergence is 0.",
    "alpha": "Use kind reverse_kl for the limit alpha -> 0 and forward_kl for alpha -> 1.",
}


def kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Terms of KL(a || b) of log-probs, -inf allowed in both."""
    absent = log_a == -math.inf
    unmatched = (log_b == -math.inf) & ~absent
    # -inf is replaced before the subtraction: its derivative would be NaN even where a zero multiplies it.
    difference = log_a.masked_fill(absent, 0.0) - log_b.masked_fill(absent | unmatched, 0.0)
    return (log_a.exp() * difference).masked_fill(unmatched, math.inf)


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), without meaning where neither has mass."""
    # There logaddexp(-inf, -inf) would have a NaN derivative; the value is not used.
    absent = (log_a == -math.inf) & (log_b == -math.inf)
    log_b = log_b.masked_fill(absent, 0.0)
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    log_m = _mixture(log_p, log_q, beta)
    return beta * kl_terms(log_p, log_m) + (1 - beta) * kl_terms(log_q, log_m)


def _alpha(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    if alpha > 0.5:  # the same divergence with the two sides and the two ends exchanged
        return _alpha(log_p, log_q, 1 - alpha)
    absent = (log_q == -math.inf) | (log_p == -math.inf)
    d = alpha * (log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0))
    q = log_q.exp()
    # (p^alpha q^(1 - alpha) - q) / alpha: a difference of near equals for small alpha, so expm1, unless exp
    # might overflow.
    apart = torch.where(d < 1, q * d.clamp(max=1.0).expm1(), (log_q + d).exp() - q).masked_fill(absent, 0.0)
    lost = torch.where(log_p == -math.inf, q, torch.zeros((), dtype=q.dtype, device=q.device))
    return ((log_p.exp() - q) - (apart - lost) / alpha) / (1 - alpha)


# Every kind by its name: (student log-probs, teacher log-probs, beta, alpha) to `contributions`.
DIVERGENCES: Mapping[Kind, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "forward_kl": lambda log_q, log_p, beta, alpha: kl_terms(log_p, log_q),
    "reverse_kl": lambda log_q, log_p, beta, alpha: kl_terms(log_q, log_p),
    "jsd": lambda log_q, log_p, beta, alpha: _jsd(log_q, log_p, beta),
    "skew_kl": lambda log_q, log_p, beta, alpha: kl_terms(log_p, _mixture(log_p, log_q, alpha)),
    "skew_reverse_kl": lambda log_q, log_p, beta, alpha: kl_terms(log_q, _mixture(log_q, log_p, alpha)),
    "alpha": lambda log_q, log_p, beta, alpha: _alpha(log_q, log_p, alpha),
    "tvd": lambda log_q, log_p, beta, alpha: (log_p.exp() - log_q.exp()).abs() / 2,
}
