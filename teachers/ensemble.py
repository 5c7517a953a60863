"""Several teachers as one: their distributions mixed in probability space, with weights by episode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from opd_agents.config import Ensemble
from opd_agents.policies.base import Action, History, Policy
from opd_agents.teachers.base import (
    SERVES,
    Capability,
    HiddenStates,
    SampledLogprobs,
    Teacher,
    TeacherSignal,
)
from opd_agents.teachers.log_probs import log_probs
from opd_agents.types import Task, Trajectory

DRAW = 2  # the purpose of the random numbers that choose who acts


class EnsembleTeacher(Teacher):
    """The ``members`` of ``settings``, by name. Each scores for itself where it has a weight, and what they
    say is made one signal by :meth:`mixed`, at the run's ``temperature``. A turn is taken by a member that
    is drawn by weight; ``greedy`` asks the one with the largest."""

    can: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.HIDDEN_STATES, Capability.SAMPLED_LOGPROBS, Capability.ACT}
    )

    def __init__(self, settings: Ensemble, members: Mapping[str, Teacher], temperature: float) -> None:
        self.settings, self.members, self.temperature = settings, members, temperature
        acting = {name: one for name, one in members.items() if Capability.ACT in one.can}
        self._acts = Chosen(self._drawn, acting)
        self._acts_best = Chosen(self._heaviest, {name: one.greedy for name, one in acting.items()})

    @property
    def greedy(self) -> Policy:
        return self._acts_best

    @property
    def tokens(self) -> int:
        return sum(member.tokens for member in self.members.values())

    @property
    def flops(self) -> int | None:
        known = [member.flops for member in self.members.values()]
        return None if None in known else sum(one or 0 for one in known)

    def act(self, histories: Sequence[History]) -> list[Action]:
        return self._acts.act(histories)

    def weights(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Of every member, in their order, in every episode: [E, members], rows that sum to 1."""
        rows = [self._weights(one.env_id, one.task) for one in trajectories]
        return torch.tensor(rows).view(len(rows), len(self.members))

    def mixed(
        self, signals: Mapping[str, TeacherSignal], weights: Tensor, target: Tensor
    ) -> HiddenStates | SampledLogprobs:
        """log sum_i w_i p_i of the members' ``signals``; ``weights`` [N, members], of rows without any the
        values mean nothing, but are finite; ``target`` [N]. Of whole distributions where all members tell
        them, else of the action tokens ``target`` [N]."""
        shares = torch.where(weights.sum(-1, keepdim=True) > 0, weights, torch.ones(()))
        logs = (shares / shares.sum(-1, keepdim=True)).log()
        whole = [signal for signal in signals.values() if isinstance(signal, HiddenStates)]
        if len(whole) == len(signals):
            head = MixtureHead(
                tuple(one.head for one in whole), tuple(one.hidden.shape[-1] for one in whole),
                tuple(one.hidden.dtype for one in whole), self.temperature,
            )  # fmt: skip
            # half-precision states stay what they are in float32, and go back before they are projected
            return HiddenStates(torch.cat([*(one.hidden for one in whole), logs], -1), head)
        each = [log_probs(one, target, self.temperature)["logprobs"] for one in signals.values()]
        return SampledLogprobs((torch.stack(each, -1) + logs).logsumexp(-1))

    def _weights(self, env_id: str, task: Task) -> list[float]:
        settings = self.settings
        found = settings.weights or dict.fromkeys(settings.members, 1.0)
        for route in settings.routes:
            if fnmatchcase(env_id, route.environment) and fnmatchcase(task.id, route.task):
                found = route.weights
                break
        total = sum(found.values())
        return [found.get(name, 0.0) / total for name in self.members]

    def _of(self, history: History) -> list[float]:
        spec = history.env.spec
        return self._weights(spec.id if spec else "", history.env.task)

    def _drawn(self, history: History) -> str:
        edges = np.cumsum(self._of(history))
        place = np.searchsorted(edges, history.random(purpose=DRAW).random() * edges[-1], "right")
        return list(self.members)[int(place)]

    def _heaviest(self, history: History) -> str:
        return max(zip(self._of(history), self.members, strict=True), key=lambda pair: pair[0])[1]


def together(capabilities: Iterable[frozenset[Capability]]) -> frozenset[Capability]:
    """What an ensemble can whose members can this: give distributions or log-probs, and act, if all do."""
    members = list(capabilities)
    found = {Capability.HIDDEN_STATES, Capability.ACT}.intersection(*members)
    if Capability.HIDDEN_STATES not in found and all(can & SERVES["sampled"] for can in members):
        found.add(Capability.SAMPLED_LOGPROBS)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class MixtureHead:
    """From the members' hidden states and log-weights side by side, [..., sum of widths + members], to logits
    [..., V] whose softmax at ``temperature`` is the mixture of the members' distributions there."""

    heads: tuple[Callable[[Tensor], Tensor], ...]
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    temperature: float

    def __call__(self, hidden: Tensor) -> Tensor:
        *states, logs = hidden.split([*self.widths, len(self.heads)], -1)
        total: Tensor | None = None  # one member after the other: two distributions at once are in memory
        for index, (state, head, dtype) in enumerate(zip(states, self.heads, self.dtypes, strict=True)):
            logits = head(state.to(dtype))
            own = (logits if logits.dtype is torch.float64 else logits.float()) / self.temperature
            own = own.log_softmax(-1) + logs[..., index : index + 1]
            total = own if total is None else torch.logaddexp(total, own)
        assert total is not None  # there are members
        return total * self.temperature


class Chosen:
    """A policy that lets one of several act: the one that ``choose`` names for an episode's turn."""

    def __init__(self, choose: Callable[[History], str], policies: Mapping[str, Policy]) -> None:
        self._choose, self._policies = choose, policies

    def act(self, histories: Sequence[History]) -> list[Action]:
        names = [self._choose(history) for history in histories]
        actions: dict[int, Action] = {}
        for name, policy in self._policies.items():
            places = [place for place, chosen in enumerate(names) if chosen == name]
            if places:
                acted = policy.act([histories[place] for place in places])
                actions |= dict(zip(places, acted, strict=True))
        return [actions[place] for place in range(len(histories))]
