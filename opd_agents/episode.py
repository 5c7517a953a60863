"""An episode: what is to be rolled out, within which budgets, and its life beside others.

``Live`` is one while it runs. Whatever its environment raises ends only this episode, with ``Outcome.ERROR``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opd_agents.chat import Chat
from opd_agents.envs import AgentEnv, Snapshot
from opd_agents.errors import AlignmentError, ConfigError, OpdError
from opd_agents.hosting import Host, Pending
from opd_agents.policies.base import Action, History
from opd_agents.types import Branch, Message, Outcome, Span, StopReason, Task, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Episode:
    """An episode to be rolled out. With ``start`` it branches off another."""

    uid: str
    env_id: str
    seed: int
    task: Task
    stream: tuple[int, int, int]
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    start: Start | None = None
    demonstration: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """A branch point: the environment is restored to ``saved``, which is after ``turns`` (inherited, weight
    0), its noise drawn afresh from the episode's seed, and takes ``action`` first (None: what the policy does
    there), for which ``context_ids`` and ``starts_segment`` are as in its Turn."""

    saved: Snapshot
    branch: Branch
    turns: tuple[Turn, ...]
    opening: tuple[Message, ...]
    context_ids: tuple[int, ...]
    starts_segment: bool
    action: Action | None


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets; ``max_turns``, ``max_live`` and the time-outs of None leave it to the environment.

    ``step_timeout`` and ``episode_timeout`` are seconds of wall clock that the environment may take for one
    step, and for all of them and the reset together. ``max_live`` is how many environments of one id may live
    at once, ``concurrency`` how many episodes, of whatever environment (None: all).

    ``max_action_tokens`` bounds the ids of all of an episode's actions together, those that a branch inherits
    and those that a rule put there included. An action that is written token by token is cut there; one that
    comes whole, as the expert's do, may exceed it and is then the last.
    """

    max_tokens_per_turn: int = 256
    max_context_tokens: int = 8192
    max_turns: int | None = None
    step_timeout: float | None = None
    max_observation_tokens: int = 2048
    max_action_tokens: int | None = None
    episode_timeout: float | None = None
    max_live: int | None = None
    concurrency: int | None = None

    def action_room(self, turns: Sequence[Turn]) -> int:
        """Tokens that the actions after ``turns`` may still have."""
        most = self.max_action_tokens
        return sys.maxsize if most is None else most - sum(len(turn.action_ids) for turn in turns)


