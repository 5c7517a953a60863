"""Processes that hold an environment each: started by need, kept for the next one, ended with the program."""

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
from typing import Any

from opd_agents.envs import registry
from opd_agents.envs.base import AgentEnv
from opd_agents.errors import EnvironmentCrashed, OpdError

KEPT = 60.0  # seconds for which one waits for another environment: the next rollout has as many
POLL = 1.0  # seconds between looks at whether the other side still lives


class Worker:
    """A Python process that holds one environment at a time.

    It leads a process group, so that what the environment has started ends with it; it ends itself when the
    program does, however that ends.
    """

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        path = [str(place) or os.getcwd() for place in sys.path]
        code = (
            f"import sys; sys.path[:] = {path!r}; from opd_agents.envs.workers import serve; "
            f"serve({theirs.fileno()}, {os.getpid()})"
        )
        # -P: nothing in the present folder may hide a module; -u: nothing that is printed gets lost
        self._popen = subprocess.Popen(
            [sys.executable, "-Pu", "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.since = time.monotonic()  # when it was closed last
        _started.add(self)

    @property
    def alive(self) -> bool:
        """Whether it can be asked, by this program; not by a fork of it, which shares the line."""
        return self in _started and self._popen.poll() is None

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Raises what is raised there, and EnvironmentCrashed."""
        request = pickle.dumps((name, args, kwargs))
        try:
            if self not in _started:
                raise EOFError
            self._connection.send_bytes(request)
            while not self._connection.poll(POLL):  # a child that a dead process leaves behind holds its line
                if self._popen.poll() is not None and not self._connection.poll():
                    raise EOFError
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            self.kill()
            status = self._popen.returncode
            problem = f"the environment's process ended (exit status {status}) when asked for {name}"
            raise EnvironmentCrashed(problem) from None
        except BaseException:  # an interrupt: the answer that is still to come is nobody's
            self.kill()
            raise
        worked, value = pickle.loads(answer)
        if not worked:
            raise value
        return value

    def keep(self) -> None:
        """For another environment."""
        if self.alive:
            self.since = time.monotonic()
            _idle.append(self)
        else:
            self.kill()
        _end_unused()

    def kill(self) -> None:
        """End it, and all that it has started. May be called twice."""
        if self in _started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        _started.discard(self)


_idle: list[Worker] = []
_started: set[Worker] = set()


def take() -> Worker:
    while _idle:
        with contextlib.suppress(IndexError):  # other threads take some, too
            process = _idle.pop()
            if process.alive:
                return process
            process.kill()  # what it has left behind
    return Worker()


def _forget_all() -> None:
    """In a fork of the program: they answer the program itself."""
    _idle.clear()
    _started.clear()


os.register_at_fork(after_in_child=_forget_all)


def _end_unused() -> None:
    """The last closed are taken first: those that wait for long were needed by a larger rollout."""
    for process in list(_idle):
        if time.monotonic() - process.since > KEPT:
            with contextlib.suppress(ValueError):  # another thread has just taken it
                _idle.remove(process)
                process.kill()


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
                env = None  # if it fails, nothing answers in its place
                env = _made(*args)
            else:
                found = getattr(env, name)
                value = found(*args, **kwargs) if callable(found) else found
            answer = pickle.dumps((True, value))
        except (Exception, SystemExit) as error:
            answer = _told(error)
        connection.send_bytes(answer)


def _made(
    id: str,
    kwargs: Mapping[str, Any],
    folder: str,
    plugins: Sequence[str],
    registered: tuple[str, Mapping[str, Any]],
) -> AgentEnv:
    os.chdir(folder)  # arguments may name files
    registry.import_plugins(plugins)
    if id not in registry.list_envs() or registry.registration(id) != registered:
        # by a program, not by a plug-in
        registry.register(id, registered[0], **registered[1])
    return registry.make(id, **kwargs)


def _told(error: BaseException) -> bytes:
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
