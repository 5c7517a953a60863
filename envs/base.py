"""AgentEnv: what every environment of tool agents is, and all that its author does not have to write."""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeAlias

import gymnasium
from gymnasium.utils import seeding

from opd_agents.envs.actions import BadAction, parse_action
from opd_agents.envs.snapshots import ForkMode, Recording, Snapshot, pickled
from opd_agents.envs.spaces import AnyText
from opd_agents.envs.task_env import TaskEnv
from opd_agents.errors import (
    EnvironmentContractError,
    NotForkable,
    ReplayDivergence,
)
from opd_agents.tools import Tool, ToolError, to_json
from opd_agents.types import Message, Task, ToolCall, ToolSpec

# main: by the rollout itself, for fast Python; thread: in a thread of its own, so that waiting for a
# container, a server or a browser overlaps; process: in one of its own, for slow Python and what may crash.
RunsIn: TypeAlias = Literal["main", "thread", "process"]
EMPTY = "(empty)"  # an empty answer, as an agent reads it: no message is without content


@dataclass(slots=True)
class _Reply:
    """What one action led to."""

    messages: list[Message] = field(default_factory=list)
    calls: tuple[ToolCall, ...] = ()
    parse_error: str | None = None
    tool_error: str | None = None  # of the first call that failed


class AgentEnv(TaskEnv):
    """A multi-turn environment: text in, text out, tools as JSON calls, forkable.

    An author writes ``system_prompt``, ``split_sizes``, ``begin``, ``success``, keeps all of an episode in
    ``self.state`` (or writes ``get_state`` and ``set_state``, or sets ``fork_mode``), and passes typed
    functions as tools to ``__init__``, which must open nothing heavy. Constructor arguments must be picklable
    values: forks are built from them.

    Action: one call ``{"name": ..., "arguments": {...}}``, a JSON list of calls (run in order, one
    observation), or a text to the user. A bad action costs a turn and is answered with what was wrong. A
    tool refuses by raising ToolError; any other exception of a tool is a bug and reaches the caller.

    The reward is 0 until the episode ends, then the verifier's ``success()``. ``info`` of ``reset``:
    ``task_id``, ``split``, ``messages``, ``system``, ``tools``; of ``step``: ``messages``, ``calls``,
    ``parse_error``, ``tool_error``, and at the end ``success``.
    """

    fork_mode: ClassVar[ForkMode] = "snapshot"
    has_expert: ClassVar[bool] = False
    family: ClassVar[str] = "tools"
    extra: ClassVar[str | None] = None  # the optional dependency group that it needs
    licence: ClassVar[str] = "Apache-2.0"
    runs_in: ClassVar[RunsIn] = "main"  # where a rollout steps it, see RunsIn
    max_live: ClassVar[int | None] = None  # how many may live at once beside each other; None: any number
    text_only: ClassVar[bool] = False  # every action is a text, JSON too: for an environment without tools

    system_prompt: str = ""
    max_turns: int = 32
    state: Any = None  # all of an episode but the task and the generator, set by ``begin``

    def __init__(self, tools: Sequence[Tool | Callable[..., Any]]) -> None:
        made = [tool if isinstance(tool, Tool) else Tool.from_function(tool) for tool in tools]
        self._tools = {tool.spec.name: tool for tool in made}
        if len(self._tools) < len(made):
            names = [tool.spec.name for tool in made]
            raise EnvironmentContractError(
                f"{type(self).__name__} has two tools of one name: {sorted(names)}."
            )
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._reset_seed: int | None = None
        self._turn = 0
        self._over = self._finished = False
        self._noise: list[tuple[int, Mapping[str, Any]]] = []  # these three are a Recording's
        self._actions: list[str] = []  # recorded, as the digests are, when fork_mode is "replay"
        self._digests: list[str] = []

    # ---- what an author writes ----

    @abstractmethod
    def begin(self, task: Task) -> str:
        """Build the task's state and return the user's prompt; random only through ``self.np_random``."""

    @abstractmethod
    def success(self) -> float | bool:
        """The verifier: the final state's score in [0, 1]; an episode succeeded if it is 1."""

    def get_state(self) -> Any:
        """All state of the episode but the task and the generator, picklable. Live objects are fine: the
        base pickles them at once."""
        if self.state is None:
            raise NotForkable(
                f"{type(self).__name__} has nothing in self.state. Keep all of an episode there, set by "
                'begin(), or define get_state() and set_state(), or set fork_mode = "replay" and define '
                'digest_text(), or set fork_mode = "none".'
            )
        return self.state

    def set_state(self, state: Any) -> None:
        """Put back what ``get_state`` returned; ``self.task`` is already set, ``begin`` may not have run."""
        self.state = state

    def digest_text(self) -> str:
        """The state of the world as text, equal for equal states: no generator, no counters."""
        try:
            return json.dumps(self.get_state(), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise EnvironmentContractError(
                f"The state of {type(self).__name__} is no JSON data ({error}): define digest_text()."
            ) from error

    def on_text(self, text: str) -> str:
        """The user's answer to a text; by default a text is the final answer and ends the episode."""
        self.finish()
        return ""

    def expert_action(self) -> str:
        """The scripted expert's next action from the present state (set ``has_expert`` to True)."""
        raise EnvironmentContractError(f"{type(self).__name__} has no scripted expert (has_expert is False).")

    def call(self, call: ToolCall) -> str:
        """Run one call; override to put something before every call, such as a time-out."""
        if call.name not in self._tools:
            near = difflib.get_close_matches(call.name, self._tools, n=1, cutoff=0.4)
            raise ToolError(f"unknown tool {call.name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        return self._tools[call.name](call.arguments)

    def details(self) -> dict[str, Any]:
        """More for ``info``, of ``reset`` and ``step``, such as a screenshot. No policy sees it."""
        return {}

    def finish(self) -> None:
        """Called by a tool or ``on_text``: the episode ends with this action."""
        self._finished = True

    def abandon(self) -> None:
        """Called from another thread when an answer did not come in time and is no longer waited for."""

    # ---- what everyone uses ----

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec for tool in self._tools.values())

    @property
    def reset_seed(self) -> int | None:
        """What the present episode was reset with; None where it was not, or has left its own noise."""
        return self._reset_seed

    @property
    def turn(self) -> int:
        """Actions taken since the reset."""
        return self._turn

    @property
    def over(self) -> bool:
        """Whether the episode has ended."""
        return self._over

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin a task: ``options`` may hold ``task_id`` (default: drawn) and ``split`` (default: the first).

        With a task file ``task_id`` is a row's place in its split, or its field ``id`` if that is no number.
        The task gives the content, the seed the noise. Raises UserError for a task or split that does not
        exist.
        """
        super().reset(seed=seed)
        self._reset_seed = seed
        self._set_task(self._choose_task(dict(options or {})))
        self._noise = [(0, self.np_random.bit_generator.state)]
        prompt = self._begin()
        message = Message("user", prompt)
        return prompt, {
            "task_id": self.listed_task.id,
            "split": self.listed_task.split,
            "messages": [message],
            "system": self.system_prompt,
            "tools": self.tools,
            **self.details(),
        }

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action. Raises gymnasium's ResetNeeded before a reset and after the end."""
        if self._task is None or self._over:
            moment = "before the first reset" if self._task is None else "after the end of the episode"
            raise gymnasium.error.ResetNeeded(f"{type(self).__name__}: step() {moment}; call reset().")
        reply = self._act(action)
        self._turn += 1
        if self.fork_mode == "replay":
            self._actions.append(action)
            self._digests.append(self.state_digest())
        terminated = self._finished
        truncated = not terminated and self._turn >= self.max_turns
        info: dict[str, Any] = {
            "messages": reply.messages,
            "calls": reply.calls,
            "parse_error": reply.parse_error,
            "tool_error": reply.tool_error,
            **self.details(),
        }
        reward = 0.0
        if terminated or truncated:
            self._over = True
            reward = float(self.success())
            if not 0 <= reward <= 1:
                raise EnvironmentContractError(
                    f"success() of {type(self).__name__} gave {reward}, not in [0, 1]."
                )
            info["success"] = reward == 1
        return "\n".join(m.content for m in reply.messages), reward, terminated, truncated, info

    def state_digest(self) -> str:
        """A hash of ``digest_text()``; equal states of equal tasks have equal digests."""
        return hashlib.blake2b(self.digest_text().encode(), digest_size=8).hexdigest()

    def snapshot(self) -> Snapshot:
        """The episode as it stands, as a picklable value. Raises NotForkable if ``fork_mode`` is "none"."""
        self._require_fork_mode()
        state: bytes | Recording
        if self.fork_mode == "replay":
            state = Recording(tuple(self._noise), tuple(self._actions), tuple(self._digests))
        else:
            state = pickled(self.get_state(), type(self).__name__)
        return Snapshot(self.listed_task, self._turn, self._over, self.np_random.bit_generator.state, state)

    def restore(self, saved: Snapshot, reseed: int | None = None) -> None:
        """Go back to ``saved``, taken from this or an equally made environment.

        Without ``reseed`` the noise goes on exactly as it did; with it, it is drawn afresh. Raises
        NotForkable, and ReplayDivergence if replaying leads elsewhere.
        """
        self._require_fork_mode()
        self._reset_seed = None
        self._set_task(saved.task)
        if isinstance(saved.state, Recording):
            self._rerun(saved.state)
        else:
            self.set_state(pickle.loads(saved.state))
        self._turn = saved.turn
        self._over = self._finished = saved.over
        if reseed is None:
            self.np_random.bit_generator.state = saved.rng
        else:
            self.np_random = seeding.np_random(reseed)[0]
            if self.fork_mode == "replay":
                self._noise.append((self._turn, self.np_random.bit_generator.state))

    def replay(self, actions: Sequence[str], digests: Sequence[str]) -> None:
        """Take ``actions`` from the present state; ``digests`` are those expected after each of them.

        Raises ReplayDivergence at the first state that differs.
        """
        for action, digest in zip(actions, digests, strict=True):
            self.step(action)
            self._check_digest(self._turn, digest)

    def fork(self, reseed: int | None = None) -> Self:
        """A new environment at the present state; see ``restore`` for ``reseed``."""
        saved, twin = self.snapshot(), self.spawn()
        try:
            twin.restore(saved, reseed)
        except BaseException:
            twin.close()
            raise
        return twin

    def spawn(self) -> Self:
        """A new environment made with the same arguments, not yet reset."""
        args, kwargs = self._arguments
        twin = type(self)(*args, **kwargs)
        twin.spec = self.spec
        if self.tasks is not None:
            twin.use_tasks(self.tasks)
        return twin

    # ---- inside ----

    def _begin(self) -> str:
        self._turn, self._over, self._finished = 0, False, False
        prompt = self.begin(self.task)
        if self.fork_mode == "replay":
            self._actions, self._digests = [], [self.state_digest()]
        return prompt

    def _rerun(self, recording: Recording) -> None:
        (_, start), *afresh = recording.noise
        self.np_random.bit_generator.state = start
        self._begin()
        self._check_digest(0, recording.digests[0])
        for turn, state in afresh:
            self.replay(recording.actions[self._turn : turn], recording.digests[self._turn + 1 : turn + 1])
            self.np_random.bit_generator.state = state
        self.replay(recording.actions[self._turn :], recording.digests[self._turn + 1 :])
        self._noise = list(recording.noise)

    def _act(self, action: str) -> _Reply:
        if self.text_only:
            return _Reply([Message("user", self.on_text(action))])
        try:
            calls = parse_action(action)
        except BadAction as error:
            return _Reply([Message("user", to_json({"error": str(error)}))], parse_error=str(error))
        if not calls:
            return _Reply([Message("user", self.on_text(action))])
        reply = _Reply(calls=calls)
        for number, call in enumerate(calls):
            try:
                content = self.call(call) or EMPTY
            except ToolError as error:
                reply.tool_error = reply.tool_error or str(error)
                content = to_json({"error": str(error)})
            reply.messages.append(Message("tool", content, tool_call_id=f"call_{self._turn}_{number}"))
            if self._finished:
                break  # nothing can be done any more in an ended episode
        return reply

    def _require_fork_mode(self) -> None:
        if self.fork_mode == "none":
            raise NotForkable(f"{type(self).__name__} cannot be copied or replayed (fork_mode is 'none').")

    def _check_digest(self, turn: int, expected: str) -> None:
        found = self.state_digest()
        if found != expected:
            raise ReplayDivergence(
                f"Replaying {self.task} of {type(self).__name__} led to state {found} after {turn} actions, "
                f"recorded was {expected}: the environment depends on more than its seed, task and actions."
            )
