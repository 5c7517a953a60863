"""A debate of an ensemble's members before they teach (MAD-OPD, arXiv 2605.01347): over a task as the student
was given it, without seeing what the student did. What was said is told to all of them when they score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import Conditioning, Debate
from opd_agents.envs import AgentEnv
from opd_agents.episode import Limits
from opd_agents.policies.base import Action, History, Policy
from opd_agents.recordings import tools_of
from opd_agents.teachers.conditioning import Conditioner, with_context
from opd_agents.types import Message, StopReason, ToolSpec, Trajectory

FIRST = (
    "Do not act yet. Say how you would do this, step by step, and why. End with a line `Confidence: N`, N a"
    " whole number from 0 to 100."
)
AGAIN = (
    "Do not act yet. Experts have debated how to do this:\n\n{said}\n\nYou are {name}, and need not agree"
    " with the others. Think it over, and say how you would do it now. End with a line `Confidence: N`, N a"
    " whole number from 0 to 100."
)
HEARD = "Experts have debated how to do this:\n\n{context}"
Task: TypeAlias = tuple[Sequence[Message], Sequence[ToolSpec]]
"""The messages before the first action, and the tools."""
CONFIDENCE = re.compile(r"confidence:\s*(\d{1,3})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was ``said``, round by round, and the ``confidence`` with which each member ended, 0 to 100; None
    where one of them gave none."""

    said: str
    confidence: tuple[int, ...] | None


class Debaters:
    """Members who debate, by name: how each writes, greedily, so that equal tasks have one debate."""

    def __init__(self, settings: Debate, chat: Chat, members: Mapping[str, Policy], limits: Limits) -> None:
        self.settings, self.chat, self.members = settings, chat, members
        told = Conditioning(sources=["text"], text="", template=HEARD, place="user")
        self.conditioner = Conditioner(told, chat, limits)
        self._held: dict[tuple[int, ...], Transcript] = {}  # by the prompt of the task

    def condition(self, packed: Packed, trajectories: Sequence[Trajectory]) -> tuple[Packed, Tensor]:
        """The batch behind what was said of each episode's task, and the shares of the members in every
        episode: [E, members], rows that sum to 1. Without rounds the batch as it is, and equal shares."""
        held: list[Transcript | None] = [None] * len(trajectories)
        if self.settings.rounds:
            held = self._hold(trajectories)
            contexts = [None if one is None else HEARD.replace("{context}", one.said) for one in held]
            packed, _ = self.conditioner.tell(packed, trajectories, contexts)
        rows = [(one and one.confidence) or (0,) * len(self.members) for one in held]
        confidence = torch.tensor(rows, dtype=torch.float32).view(len(rows), len(self.members))
        return packed, (confidence / 100).softmax(-1)

    def _hold(self, trajectories: Sequence[Trajectory]) -> list[Transcript | None]:
        """The debate of each episode; None of one that has not begun."""
        keys: list[tuple[int, ...] | None] = []
        new: dict[tuple[int, ...], Task] = {}
        for trajectory in trajectories:
            if not trajectory.turns:
                keys.append(None)
                continue
            task = self.conditioner.opening(trajectory.messages), tools_of(trajectory)
            keys.append(key := self.chat.written_ids(*task))
            if key not in self._held:
                new[key] = task
        if new:
            self._held |= dict(zip(new, self._debate(list(new.values())), strict=True))
        return [None if key is None else self._held[key] for key in keys]

    def _debate(self, tasks: Sequence[Task]) -> list[Transcript]:
        said: list[list[str]] = [[] for _ in tasks]
        last: list[Sequence[str]] = []  # of every member, on each task
        for number in range(1, self.settings.rounds + 1):
            last = []
            for name in self.members:
                asked = [AGAIN.format(said="\n\n".join(s), name=name) if s else FIRST for s in said]
                last.append(self._written(tasks, name, asked))
            for index, heard in enumerate(said):
                texts = zip(self.members, last, strict=True)
                heard += [f"{name}, round {number}: {own[index]}" for name, own in texts]
        ends = [[CONFIDENCE.findall(own[index]) for own in last] for index in range(len(tasks))]
        sure = [tuple(min(int(one[-1]), 100) for one in found) if all(found) else None for found in ends]
        return [Transcript("\n\n".join(s), c) for s, c in zip(said, sure, strict=True)]

    def _written(self, tasks: Sequence[Task], name: str, asked: Sequence[str]) -> list[str]:
        """What a member answers when it is ``asked`` about each of the tasks."""
        histories = []
        for (opening, tools), question in zip(tasks, asked, strict=True):
            ids = self.chat.written_ids(with_context(opening, "user", question), tools)
            none = cast(AgentEnv, None)  # nothing is played
            histories.append(History(name, (0, 0, 0), ids, tuple(opening), self.settings.max_tokens, none))
        actions = self.members[name].act(histories)
        return [self._text(*pair) for pair in zip(histories, actions, strict=True)]

    def _text(self, history: History, action: Action) -> str:
        if action.text is not None:
            return action.text
        ended = action.stop_reason is StopReason.END
        return self.chat.parse(action.ids, ended=ended, context_ids=history.ids, text_only=True).content
