"""Parts of a measure: estimates from single candidate tokens, and sums over part of a vocabulary.

Log-probs in nats, -inf allowed; every function is differentiable in its first argument wherever it is finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from opd_agents.objectives.divergence import Kind

Estimator = Literal["direct", "per_candidate", "k1", "k2", "k3"]
Ratio = Literal["live", "detached"]

# Which divergence has the expected gradient of an estimator times the ratio q / behaviour, differentiated
# (live) or not. Of the pairs that are missing, detached k1 has an expected gradient of zero and live k2 one
# of nothing.
ESTIMATED: Mapping[tuple[Estimator, Ratio | None], Kind] = {
    ("k1", "live"): "reverse_kl",
    ("k2", "detached"): "reverse_kl",
    ("k3", "live"): "reverse_kl",
    ("k3", "detached"): "forward_kl",
}


def per_candidate(log_q: Tensor, log_p: Tensor, clip: float | None) -> Tensor:
    """-sum_v sg(w(v) A(v)) log q(v), A = log p - log q, w = q / sum q: ``[n, candidates]`` twice ``-> [n]``.

    ``clip`` bounds each -w A from above; ``inf`` without a gradient where one is infinite.
    """
    absent = log_q == -math.inf
    present = log_q.masked_fill(absent, 0.0)
    with torch.no_grad():
        slope = normalised(log_q).exp() * (present - log_p.masked_fill(absent, 0.0))
        if clip is not None:
            slope = slope.clamp(max=clip)
        infinite = slope == math.inf
    value = (slope.masked_fill(infinite, 0.0) * present).sum(-1)
    return value.masked_fill(infinite.any(-1), math.inf)


def estimate(log_r: Tensor, log_s: Tensor, estimator: Estimator, *, live: bool) -> Tensor:
    """k1, k2 or k3 times r ``[n]``, of log r = log(q / behaviour) and log s = log(p / behaviour).

    r is differentiated where ``live``; ``inf`` without a gradient where s = 0 and r is not.
    """
    absent = log_r == -math.inf
    unmatched = (log_s == -math.inf) & ~absent
    d = log_s.masked_fill(absent | unmatched, 0.0) - log_r.masked_fill(absent | unmatched, 0.0)
    log_r = log_r if live else log_r.detach()
    r = log_r.exp()
    if estimator == "k1":
        terms = -r * d
    elif estimator == "k2":
        terms = r * d.square() / 2
    else:
        # r (e^d - 1): expm1 for its accuracy around d = 0, unless it might overflow.
        apart = torch.where(d < 1, r * d.clamp(max=1.0).expm1(), (log_r + d).exp() - r)
        terms = torch.where(absent, log_s.exp(), apart) - r * d
    return terms.masked_fill(unmatched, math.inf)


def of_tokens(log_probs: Tensor, ids: Tensor) -> Tensor:
    """One token's log-prob per row: [n, V], [n] -> [n]."""
    return log_probs.gather(-1, ids[:, None]).squeeze(-1)


def log_sum(log_probs: Tensor) -> Tensor:
    """logsumexp over the last axis, which stays; -inf with a gradient of zero where all are -inf."""
    empty = (log_probs == -math.inf).all(-1, keepdim=True)
    return log_probs.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)


def normalised(log_probs: Tensor) -> Tensor:
    """log-probs that sum to 1 over the last axis; a row without any mass stays -inf."""
    sums = log_sum(log_probs)
    return log_probs - sums.masked_fill(sums == -math.inf, 0.0)


def log_rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log of the mass outside ``ids``: [n, V], [n, k] -> [n].

    Summed over the other tokens: 1 - sum q has no correct digit left, nor has its gradient, where the head
    has nearly all of the mass.
    """
    return log_sum(log_probs.scatter(-1, ids, -math.inf)).squeeze(-1)


def log_rest_of_head(head: Tensor, vocabulary: int) -> Tensor:
    """log(1 - sum exp head): [n, k] -> [n], of a teacher of which no more is known.

    Not below the rounding error of the sum, as a smaller rest is not known; -inf for k = V.
    """
    mass = log_sum(head).squeeze(-1)
    if head.shape[-1] == vocabulary:
        return torch.full_like(mass, -math.inf)
    # log1mexp: each form where it loses no digits.
    mass = mass.clamp(max=-torch.finfo(mass.dtype).eps)
    return torch.where(mass > -math.log(2), (-mass.expm1()).log(), (-mass.exp()).log1p())
