"""Environments x policies -> trajectories. The only place where a failure becomes data.

All episodes of a call advance turn by turn in lock-step: one ``policy.act`` for all that are live, one
``env.step`` each. An environment that raises or exceeds ``step_timeout`` ends its own episode with
``Outcome.ERROR``; the others go on.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from opd_agents.chat import Chat
from opd_agents.envs import AgentEnv
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.policies.base import Action, History, Policy
from opd_agents.types import Branch, Message, Outcome, Span, StopReason, Task, ToolCall, Trajectory, Turn

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Episode:
    """An episode to be rolled out. With ``start`` it branches off a live environment."""

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
    """A branch point: ``env`` stands after ``turns`` (inherited, weight 0) and takes ``action`` first, for
    which ``context_ids`` and ``starts_segment`` are as in its Turn."""

    env: AgentEnv
    branch: Branch
    turns: tuple[Turn, ...]
    opening: tuple[Message, ...]
    context_ids: tuple[int, ...]
    starts_segment: bool
    action: Action


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets; ``max_turns`` and ``step_timeout`` (seconds) of None leave it to the environment.

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

    def action_room(self, turns: Sequence[Turn]) -> int:
        """Tokens that the actions after ``turns`` may still have."""
        most = self.max_action_tokens
        return sys.maxsize if most is None else most - sum(len(turn.action_ids) for turn in turns)


class _Worker:
    """One thread for one environment: a browser's objects must stay in the thread that made them. It is a
    daemon, so that an environment that hangs for ever does not keep the program from ending."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, function: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        self._jobs.put((future, function))
        return future

    def stop(self) -> None:
        """End the thread after the work that it has."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function = job
            try:
                future.set_result(function())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)


class _Live:
    """One running episode."""

    def __init__(
        self, episode: Episode, make: Callable[..., AgentEnv], chat: Chat | None, limits: Limits
    ) -> None:
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
        self.env: AgentEnv = None  # type: ignore[assignment]  # until it is made, which may fail
        self.digest = ""
        self._worker = _Worker() if limits.step_timeout else None
        self._guard(lambda: self._begin(make))

    def _begin(self, make: Callable[..., AgentEnv]) -> None:
        episode = self.episode
        if episode.start is not None:
            self._continue(episode.start)
            return
        self.env = self._call(lambda: make(episode.env_id, **episode.env_kwargs))
        options = {"task_id": episode.task.id, "split": episode.task.split}
        _, info = self._call(lambda: self.env.reset(seed=episode.seed, options=options))
        self.opening = (Message("system", info["system"]), *info["messages"])
        if self.chat:
            self._append(self.chat.prompt_ids(info["messages"], info["tools"], info["system"]))

    def _continue(self, start: Start) -> None:
        self.env, self.turns, self.opening = start.env, list(start.turns), start.opening
        if self.chat and self.chat.history == "template":
            for turn in start.turns:
                self._remember(turn, self.chat)
        self.ids = () if start.starts_segment else segment_ids(self.turns)
        self.starts_segment = start.starts_segment
        self._append(start.context_ids)
        self._step(start.action)

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
        messages = (*self.opening, *(Message("tool", turn.observation) for turn in self.turns))
        return History(self.episode.uid, self.episode.stream, self.ids, messages, most, self.env)

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

    def step(self, action: Action) -> None:
        self._guard(lambda: self._step(action))

    def _step(self, action: Action) -> None:
        if action.stop_reason is StopReason.LENGTH:
            if len(self.ids) + len(action.ids) >= self.limits.max_context_tokens:
                action = dataclasses.replace(action, stop_reason=StopReason.CONTEXT)
            elif len(action.ids) >= self.limits.action_room(self.turns):
                action = dataclasses.replace(action, stop_reason=StopReason.ACTIONS)
        after = self.turns[-1].messages[-1:] if self.turns else ()
        turn, success = execute(
            self.env, self.chat, action, self.context, starts_segment=self.starts_segment,
            after=after[0].role if after else "user", limits=self.limits, call=self._call,
        )  # fmt: skip
        self.turns.append(turn)
        self.ids += turn.action_ids
        if turn.terminated or turn.truncated:
            self.outcome = _outcome(turn, success)
            self.exhausted = "turns" if self.outcome is Outcome.UNFINISHED else None
            if turn.stop_reason is StopReason.ACTIONS and self.outcome is not Outcome.SUCCESS:
                self.outcome, self.exhausted = Outcome.UNFINISHED, "actions"  # the environment judged a piece
        elif self.chat:
            self._answered(turn, self.chat)

    def _call(self, function: Callable[[], R]) -> R:
        if self._worker is None:
            return function()
        future = self._worker.submit(function)
        try:
            return future.result(self.limits.step_timeout)
        except TimeoutError:
            if future.done():  # the environment's own
                raise
            raise TimeoutError(f"no answer within {self.limits.step_timeout} s") from None

    def _guard(self, function: Callable[[], None]) -> None:
        try:
            function()
        except (AlignmentError, ConfigError):
            raise
        except Exception as error:  # the boundary: whatever an environment raises is this episode's data
            self.outcome = Outcome.ERROR
            self.error = self.error or f"{type(error).__name__}: {error}"

    def finish(self, temperature: float) -> Trajectory:
        """Close the environment; returns what the episode was."""
        if self.outcome is not Outcome.ERROR:
            self._guard(self._read_digest)
        if self.env is not None:
            self._guard(self._close)
        if self._worker is not None:
            self._worker.stop()
        episode = self.episode
        return Trajectory(
            uid=episode.uid, env_id=episode.env_id, env_kwargs=dict(episode.env_kwargs), seed=episode.seed,
            task=episode.task, turns=tuple(self.turns), outcome=self.outcome or Outcome.UNFINISHED,
            reward=sum(turn.reward for turn in self.turns), group=episode.group, temperature=temperature,
            messages=self.opening, branch=episode.start.branch if episode.start else None, error=self.error,
            final_digest=self.digest, exhausted=self.exhausted, demonstration=episode.demonstration,
        )  # fmt: skip

    def _read_digest(self) -> None:
        self.digest = self._call(self.env.state_digest)

    def _close(self) -> None:
        if self._worker is not None and self.outcome is Outcome.ERROR:
            self._worker.submit(self.env.close)  # after whatever still hangs there, so it is not waited for
        else:
            self._call(self.env.close)


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


def execute(
    env: AgentEnv,
    chat: Chat | None,
    action: Action,
    context_ids: tuple[int, ...],
    *,
    starts_segment: bool,
    after: str,
    limits: Limits,
    call: Callable[[Callable[[], Any]], Any],
) -> tuple[Turn, bool]:
    """Take one action in ``env``, by ``call``; returns the turn and success. ``after`` is the role of the
    message before the action."""
    ids, error = action.ids, None
    spans: tuple[Span, ...] = ()
    text = to_env = action.text or ""
    if ids and chat:
        parsed = chat.parse(
            ids, ended=_ended(action.stop_reason), context_ids=context_ids, tools=env.tools,
            forced=action.forced, text_only=env.text_only,
        )  # fmt: skip
        text, to_env, error, spans = parsed.text, parsed.action, parsed.error, parsed.spans
    elif chat:
        text_only = env.text_only
        ids = chat.encode_action(to_env, after=after, tools=env.tools, text_only=text_only)
        spans = chat.parse(
            ids, ended=True, context_ids=context_ids, tools=env.tools, text_only=text_only
        ).spans
    digest = call(env.state_digest)
    observation, reward, terminated, truncated, info = call(lambda: env.step(to_env))
    messages = tuple(info["messages"])
    if chat and (shown := chat.cut(messages, limits.max_observation_tokens)) != messages:
        messages, observation = shown, "\n".join(message.content for message in shown)
    turn = Turn(
        context_ids=context_ids, action_ids=ids, logprobs=action.logprobs, actor=action.actor,
        policy_version=action.policy_version, text=text, action=to_env, observation=observation,
        reward=float(reward), terminated=terminated, truncated=truncated, stop_reason=action.stop_reason,
        state_digest=digest, calls=info["calls"], parse_error=error or info["parse_error"],
        tool_error=info["tool_error"], spans=spans, starts_segment=starts_segment, messages=messages,
    )  # fmt: skip
    return turn, info.get("success", False)


def check_conversation(
    episode: Episode, *, make: Callable[..., AgentEnv], chat: Chat, limits: Limits
) -> None:
    """Begin ``episode`` and leave it, to find out before a run what would fail in each of its episodes.

    Raises ConfigError where the chat's template cannot carry this environment's messages or knows no tools,
    or the first prompt leaves no room for an action. An environment that fails is the rollout's matter.
    """
    live = _Live(episode, make, chat, limits)
    try:
        if live.outcome is None:
            chat.suffix_ids([Message("user", "-")], ended=True)
            for tool in live.env.tools[:1]:
                chat.suffix_ids([Message("tool", "-")], ended=True, calls=[ToolCall(tool.name, {})])
            chat.check_tools_shown(live.ids, live.env.tools)
            if live.over_budget() and live.exhausted == "context":
                raise ConfigError(
                    f"Task {episode.task.id!r} of {episode.env_id}: {live.error}. Raise"
                    " rollout.max_context_tokens, shorten the system prompt (chat.system), or leave such"
                    " tasks out."
                )
    finally:
        live.finish(temperature=1.0)


def rollout(
    episodes: Sequence[Episode],
    policy: Policy,
    *,
    make: Callable[..., AgentEnv],
    chat: Chat | None,
    limits: Limits,
    temperature: float,
    on_finished: Callable[[Trajectory], None] = lambda trajectory: None,
) -> list[Trajectory]:
    """Roll out all episodes in lock-step; results in the order given, failed ones included.

    ``temperature`` is recorded with each trajectory. ``on_finished`` is called once per episode as it ends.
    """
    live = [_Live(episode, make, chat, limits) for episode in episodes]
    results: dict[str, Trajectory] = {}
    running = live
    while running:
        for one in running:
            if one.outcome is not None or one.over_budget():
                results[one.episode.uid] = one.finish(temperature)
                on_finished(results[one.episode.uid])
        running = [one for one in running if one.outcome is None]
        for one, action in zip(
            running, policy.act([one.history() for one in running]) if running else [], strict=True
        ):
            one.step(action)
    return [results[episode.uid] for episode in episodes]
