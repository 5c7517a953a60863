"""Two models that write one action: each of its tokens is drawn from a mixture of their distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_agents.policies.base import Action, History
from opd_agents.policies.sampler import TransformersSampler


def log_mixture(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """log((1 - share) q + share p) of log-probs (nats) of one shape, 0 < share < 1; 0-probabilities stay."""
    return torch.logaddexp(log_q + math.log1p(-share), log_p + math.log(share))


class TokenMixture:
    """Acts as ``student`` with the help of ``teacher``: every token is drawn from (1 - share) q + share p, q
    and p what each of the two samples from. The teacher-mixed sampling of MiniLLM (arXiv 2306.08543).

    An action's log-probs are those of the mixture; its actor, version, thinking budget and draws are the
    student's. Both keep their caches in lock-step, and each counts its own FLOPs.
    """

    def __init__(self, student: TransformersSampler, teacher: TransformersSampler, share: float) -> None:
        """Both are of one vocabulary and on one device; 0 < ``share`` < 1."""
        self._sampler, self._share = student, share
        self._student, self._teacher = student.reader, teacher.reader

    def act(self, histories: Sequence[History]) -> list[Action]:
        return self._sampler.act_from(self, histories)

    def begin(self, histories: Sequence[History]) -> Tensor:
        log_q, log_p = self._student.begin(histories), self._teacher.begin(histories)
        return log_mixture(log_q, log_p, self._share)

    def follow(self, tokens: Tensor, alive: Tensor) -> Tensor:
        log_q, log_p = self._student.follow(tokens, alive), self._teacher.follow(tokens, alive)
        return log_mixture(log_q, log_p, self._share)

    def end(self, histories: Sequence[History], actions: Sequence[Action]) -> None:
        self._student.end(histories, actions)
        self._teacher.end(histories, actions)
