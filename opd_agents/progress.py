"""What a person sees during a run, and how to stop one."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opd_agents.alarms import alarms
from opd_agents.config import RunConfig


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and its checkpoint written; the message says how to go on."""


class StopSignal:
    """Turns the first Ctrl-C into a request to stop after the step; a second one stops at once."""

    def __init__(self, *, tells: bool = True) -> None:
        self.requested, self._tells = False, tells  # of several processes one tells

    def __enter__(self) -> StopSignal:
        # signals can only be handled in the main thread; elsewhere Ctrl-C keeps its usual meaning
        try:
            self._old = signal.signal(signal.SIGINT, self._handle)
        except ValueError:
            self._old = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt("Stopped at once; the newest checkpoint is that of an earlier step.")
        self.requested = True
        message = "Finishing this step and writing a checkpoint (Ctrl-C again stops at once)."
        if self._tells:
            Console(stderr=True).print(message)


class Bar:
    """``rows`` are the metrics of the steps before; their alarms have been told."""

    def __init__(self, progress: Progress, task: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        self._progress, self._task, self._rows = progress, task, [*rows]
        self._told = {(alarm.name, alarm.about) for alarm in alarms(rows)}

    def update(self, row: Mapping[str, Any]) -> None:
        if self._progress.disable:
            return
        self._rows.append(row)
        for alarm in alarms(self._rows):
            if (alarm.name, alarm.about) not in self._told:
                self._told.add((alarm.name, alarm.about))
                self._progress.console.print(f"Alarm: {alarm}", markup=False, highlight=False)
        kl, success = row.get("distill/kl"), row.get("rollout/success")
        self._progress.update(
            self._task,
            completed=row["progress"],
            success="-" if success is None else f"{success:.0%}",
            kl="-" if kl is None else f"{kl:.3f}",
            speed=f"{row['tokens_per_second']:.0f}",
            step=row["step"],
        )


@contextmanager
def progress_bar(
    config: RunConfig, step: int, rows: Sequence[Mapping[str, Any]], *, shown: bool = True
) -> Iterator[Bar]:
    """Step, success of the rollouts, KL per token, tokens per second, time left, and each alarm once; on
    standard error. ``rows``: the metrics of the steps before."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.fields[step]}"),
        TextColumn("success {task.fields[success]}"), TextColumn("KL {task.fields[kl]}"),
        TextColumn("{task.fields[speed]} tokens/s"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(config.name, total=1.0, success="-", kl="-", speed="-", step=step)
        yield Bar(progress, task, rows)
