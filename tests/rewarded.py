"""Episodes with rewards in groups, as a paper on policy gradients sees them, and as the engine does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from engine import chosen, engine, experience_of, in_float64, log_probs, moved, plain
from torch import Tensor

from opd_agents.batch import Packed, pack
from opd_agents.config import Component
from opd_agents.experience import Experience
from opd_agents.types import Actor, Branch, Outcome, StopReason, Trajectory

# Of three groups of four: how each episode ended, its reward, and how many of its turns it had. The middle
# group failed, with rewards that differ all the same.
OUTCOMES = "sfus" + "fuff" + "sssf"
REWARDS = [1.0, 0.0, 0.25, 0.75, 0.0, 0.5, 0.0, 0.125, 1.0, 0.5, 0.75, 0.25]
TURNS = [4, 1, 3, 2, 2, 4, 1, 4, 4, 1, 2, 3]
ENDED = {"s": Outcome.SUCCESS, "f": Outcome.FAILURE, "u": Outcome.UNFINISHED}
END = 3  # the token that ends a turn


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    return float((sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) ** 0.5)


def without_own(reward: float, group: Sequence[float]) -> float:
    """The reward over the mean of the others'."""
    return reward - (sum(group) - reward) / (len(group) - 1)


def surrogate(ratio: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """Per token, to be minimised. Some are clipped, and some are not."""
    whole, held = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    assert 0.02 < float((whole > held).double().mean()) < 0.9
    return -torch.minimum(whole, held)


class Seen(NamedTuple):
    """Float64 log-probs [N] of the action tokens: by the student (differentiable), as it was when it sampled,
    by the teacher and by the initial student."""

    packed: Packed
    trajectories: Sequence[Trajectory]
    new: Tensor
    old: Tensor
    teacher: Tensor
    base: Tensor

    @property
    def r(self) -> Tensor:
        return (self.new - self.old).exp()

    @property
    def d(self) -> Tensor:
        return self.teacher - self.old

    @property
    def success(self) -> Tensor:
        return self.per_token([float(t.success) for t in self.trajectories])

    @property
    def group_failed(self) -> Tensor:
        won = {t.group for t in self.trajectories if t.success}
        return self.per_token([float(t.group not in won) for t in self.trajectories])

    @property
    def inside(self) -> Tensor:
        """1, but for the tokens that end a turn."""
        return (self.packed.target != END).double()

    def per_token(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[self.packed.episode]

    def advantage(self, compared: Callable[[float, Sequence[float]], float]) -> Tensor:
        """Of a reward and those of its whole group, itself among them."""
        groups: dict[str, list[float]] = {}
        for t in self.trajectories:
            groups.setdefault(t.group, []).append(t.reward)
        return self.per_token([compared(t.reward, groups[t.group]) for t in self.trajectories])

    @property
    def verified(self) -> Tensor:
        """Standardised in the group."""
        return self.advantage(lambda r, group: (r - mean(group)) / (deviation(group) + 1e-4))

    def episodes(self, values: Tensor) -> list[Tensor]:
        return [values[self.packed.episode == e] for e in range(len(self.trajectories))]

    def turns(self, values: Tensor) -> list[Tensor]:
        return [values[self.packed.turn == number] for number in range(len(self.packed.turns))]


class Rewarded:
    """The models in float64: ``past`` sampled, ``model`` has moved on since; ``judge`` is the teacher,
    ``initial`` another reference, `base`. Models must not be changed."""

    def __init__(self, student: Any, teacher: Any, initial: Any, sampled: Sequence[Trajectory]) -> None:
        self.student = student
        self.past, self.model = in_float64(student), moved(student)
        self.judge, self.initial = in_float64(teacher), in_float64(initial)
        self.episodes = [
            _ended(t, outcome, reward, length)
            for t, outcome, reward, length in zip(sampled, OUTCOMES, REWARDS, TURNS, strict=True)
        ]
        self.repaired, self.shown = _repaired(sampled[3]), _shown(sampled[9])
        self._known: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def experience(self, trajectories: Sequence[Trajectory]) -> Experience:
        references = {"teacher": self.judge, "base": self.initial}
        return self._once(partial(experience_of, self.student, references=references), "seen", trajectories)

    def seen(self, trajectories: Sequence[Trajectory], now: Any = None) -> Seen:
        packed = pack(trajectories)
        fixed = [
            self._once(lambda _, one=one: self._scored(one, packed).detach(), one, trajectories)
            for one in (self.past, self.judge, self.initial)
        ]
        return Seen(packed, trajectories, self._scored(now or self.model, packed), *fixed)

    def plain(self, loss: Tensor) -> tuple[float, Tensor]:
        """Value and gradient of a formula of the model's log-probs."""
        return plain(self.model, loss)

    def trained(
        self, components: Mapping[str, Component], trajectories: Sequence[Trajectory], **options: Any
    ) -> tuple[float, Tensor]:
        """Loss and gradient as the trainer gets them."""
        return engine(self.model, self.experience(trajectories), components, **options)

    def _scored(self, one: Any, packed: Packed) -> Tensor:
        return chosen(log_probs(one, packed), packed)

    def _once(self, made: Callable[..., Any], what: Any, trajectories: Sequence[Trajectory]) -> Any:
        key = (id(what), *map(id, trajectories))
        if key not in self._known:
            self._known[key] = (list(trajectories), made(trajectories))
        return self._known[key][1]


def _ended(sampled: Trajectory, outcome: str, reward: float, length: int) -> Trajectory:
    """As if its last turn had ended it, or a budget had (``u``)."""
    *turns, last = sampled.turns[:length]
    exhausted = "turns" if outcome == "u" else None
    last = dataclasses.replace(last, stop_reason=StopReason.END)
    return dataclasses.replace(
        sampled, turns=(*turns, last), outcome=ENDED[outcome], reward=reward, exhausted=exhausted
    )


def _repaired(sampled: Trajectory) -> Trajectory:
    past, repaired, *rest = sampled.turns
    turns = (dataclasses.replace(past, weight=0.0), dataclasses.replace(repaired, actor=Actor.TEACHER), *rest)
    return dataclasses.replace(
        sampled, uid="r", turns=turns, branch=Branch(sampled.uid, 1), group="", reward=1
    )


def _shown(sampled: Trajectory) -> Trajectory:
    """A demonstration to the group that failed."""
    turns = tuple(dataclasses.replace(one, actor=Actor.TEACHER) for one in sampled.turns[:3])
    return dataclasses.replace(
        sampled, uid="d", turns=turns, group="g1", demonstration=True, outcome=Outcome.SUCCESS, reward=2.0
    )


def unlike(episodes: Sequence[Trajectory], scale: float = 1.2) -> list[Trajectory]:
    """The same, sampled with other probabilities than the trainer's."""
    random = torch.Generator().manual_seed(5)

    def shifted(logprobs: Sequence[float]) -> tuple[float, ...]:
        noise = scale * torch.randn(len(logprobs), generator=random)
        return tuple((torch.tensor(logprobs) + noise).clamp(max=-0.01).tolist())

    return [
        dataclasses.replace(
            t, turns=tuple(dataclasses.replace(one, logprobs=shifted(one.logprobs or ())) for one in t.turns)
        )
        for t in episodes
    ]


def turns_of_both(rewarded: Rewarded) -> list[Trajectory]:
    """Every second turn is the teacher's."""
    return [
        dataclasses.replace(
            t,
            turns=tuple(
                dataclasses.replace(one, actor=Actor.TEACHER, logprobs=None) if number % 2 else one
                for number, one in enumerate(t.turns)
            ),
        )
        for t in rewarded.episodes
    ]
