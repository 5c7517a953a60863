"""Divergences with their gradients in closed form, for log-probs of finite numbers.

`divergence` states the kinds and is differentiated by autograd; here the same value comes with its slope in
the student's log-probs, from arrays that are few and worked on in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.linalg import vecdot

from opd_agents.objectives.divergence import Kind


class Pair(NamedTuple):
    """Both distributions at n positions, [n, V] each; log-probs are finite also where a probability is 0."""

    log_q: Tensor
    log_p: Tensor
    q: Tensor
    p: Tensor


Sloped: TypeAlias = tuple[Tensor, Tensor]
"""Divergences [n], and their slopes dD/d(log q) [n, V] less any multiple of q, which does nothing through a
softmax: dD/dz_v = s_v - q_v sum_u s_u."""


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """share a + (1 - share) b, above 0: where it underflows, so does what it is compared with."""
    return (a * share).add_(b, alpha=1 - share).clamp_min_(torch.finfo(a.dtype).tiny)


def _forward_kl(of: Pair) -> Sloped:
    return vecdot(of.p, of.log_p - of.log_q), -of.p


def _reverse_kl(of: Pair) -> Sloped:
    slope = (of.log_q - of.log_p).mul_(of.q)
    return slope.sum(-1), slope


def _jsd(of: Pair, beta: float) -> Sloped:
    log_m = _mixture(of.p, of.q, beta).log_()
    slope = (of.log_q - log_m).mul_(of.q).mul_(1 - beta)
    return slope.sum(-1).add_(vecdot(of.p, of.log_p - log_m), alpha=beta), slope


def _skew_kl(of: Pair, alpha: float) -> Sloped:
    m = _mixture(of.p, of.q, alpha)
    slope = (of.q / m).mul_(of.p).mul_(alpha - 1)
    return vecdot(of.p, of.log_p - m.log_()), slope


def _skew_reverse_kl(of: Pair, alpha: float) -> Sloped:
    m = _mixture(of.q, of.p, alpha)
    share = of.q / m
    slope = (of.log_q - m.log_()).mul_(of.q)
    return slope.sum(-1), slope.addcmul_(of.q, share, value=-alpha)


def _alpha(of: Pair, alpha: float) -> Sloped:
    """By the nearer end, where the difference is not one of near equals."""
    apart = of.q - of.p
    if alpha > 0.5:
        moved = _moved(of.log_p, of.log_q, 1 - alpha)
        return (apart - moved / (1 - alpha)).sum(-1) / alpha, (apart - moved).div_(alpha)
    moved = _moved(of.log_q, of.log_p, alpha).div_(alpha)
    return -(apart + moved).sum(-1) / (1 - alpha), -moved


def _moved(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """a^(1 - share) b^share - a, by expm1 unless exp might overflow."""
    exponent, a = (log_b - log_a).mul_(share), log_a.exp()
    near = exponent.clamp(max=1.0).expm1_().mul_(a)
    return torch.where(exponent < 1, near, (log_a + exponent).exp_().sub_(a))


def _tvd(of: Pair) -> Sloped:
    apart = of.q - of.p
    return apart.abs().sum(-1) / 2, apart.sign_().mul_(of.q).div_(2)


# Every kind by its name, as in `DIVERGENCES`, of (pair, beta, alpha).
SLOPES: Mapping[Kind, Callable[[Pair, float, float], Sloped]] = {
    "forward_kl": lambda of, beta, alpha: _forward_kl(of),
    "reverse_kl": lambda of, beta, alpha: _reverse_kl(of),
    "jsd": lambda of, beta, alpha: _jsd(of, beta),
    "skew_kl": lambda of, beta, alpha: _skew_kl(of, alpha),
    "skew_reverse_kl": lambda of, beta, alpha: _skew_reverse_kl(of, alpha),
    "alpha": lambda of, beta, alpha: _alpha(of, alpha),
    "tvd": lambda of, beta, alpha: _tvd(of),
}
