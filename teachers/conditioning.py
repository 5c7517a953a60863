"""Privileged context: what a teacher is told beyond the student's history.

The context stands in the opening of the conversation alone, so of a prompt one place changes: its ids up to
the end of that place are rendered anew with the context in it, and all ids behind it, the student's actions
among them, stay the student's own, token by token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from opd_agents import envs
from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import Conditioning
from opd_agents.envs import AgentEnv
from opd_agents.episode import Episode, Limits
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.policies.base import Action, ExpertPolicy, History, Policy
from opd_agents.recordings import RECORDED
from opd_agents.rollout import rollout
from opd_agents.types import Message, Outcome, Task, ToolSpec, Trajectory, from_dict, to_json

EXPERT_EPISODES = 4096  # whose actions are remembered


@dataclass(frozen=True, slots=True)
class Edit:
    """A prompt that begins with the ids ``plain`` begins with ``told`` instead; what follows stays."""

    plain: tuple[int, ...]
    told: tuple[int, ...]

    def __call__(self, ids: tuple[int, ...], where: str) -> tuple[int, ...]:
        """Raises AlignmentError for ids that do not begin so."""
        if ids[: len(self.plain)] != self.plain:
            raise AlignmentError(
                f"{where}: the prompt does not begin as the chat renders its opening, so that the teacher's"
                " context cannot be put in. If its template writes the opening otherwise later in a"
                " conversation, take chat.history: append, or another `conditioning.place`."
            )
        return self.told + ids[len(self.plain) :]


class Conditioner:
    """Puts the context of one teacher's ``settings`` into prompts. ``chat`` is the run's; scripted experts
    play within ``limits`` (of turns and time)."""

    def __init__(self, settings: Conditioning, chat: Chat, limits: Limits) -> None:
        self.settings, self.chat = settings, chat
        self._limits = limits
        self._recalled = lru_cache(EXPERT_EPISODES)(self._expert_on)
        self._tools = lru_cache(_tools)

    def condition(self, packed: Packed, trajectories: Sequence[Trajectory]) -> tuple[Packed, Tensor]:
        """The batch as the teacher sees it, and which action tokens are taught (bool [N]).

        The same N action tokens in the same order, in rows whose prompts hold the context. Episodes for which
        no source has any are not taught; their rows stay as they are. Raises AlignmentError where a prompt is
        not what the chat renders.
        """
        contexts = [self._context(one, trajectories) if one.turns else None for one in trajectories]
        return self.tell(packed, trajectories, contexts)

    def tell(
        self, packed: Packed, trajectories: Sequence[Trajectory], contexts: Sequence[str | None]
    ) -> tuple[Packed, Tensor]:
        """The same with these contexts, of each episode; None: there is nothing to tell."""
        rows, shift = list(packed.rows), torch.zeros(len(packed.rows), dtype=torch.int64)
        taught = torch.zeros(len(trajectories), dtype=torch.bool)
        number = 0  # of the row
        for index, (trajectory, context) in enumerate(zip(trajectories, contexts, strict=True)):
            edit = None if context is None else self._edit_of(trajectory, context)
            taught[index] = edit is not None
            for start, _ in trajectory.segments():
                if edit is not None:
                    prompt = trajectory.turns[start].context_ids
                    told = edit(prompt, f"{trajectory.uid}, turn {start}")
                    shift[number] = len(told) - len(prompt)
                    rows[number] = torch.cat([torch.tensor(told), packed.rows[number][len(prompt) :]])
                number += 1
        conditioned = dataclasses.replace(
            packed, rows=tuple(rows), position=packed.position + shift[packed.row]
        )
        return conditioned, taught[packed.episode]

    def told(self, history: History) -> Edit | None:
        """How the prompt of a live episode changes; None where there is nothing to tell."""
        context = self._live_context(history.env)
        if context is None:
            return None
        return self._edit(list(history.opening), history.env.tools, context)

    def check(self, episode: Episode) -> None:
        """Raise ConfigError where the template cannot carry the context into such an episode's prompt."""
        env = envs.make(episode.env_id, **episode.env_kwargs)
        try:
            options = {"task_id": episode.task.id, "split": episode.task.split}
            _, info = env.reset(seed=episode.seed, options=options)
            opening = [Message("system", info["system"]), *info["messages"]]
            self._edit(opening, info["tools"], self.settings.template)
        finally:
            env.close()

    def _context(self, trajectory: Trajectory, others: Sequence[Trajectory]) -> str | None:
        """What the first source that has something says of this episode."""
        for source in self.settings.sources:
            found: str | None
            match source:
                case "text":
                    found = self.settings.text
                case "expert":
                    kwargs = to_json(trajectory.env_kwargs)
                    found = self._recalled(trajectory.env_id, kwargs, trajectory.task, trajectory.seed)
                case "peer":
                    found = _peer(trajectory, others)
                case "feedback":
                    found = _feedback(trajectory)
                case "hindsight":
                    found = trajectory.hint
            if found:
                return self.settings.template.replace("{context}", found)
        return None

    def _live_context(self, env: AgentEnv) -> str | None:
        """The same of an episode that is being played, of which nothing is known yet."""
        for source in self.settings.sources:
            found = None
            if source == "text":
                found = self.settings.text
            elif source == "expert":
                found = self._live_expert(env)
            if found:
                return self.settings.template.replace("{context}", found)
        return None

    def _live_expert(self, env: AgentEnv) -> str | None:
        if env.reset_seed is None:
            raise AlignmentError(
                f"A teacher with the context `expert` acts on {env.listed_task} from a state that no seed"
                " leads to, so the expert cannot play the same episode."
            )
        return _played(env.spawn, env.listed_task, env.reset_seed, self._limits)

    def _expert_on(self, env_id: str, env_kwargs: str, task: Task, seed: int) -> str | None:
        if env_id == RECORDED:
            return None
        return _played(partial(envs.launch, env_id, **json.loads(env_kwargs)), task, seed, self._limits)

    def _edit_of(self, trajectory: Trajectory, context: str) -> Edit:
        tools = self._tools(trajectory.env_id, to_json(trajectory.env_kwargs))
        return self._edit(list(trajectory.messages), tools, context)

    def opening(self, messages: Sequence[Message]) -> list[Message]:
        """Those before the first action, the environment's system prompt among them, as the chat has them."""
        system = "".join(message.content for message in messages[:1] if message.role == "system")
        return self.chat.opening([m for m in messages if m.role != "system"], system)

    def _edit(self, opening: Sequence[Message], tools: Sequence[ToolSpec], context: str) -> Edit:
        """``opening``: the messages before the first action, with the environment's system prompt."""
        messages = self.opening(opening)
        plain = self.chat.written_ids(messages, tools)
        told = self.chat.written_ids(with_context(messages, self.settings.place, context), tools)
        same = 0
        while same < min(len(plain), len(told)) and plain[-1 - same] == told[-1 - same]:
            same += 1  # where the two end alike, the student's ids are the teacher's
        return Edit(plain[: len(plain) - same], told[: len(told) - same])


