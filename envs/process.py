"""Environments in processes of their own, so that slow ones overlap and a crash stops no other."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from opd_agents.envs import registry
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.snapshots import Snapshot
from opd_agents.envs.workers import Worker, take
from opd_agents.errors import UserError
from opd_agents.types import Task, ToolSpec

MOST = 8 * (os.cpu_count() or 1)  # environments of one id at once, where its class sets no max_live


def _there(name: str) -> Any:
    """An attribute that is read in the other process."""
    return property(lambda env: env._ask(name))


def launch(id: str, *, tasks: str | Path | None = None, **kwargs: Any) -> AgentEnv:
    """As ``make``, but where the environment wants to run: in a process of its own, which it gets when it is
    first asked something, if ``runs_in`` says so. Raises what ``make`` raises, for such a one when asked."""
    cls = registry.env_class(id)
    if cls.runs_in != "process":
        return registry.make(id, tasks=tasks, **kwargs)
    return ProcessEnv(id, kwargs if tasks is None else kwargs | {"tasks": tasks})


class ProcessEnv(AgentEnv):
    """An environment in another process: asked like any other, and answered from there.

    What it raises is raised here; the end of its process is EnvironmentCrashed. Plug-ins are imported there
    as they were here.
    """

    def __init__(self, id: str, kwargs: Mapping[str, Any]) -> None:
        """Raises UserError for a class of the main module, which no other process can import."""
        super().__init__([])
        cls = registry.env_class(id)
        if cls.__module__ == "__main__":
            raise UserError(
                f"{id} runs in a process of its own, which cannot import the program's main module: put "
                f"{cls.__qualname__} into a file of its own and import that."
            )
        self._id, self._kwargs = id, kwargs
        self._process: Worker | None = None
        self._specs: tuple[ToolSpec, ...] | None = None
        self.runs_in, self.max_live = "process", cls.max_live or MOST  # type: ignore[misc]  # of this instance
        self.fork_mode, self.text_only = cls.fork_mode, cls.text_only  # type: ignore[misc]

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._process is None:
            self._make()
        assert self._process is not None
        return self._process.ask(name, *args, **kwargs)

    def _make(self) -> None:
        known = os.getcwd(), registry.imported_plugins(), registry.registration(self._id)
        self._process = process = take()  # known before it is asked, so that abandon() finds it
        try:
            process.ask("make", self._id, self._kwargs, *known)
        except BaseException:
            self._process = None
            process.keep()
            raise
        self._dropped = weakref.finalize(self, process.kill)  # by a program that does not close it

    task = _there("task")
    listed_task = _there("listed_task")
    row = _there("row")
    reset_seed = _there("reset_seed")
    turn = _there("turn")
    over = _there("over")
    has_expert = _there("has_expert")
    max_turns = _there("max_turns")
    split_sizes = _there("split_sizes")
    system_prompt = _there("system_prompt")

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        if self._specs is None:
            self._specs = self._ask("tools")
        return self._specs or ()

    def begin(self, task: Task) -> str:
        return str(self._ask("begin", task))

    def success(self) -> float | bool:
        return float(self._ask("success"))

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        prompt, info = self._ask("reset", seed=seed, options=options)
        self._specs = info["tools"]
        return prompt, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._ask("step", action)
        return observation, reward, terminated, truncated, info

    def state_digest(self) -> str:
        return str(self._ask("state_digest"))

    def expert_action(self) -> str:
        return str(self._ask("expert_action"))

    def snapshot(self) -> Snapshot:
        saved: Snapshot = self._ask("snapshot")
        return saved

    def restore(self, saved: Snapshot, reseed: int | None = None) -> None:
        self._specs = None
        self._ask("restore", saved, reseed)

    def replay(self, actions: Sequence[str], digests: Sequence[str]) -> None:
        self._ask("replay", list(actions), list(digests))

    def spawn(self) -> Self:
        return type(self)(self._id, self._kwargs)

    def close(self) -> None:
        """Close the environment; its process is kept for another, and ended when none has wanted it."""
        process, self._process = self._process, None
        if process is None:
            return
        self._dropped.detach()
        try:
            if process.alive:
                process.ask("close")
        except BaseException:
            process.kill()
            raise
        process.keep()

    def abandon(self) -> None:
        if self._process is not None:
            self._process.kill()