class Live:
    """One episode: made, begun, then stepped until it has an outcome."""

    def __init__(self, episode: Episode, chat: Chat | None, limits: Limits) -> None:
        self.episode, self.chat, self.limits = episode, chat, limits
        self.turns: list[Turn] = []
        self.opening: tuple[Message, ...] = ()
        self.messages: list[Message] = []  # after the opening; kept where the chat renders all of them anew
        self.context: tuple[int, ...] = ()  # ids to append before the next action
        self.starts_segment = True  # the next action does: its context is the whole prompt
        self.ids: tuple[int, ...] = ()
        self.outcome: Outcome | None = None
        self.exhausted: str | None = None
        self.error: str | None = None
        self.digest = ""
        self.host = Host(limits.step_timeout, limits.episode_timeout)

    def make(self, make: Callable[..., AgentEnv]) -> None:
        episode = self.episode
        self._guard(lambda: self.host.make(lambda: make(episode.env_id, **episode.env_kwargs)))

    @property
    def env(self) -> AgentEnv:
        assert self.host.env is not None  # a failure to make it has ended the episode
        return self.host.env

    def begin(self) -> Callable[[], None]:
        """Begin to reset or restore the environment; what is returned waits for it."""
        episode, env = self.episode, self.env
        if (start := episode.start) is not None:
            saved, seed = start.saved, episode.seed
            restoring = self.host.submit(lambda: env.restore(saved, reseed=seed))
            return lambda: self._guard(lambda: self._continue(start, restoring))
        options = {"task_id": episode.task.id, "split": episode.task.split}
        resetting = self.host.submit(lambda: env.reset(seed=episode.seed, options=options))
        return lambda: self._guard(lambda: self._open(resetting))

    def _open(self, resetting: Pending[tuple[str, dict[str, Any]]]) -> None:
        _, info = self.host.result(resetting)
        self.opening = (Message("system", info["system"]), *info["messages"])
        if self.chat:
            self._append(self.chat.prompt_ids(info["messages"], info["tools"], info["system"]))

    def _continue(self, start: Start, restoring: Pending[None]) -> None:
        self.host.result(restoring)
        self.turns, self.opening = list(start.turns), start.opening
        if self.chat and self.chat.history == "template":
            for turn in start.turns:
                self._remember(turn, self.chat)
        self.ids = () if start.starts_segment else segment_ids(self.turns)
        self.starts_segment = start.starts_segment
        self._append(start.context_ids)
        if start.action is not None:
            self._answer(*self._take(start.action))

    def _append(self, ids: tuple[int, ...]) -> None:
        self.context = ids
        self.ids += ids

    def _answered(self, turn: Turn, chat: Chat) -> None:
        """The context of the next action."""
        if chat.history == "append":
            ended, end = _ended(turn.stop_reason), turn.action_ids[-1]
            self._append(chat.suffix_ids(turn.messages, ended=ended, calls=turn.calls, end=end))
            self.starts_segment = False
            return
        self._remember(turn, chat)
        system, *opening = self.opening
        prompt = chat.prompt_ids([*opening, *self.messages], self.env.tools, system.content)
        self.starts_segment = prompt[: len(self.ids)] != self.ids
        self.context = prompt if self.starts_segment else prompt[len(self.ids) :]
        self.ids = prompt

    def _remember(self, turn: Turn, chat: Chat) -> None:
        said = chat.read_message(
            turn.action_ids, ended=_ended(turn.stop_reason), context_ids=turn.context_ids,
            tools=self.env.tools, text_only=self.env.text_only,
        )  # fmt: skip
        self.messages += [said, *turn.messages]

    def history(self) -> History:
        most = min(
            self.limits.max_tokens_per_turn, self.limits.max_context_tokens - len(self.ids),
            self.limits.action_room(self.turns),
        )  # fmt: skip
        episode, ask, turns = self.episode, self.host.call, tuple(self.turns)
        return History(episode.uid, episode.stream, self.ids, self.opening, most, self.env, ask, turns)

    def over_budget(self) -> bool:
        """End the episode as unfinished when no room is left for another action."""
        most = self.limits.max_context_tokens
        if len(self.ids) >= most:
            self.outcome, self.exhausted = Outcome.UNFINISHED, "context"
            if not self.turns:
                self.error = f"the first prompt has {len(self.ids)} tokens, max_context_tokens is {most}"
        elif self.limits.max_turns is not None and len(self.turns) >= self.limits.max_turns:
            self.outcome, self.exhausted = Outcome.UNFINISHED, "turns"
        elif self.limits.action_room(self.turns) <= 0:
            self.outcome, self.exhausted = Outcome.UNFINISHED, "actions"
        return self.outcome is not None

    def step(self, action: Action) -> Callable[[], None]:
        """Begin to take ``action``; what is returned waits for the environment's answer."""
        taken: list[tuple[Said, Pending[_Answer]]] = []
        self._guard(lambda: taken.append(self._take(action)))
        return lambda: self._guard(lambda: self._answer(*taken[0])) if taken else None

    def _take(self, action: Action) -> tuple[Said, Pending[_Answer]]:
        if action.failure is not None:
            raise OpdError(action.failure)
        if action.stop_reason is StopReason.LENGTH:
            if len(self.ids) + len(action.ids) >= self.limits.max_context_tokens:
                action = dataclasses.replace(action, stop_reason=StopReason.CONTEXT)
            elif len(action.ids) >= self.limits.action_room(self.turns):
                action = dataclasses.replace(action, stop_reason=StopReason.ACTIONS)
        after = self.turns[-1].messages[-1:] if self.turns else ()
        env = self.env
        said = read_action(env, self.chat, action, self.context, after=after[0].role if after else "user")
        return said, self.host.submit(lambda: _Answer(env.state_digest(), *env.step(said.to_env)))

    def _answer(self, said: Said, pending: Pending[_Answer]) -> None:
        answer = self.host.result(pending)
        turn = _turn(said, answer, self.chat, self.context, self.starts_segment, self.limits)
        self.turns.append(turn)
        self.ids += turn.action_ids
        if turn.terminated or turn.truncated:
            self.outcome = _outcome(turn, answer.info.get("success", False))
            self.exhausted = "turns" if self.outcome is Outcome.UNFINISHED else None
            if turn.stop_reason is StopReason.ACTIONS and self.outcome is not Outcome.SUCCESS:
                self.outcome, self.exhausted = Outcome.UNFINISHED, "actions"  # the environment judged a piece
        elif self.chat:
            self._answered(turn, self.chat)

    def _guard(self, function: Callable[[], object]) -> None:
        try:
            function()
        except (AlignmentError, ConfigError):
            raise
        except (Exception, SystemExit) as error:  # whatever an environment raises is its episode's data
            self.outcome = Outcome.ERROR
            self.error = self.error or f"{type(error).__name__}: {error}"

    def finish(self, temperature: float) -> Trajectory:
        """Close the environment; returns what the episode was."""
        if self.outcome is not Outcome.ERROR:
            self._guard(self._read_digest)
        self._guard(self.host.close)
        episode = self.episode
        return Trajectory(
            uid=episode.uid, env_id=episode.env_id, env_kwargs=dict(episode.env_kwargs), seed=episode.seed,
            task=episode.task, turns=tuple(self.turns), outcome=self.outcome or Outcome.UNFINISHED,
            reward=sum(turn.reward for turn in self.turns), group=episode.group, temperature=temperature,
            messages=self.opening, branch=episode.start.branch if episode.start else None, error=self.error,
            final_digest=self.digest, exhausted=self.exhausted, demonstration=episode.demonstration,
        )  # fmt: skip

    def _read_digest(self) -> None:
        self.digest = self.host.call(self.env.state_digest)


