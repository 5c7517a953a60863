"""Measures of small distributions, and what they are in expectation, exactly; float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from opd_agents.objectives import Kind, Measure
from opd_agents.objectives.measures import measured, measured_top_k

INF = math.inf
N, V = 3, 7
KINDS: dict[Kind, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "alpha": {"alpha": 0.7},
    "tvd": {},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
Score: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log q [n, V], action ids [n], behaviour [n] -> [n]."""


def normal(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = normal(0, N, V), normal(1, N, V)
LOG_P = TEACHER.log_softmax(-1)
SAMPLER = (STUDENT + normal(2, N, V, scale=0.3)).log_softmax(-1)  # an older student
ANY = torch.zeros(N, dtype=torch.int64)


def value_and_gradient(score: Callable[[Tensor], Tensor], logits: Tensor = STUDENT) -> tuple[Tensor, Tensor]:
    """Of the score [n] of log q; the gradient is in the student's logits."""
    logits = logits.clone().requires_grad_()
    value = score(logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def of(measure: Measure, log_p: Tensor = LOG_P) -> Score:
    return lambda log_q, ids, behaviour: measured(log_q, log_p, measure, ids, behaviour)


def of_top_k(measure: Measure) -> Score:
    """The same where only the teacher's top k is known."""
    best, ids = LOG_P.topk(measure.k or 1)

    def score(log_q: Tensor, action_ids: Tensor, behaviour: Tensor) -> Tensor:
        sampled = LOG_P.gather(-1, action_ids[:, None]).squeeze(-1)
        return measured_top_k(log_q, ids, best, sampled, measure, action_ids, behaviour)

    return score


def anywhere(score: Score) -> Callable[[Tensor], Tensor]:
    """A score that looks at no action token."""
    return lambda log_q: score(log_q, ANY, SAMPLER[:, 0])


def expectation(score: Score) -> Callable[[Tensor], Tensor]:
    """Exactly, over an action token that the sampler draws."""

    def expected(log_q: Tensor) -> Tensor:
        values = [
            SAMPLER[:, token].exp() * score(log_q, torch.full((N,), token), SAMPLER[:, token])
            for token in range(V)
        ]
        return torch.stack(values).sum(0)

    return expected


def full(kind: Kind, **options: Any) -> tuple[Tensor, Tensor]:
    return value_and_gradient(anywhere(of(Measure(kind, **KINDS[kind], **options))))


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def slope(weights: Tensor) -> Tensor:
    """The gradient of sum_v weights(v) log q(v) in the logits."""
    return weights - STUDENT.softmax(-1) * weights.sum(-1, keepdim=True)
