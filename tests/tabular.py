"""A tabular policy whose every sequence is enumerated, so that expected gradients are exact; float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_agents.objectives import divergence, reference_advantages, surrogate, token_ratio


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(ours: Tensor, expected: Tensor | list[float], atol: float = 1e-13) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(expected, dtype=ours.dtype), rtol=1e-11, atol=atol)


VOCABULARY, LONGEST = 3, 3  # tokens, of which 0 ends the sequence, as does its third token


class Sequences(NamedTuple):
    """All sequences, one after the other: of each token its state, id and sequence."""

    state: Tensor
    token: Tensor
    episode: Tensor
    states: int

    @property
    def episodes(self) -> int:
        return int(self.episode[-1]) + 1

    def logprob(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[self.state, self.token]

    def summed(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(self.episodes).index_add(0, self.episode, rows)

    def probability(self, logits: Tensor) -> Tensor:
        """Of each sequence [E], differentiable."""
        return self.summed(self.logprob(logits)).exp()

    def expected_gradient(self, loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        """Of the sum over tokens of loss(log-probs), the sequences drawn from the policy itself."""
        logits = logits.detach().requires_grad_()
        total = self.summed(loss(self.logprob(logits))) @ self.probability(logits.detach())
        return torch.autograd.grad(total, logits)[0]


@cache
def sequences() -> Sequences:
    states: dict[tuple[int, ...], int] = {}
    rows: list[tuple[int, int, int]] = []
    finished: list[tuple[int, ...]] = []

    def grow(prefix: tuple[int, ...]) -> None:
        if prefix[-1:] == (0,) or len(prefix) == LONGEST:
            finished.append(prefix)
            return
        states[prefix] = len(states)
        for token in range(VOCABULARY):
            grow((*prefix, token))

    grow(())
    for episode, tokens in enumerate(finished):
        rows += [(states[tokens[:time]], token, episode) for time, token in enumerate(tokens)]
    state, token, episode = torch.tensor(rows).T
    return Sequences(state, token, episode, len(states))


def tables(seed: int, count: int) -> list[Tensor]:
    """Logits [states, 3] of different policies."""
    return [normal(10 * seed + number, sequences().states, VOCABULARY) for number in range(count)]


def sequence_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q || p) of whole sequences, differentiable in the student."""
    probability = sequences().probability(student)
    return (probability * (probability.log() - sequences().probability(teacher).log())).sum()


def gradient_of(value: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(value(logits), logits)[0]


def state_kl_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """Of KL(q || p) at every state, weighted by how often the student visits it, the visits being given."""
    all_ = sequences()
    visits = student.new_zeros(all_.states).index_add(0, all_.state, all_.probability(student)[all_.episode])
    return gradient_of(lambda logits: visits @ divergence(logits, teacher, "reverse_kl"), student)


def reinforce(advantages: Tensor) -> Callable[[Tensor], Tensor]:
    """The on-policy surrogate of these advantages."""
    return lambda logprob: (
        surrogate(token_ratio(logprob, logprob.detach()), advantages, clip_low=0.2, clip_high=0.2).loss
    )


def reference_gradient(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    """Expected gradient of the on-policy surrogate of `reference_advantages`."""
    all_ = sequences()
    d = all_.logprob(teacher) - all_.logprob(student)
    return all_.expected_gradient(reinforce(reference_advantages(d, all_.episode, **settings)), student)