def _ended(reason: StopReason) -> bool:
    return reason in (StopReason.END, StopReason.NOT_SAMPLED)


def _outcome(last: Turn, succeeded: bool) -> Outcome:
    if succeeded:
        return Outcome.SUCCESS
    return Outcome.FAILURE if last.terminated else Outcome.UNFINISHED


def segment_ids(turns: Sequence[Turn]) -> tuple[int, ...]:
    """All ids of the segment that the last of ``turns`` stands in."""
    start = max((index for index, turn in enumerate(turns) if turn.starts_segment), default=0)
    return tuple(i for turn in turns[start:] for i in (*turn.context_ids, *turn.action_ids))


class Said(NamedTuple):
    """An action as it is recorded, and as the environment gets it."""

    action: Action
    ids: tuple[int, ...]
    text: str
    to_env: str
    error: str | None
    spans: tuple[Span, ...]


class _Answer(NamedTuple):
    """The digest before a step, and what the step gave."""

    digest: str
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


def read_action(
    env: AgentEnv, chat: Chat | None, action: Action, context_ids: tuple[int, ...], *, after: str
) -> Said:
    """``after`` is the role of the message before the action."""
    text = action.text or ""
    if not chat:
        return Said(action, action.ids, text, text, None, ())
    tools, text_only = env.tools, env.text_only
    if action.ids:
        parsed = chat.parse(
            action.ids, ended=_ended(action.stop_reason), context_ids=context_ids, tools=tools,
            forced=action.forced, text_only=text_only,
        )  # fmt: skip
        return Said(action, action.ids, parsed.text, parsed.action, parsed.error, parsed.spans)
    ids = chat.encode_action(text, after=after, tools=tools, text_only=text_only)
    spans = chat.parse(ids, ended=True, context_ids=context_ids, tools=tools, text_only=text_only).spans
    return Said(action, ids, text, text, None, spans)


def _turn(
    said: Said, answer: _Answer, chat: Chat | None, context_ids: tuple[int, ...], starts_segment: bool,
    limits: Limits,
) -> Turn:  # fmt: skip
    action, info, observation = said.action, answer.info, answer.observation
    messages = tuple(info["messages"])
    if chat and (shown := chat.cut(messages, limits.max_observation_tokens)) != messages:
        messages, observation = shown, "\n".join(message.content for message in shown)
    return Turn(
        context_ids=context_ids, action_ids=said.ids, logprobs=action.logprobs, actor=action.actor,
        policy_version=action.policy_version, text=said.text, action=said.to_env, observation=observation,
        reward=float(answer.reward), terminated=answer.terminated, truncated=answer.truncated,
        stop_reason=action.stop_reason, state_digest=answer.digest, calls=info["calls"],
        parse_error=said.error or info["parse_error"], tool_error=info["tool_error"], spans=said.spans,
        starts_segment=starts_segment, messages=messages,
    )  # fmt: skip
