"""Where an environment of a rollout runs: in the caller's thread, or in one of its own beside the others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from opd_agents.envs import AgentEnv

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Pending(Generic[R]):
    """A call under way: what it will give, with the seconds that it took, and when it was asked for."""

    future: Future[tuple[R, float]]
    since: float


class Host:
    """One environment, and the thread that it has, if it has one.

    The environment asks for a thread by ``runs_in``; a time-out (seconds of wall clock: of one call, and of
    all calls together) gives it one, too, for only what runs in a thread can be left behind. An environment
    that does not answer in time is told by ``abandon()``, and closed whenever it comes back.
    """

    def __init__(self, step_timeout: float | None, episode_timeout: float | None) -> None:
        self.env: AgentEnv | None = None
        self._step_timeout, self._episode_timeout = step_timeout, episode_timeout
        self._spent = 0.0
        self._late = False
        self._thread: _Thread | None = None

    def make(self, make: Callable[[], AgentEnv]) -> AgentEnv:
        """Raises what ``make`` raises, and TimeoutError."""
        if self._step_timeout or self._episode_timeout:
            self._thread = _Thread()
        made = self.submit(make)
        try:
            self.env = self.result(made)
        except BaseException:  # too late or interrupted: it may be made yet
            made.future.add_done_callback(_close_made)
            raise
        if self._thread is None and self.env.runs_in != "main":
            self._thread = _Thread()
        return self.env

    def submit(self, function: Callable[[], R]) -> Pending[R]:
        """Begin a call. Without a thread it is over when this returns."""

        def timed() -> tuple[R, float]:
            start = time.monotonic()
            result = function()
            return result, time.monotonic() - start

        since = time.monotonic()
        return Pending(self._thread.submit(timed) if self._thread else _done(timed), since)

    def result(self, pending: Pending[R]) -> R:
        """Wait for a call. Raises what it raised, and TimeoutError."""
        most, problem = self._patience()
        try:
            left = None if most is None else max(0.0, pending.since + most - time.monotonic())
            result, seconds = pending.future.result(left)
        except TimeoutError:
            if pending.future.done():  # the environment's own
                raise
            self._late = True
            if self.env is not None:
                self.env.abandon()
            raise TimeoutError(problem) from None
        self._spent += seconds
        return result

    def call(self, function: Callable[[], R]) -> R:
        return self.result(self.submit(function))

    def close(self) -> None:
        """Close the environment and end the thread; one that did not answer in time is not waited for.
        Raises what the environment's ``close()`` raises."""
        try:
            if self.env is not None:
                closing = self.submit(self.env.close)
                if not self._late:
                    self.result(closing)
        finally:
            if self._thread is not None:
                self._thread.stop()

    def leave(self) -> None:
        """As ``close``, but wait for nothing: whatever the environment is doing is of no use any more."""
        if self.env is not None and self._thread is None:
            with contextlib.suppress(Exception, SystemExit):
                self.env.close()
        elif self.env is not None and self._thread is not None:
            self.env.abandon()
            self._thread.submit(self.env.close)
        if self._thread is not None:
            self._thread.stop()

    def _patience(self) -> tuple[float | None, str]:
        """The seconds that the next call may take, and what to say when they are over."""
        step, episode = self._step_timeout, self._episode_timeout
        left = None if episode is None else max(0.0, episode - self._spent)
        if left is not None and (step is None or left < step):
            return left, f"the environment took more than {episode} s in this episode"
        return step, f"no answer within {step} s"


class _Thread:
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


def _close_made(made: Future[tuple[AgentEnv, float]]) -> None:
    if made.exception() is None:
        made.result()[0].close()


def _done(function: Callable[[], R]) -> Future[R]:
    future: Future[R] = Future()
    try:
        future.set_result(function())
    except (Exception, SystemExit) as error:
        future.set_exception(error)
    return future
