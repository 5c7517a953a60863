"""Environments in processes of their own, so that slow ones overlap and a crash stops no other."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from opd_agents.envs import registry
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.snapshots import Snapshot
from opd_agents.errors import EnvironmentCrashed, OpdError, UserError
from opd_agents.types import Task, ToolSpec

SPARE = os.cpu_count() or 1  # processes kept for the next episodes
POLL = 1.0  # seconds between a process's looks at whether the program that it serves still lives


def launch(id: str, *, tasks: str | Path | None = None, **kwargs: Any) -> AgentEnv:
    """As ``make``, but where the environment wants to run: in a process of its own, which it gets when it is
    first asked something, if ``runs_in`` says so. Raises what ``make`` raises, for such a one when asked."""
    cls = registry.env_class(id)
    if cls.runs_in != "process":
        return registry.make(id, tasks=tasks, **kwargs)
    return ProcessEnv(id, kwargs if tasks is None else kwargs | {"tasks": str(tasks)})


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
        self._process: _Process | None = None
        self._specs: tuple[ToolSpec, ...] | None = None
        self.runs_in, self.max_live = "process", cls.max_live  # type: ignore[misc]  # of the class behind it
        self.fork_mode, self.text_only = cls.fork_mode, cls.text_only  # type: ignore[misc]

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._process is None:
            self._process = _taken()
            known = registry.imported_plugins(), registry.registration(self._id)
            self._process.ask("make", self._id, self._kwargs, *known)
        return self._process.ask(name, *args, **kwargs)

    def begin(self, task: Task) -> str:
        return str(self._ask("begin", task))

    def success(self) -> float | bool:
        return float(self._ask("success"))

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        if self._specs is None:
            self._specs = self._ask("tools")
        return self._specs or ()

    @property
    def task(self) -> Task:
        task: Task = self._ask("task")
        return task

    @property
    def listed_task(self) -> Task:
        task: Task = self._ask("listed_task")
        return task

    @property
    def turn(self) -> int:
        return int(self._ask("turn"))

    @property
    def over(self) -> bool:
        return bool(self._ask("over"))

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        prompt, info = self._ask("reset", seed=seed, options=options)
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
        self._ask("restore", saved, reseed)

    def replay(self, actions: Sequence[str], digests: Sequence[str]) -> None:
        self._ask("replay", list(actions), list(digests))

    def spawn(self) -> Self:
        return type(self)(self._id, self._kwargs)

    def close(self) -> None:
        """Close the environment; its process is kept for another, or ended where there are enough."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.ask("close")
        except BaseException:
            process.kill()
            raise
        if len(_idle) < SPARE:
            _idle.append(process)
        else:
            process.kill()

    def abandon(self) -> None:
        if self._process is not None:
            self._process.kill()


class _Process:
    """A Python process that holds one environment at a time.

    It leads a process group, so that what the environment has started ends with it; it ends itself when the
    program does, however that ends.
    """

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        code = f"from opd_agents.envs.process import serve; serve({theirs.fileno()}, {os.getpid()})"
        self._popen = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            start_new_session=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        theirs.close()
        _started.add(self)

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Raises what is raised there, and EnvironmentCrashed."""
        try:
            self._connection.send((name, args, kwargs))
            worked, value = self._connection.recv()
        except (EOFError, OSError):
            self.kill()
            status = self._popen.returncode
            problem = f"the environment's process ended (exit status {status}) when asked for {name}"
            raise EnvironmentCrashed(problem) from None
        if not worked:
            raise value
        return value

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        _started.discard(self)


_idle: list[_Process] = []
_started: set[_Process] = set()


def _taken() -> _Process:
    try:
        return _idle.pop()
    except IndexError:  # not asked before: other threads take some, too
        return _Process()


@atexit.register
def _kill_all() -> None:
    for process in list(_started):
        process.kill()


def serve(descriptor: int, parent: int) -> None:
    """What such a process does: answer until the program that started it is gone."""
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    connection, env = Connection(descriptor), None
    while True:
        try:
            name, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        try:
            value: Any = None
            if name == "make":
                env = _made(*args)
            else:
                found = getattr(env, name)
                value = found(*args, **kwargs) if callable(found) else found
            answer = pickle.dumps((True, value))
        except Exception as error:
            answer = _told(error)
        connection.send_bytes(answer)


def _made(
    id: str, kwargs: Mapping[str, Any], plugins: Sequence[str], registered: tuple[str, Mapping[str, Any]]
) -> AgentEnv:
    registry.import_plugins(plugins)
    if id not in registry.list_envs():  # by a program, not by a plug-in
        registry.register(id, registered[0], **registered[1])
    return registry.make(id, **kwargs)


def _told(error: Exception) -> bytes:
    """The error for the other side; one that cannot travel is told by its text."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:
        answer = pickle.dumps((False, OpdError(f"{type(error).__name__}: {error}")))
    return answer


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os.killpg(0, signal.SIGKILL)