class ConditionedPolicy:
    """``policy`` with the teacher's context in its prompts. What it writes is recorded behind the history as
    the student has it, without the context."""

    def __init__(self, policy: Policy, conditioner: Conditioner) -> None:
        self._policy, self._conditioner = policy, conditioner
        self._edits: dict[str, Edit | None] = {}  # of the episodes that act, by uid

    def act(self, histories: Sequence[History]) -> list[Action]:
        known = self._edits
        self._edits = {
            h.uid: known[h.uid] if h.uid in known else self._conditioner.told(h) for h in histories
        }
        return self._policy.act([self._conditioned(history) for history in histories])

    def _conditioned(self, history: History) -> History:
        edit = self._edits[history.uid]
        return history if edit is None else dataclasses.replace(history, ids=edit(history.ids, history.uid))


def with_context(messages: Sequence[Message], place: str, context: str) -> list[Message]:
    """``context`` at the end of the system prompt, or of the first user message."""
    told = list(messages)
    index = next((i for i, message in enumerate(told) if message.role == place), None)
    if index is None and place == "system":
        return [Message("system", context), *told]
    if index is None:
        raise ConfigError("conditioning.place: user, but the conversation begins without a user message.")
    content = "\n\n".join(filter(None, (told[index].content, context)))
    told[index] = dataclasses.replace(told[index], content=content)
    return told


def _peer(trajectory: Trajectory, others: Sequence[Trajectory]) -> str | None:
    """The actions of the first other episode of the group that the student played with success."""
    for other in others:
        mates = bool(trajectory.group) and other.group == trajectory.group and other.uid != trajectory.uid
        if mates and other.success and other.branch is None and not other.demonstration:
            return _actions(other)
    return None


def _feedback(trajectory: Trajectory) -> str | None:
    """What the environment last said in an episode that failed."""
    failed = trajectory.outcome in (Outcome.FAILURE, Outcome.UNFINISHED)
    said = (turn.observation for turn in reversed(trajectory.turns) if turn.observation)
    return next(said, None) if failed else None


def _actions(trajectory: Trajectory) -> str:
    return "\n".join(turn.action for turn in trajectory.turns)


def _played(made: Callable[[], AgentEnv], task: Task, seed: int, limits: Limits) -> str | None:
    """The scripted expert's actions, one a line; None where there is none, or it does not succeed."""
    env = made()
    if not env.has_expert:
        env.close()
        return None
    episode = Episode(uid="expert", env_id="", seed=seed, task=task, stream=(0, 0, 0))
    (played,) = rollout(
        [episode], ExpertPolicy(), make=lambda _: env, chat=None, limits=limits, temperature=1.0
    )
    return _actions(played) if played.success else None


def _tools(env_id: str, env_kwargs: str) -> tuple[ToolSpec, ...]:
    """Those that stand in the prompts of an environment, or of a recorded conversation."""
    kwargs = json.loads(env_kwargs)
    if env_id == RECORDED:
        return tuple(from_dict(ToolSpec, tool) for tool in kwargs["tools"])
    env = envs.make(env_id, **kwargs)
    try:
        return env.tools
    finally:
        env.close()
