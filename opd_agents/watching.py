"""`opd-agents watch`: a run folder that another process writes, in the terminal, until it has its summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from opd_agents.alarms import alarms
from opd_agents.errors import RunFolderError
from opd_agents.report import formatting
from opd_agents.report.reading import Run, number, read_run

EVERY = 1.0  # seconds between two looks at the folder
SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 32  # of a sparkline
MOST_ALARMS = 3
Format = Callable[[float], str]


def watch(path: Path, console: Console, *, once: bool = False) -> None:
    """Show the run until its summary is there, or until Ctrl-C; with ``once``, and where the console is no
    terminal, show it as it is.

    Raises:
        RunFolderError: no folder of one run, or a broken file in it.
    """
    run = _read(path)
    if once or not console.is_terminal:
        console.print(frame(path, run))
        return
    try:
        with Live(frame(path, run), console=console, auto_refresh=False) as live:
            while run is None or not run.summary:
                time.sleep(EVERY)
                run = _read(path)
                live.update(frame(path, run), refresh=True)
    except KeyboardInterrupt:
        return  # the way to leave; the run goes on


def frame(path: Path, run: Run | None) -> RenderableType:
    """What there is to see of a run now; None: it has written nothing but its config."""
    if run is None:
        return f"[bold]{escape(path.name)}[/]  waiting for the first step"
    stages = list(run.training())
    label, stage = max(stages or [("", run)], key=lambda one: (not one[1].summary, one[1].modified()))
    parts: list[RenderableType] = [_title(run, label, stage)]
    parts += [_finished(name, one) for name, one in stages if one is not stage]
    if stage.metrics:
        parts += [_progress(stage), "", _figures(stage)]
    return Group(*parts, *_alarms(stages))


def _read(path: Path) -> Run | None:
    """None of a run that has made no step yet."""
    begun = (path / "config.yaml").is_file()
    try:
        run = read_run(path)
    except RunFolderError:
        if begun and not list(path.rglob("metrics.jsonl")):
            return None
        raise
    if run.seeds:
        first = run.seeds[0].path
        raise RunFolderError(f"{path} holds {len(run.seeds)} seeds; watch one of them, such as {first}.")
    if run.evaluated:
        raise RunFolderError(f"{path} is an evaluation, which has no steps; `opd-agents report` shows it.")
    return run


def _title(run: Run, label: str, stage: Run) -> str:
    name = f"[bold]{escape(run.name)}[/]" + (f", {escape(label)}" if label else "")
    if run.summary:
        end = stage.summary.get("ended")
        return f"{name}  [green]finished[/]{_reached(stage)}" + (
            f", ended by {escape(str(end))}" if end else ""
        )
    ago = time.time() - (stage.path / "metrics.jsonl").stat().st_mtime if stage.metrics else 0.0
    return f"{name}  running, last step {formatting.seconds(max(0.0, ago))} ago"


def _finished(label: str, stage: Run) -> str:
    return f"[dim]{escape(label)}: {len(stage.metrics)} steps{_reached(stage)}[/]"


def _reached(stage: Run) -> str:
    success = number((stage.summary.get("evaluation") or {}).get("success"))
    return "" if success is None else f", validation {formatting.percent(success)}"


def _progress(stage: Run) -> RenderableType:
    """How far it is, and when it will be over at the pace so far."""
    row, steps = stage.metrics[-1], (stage.config.get("trainer") or {}).get("steps")
    done, spent = number(row.get("progress")) or 0.0, number(row.get("total/seconds"))
    text = f"step {row.get('step')}" + (f" of {steps}" if steps else "")
    if spent is not None:
        text += f"   {formatting.seconds(spent)} so far"
        if 0 < done < 1 and not stage.summary:
            text += f", about {formatting.seconds(spent / done * (1 - done))} left"
    line = Table.grid(padding=(0, 2))
    line.add_row(ProgressBar(total=1.0, completed=done, width=WIDTH), text)
    return line


def _figures(stage: Run) -> Table:
    """A line a figure: its name, its first and its newest value, and its course between them."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", overflow="fold")
    for column in ("first", "now"):
        table.add_column(column, no_wrap=True, justify="right")
    table.add_column("course", no_wrap=True)
    for name, key, shown in _keys(stage):
        values = [value for row in stage.metrics if (value := number(row.get(key))) is not None]
        if values:
            first, now = shown(values[0]), shown(values[-1])
            table.add_row(escape(name), first, f"[bold]{now}[/]", f"[cyan]{sparkline(values)}[/]")
    return table


def _keys(stage: Run) -> Iterator[tuple[str, str, Format]]:
    """What is shown, where it was measured: (name, key of the metrics, format)."""
    yield "success of rollouts", "rollout/success", formatting.percent
    yield "validation, sampled", "eval/success", formatting.percent
    yield "validation, greedy", "eval/success_greedy", formatting.percent
    yield "KL to the teacher", "distill/kl", _decimal
    yield "log-ratio to the teacher", "distill/log_ratio", _decimal
    components = dict.fromkeys(key for row in stage.metrics for key in row if key.startswith("loss/"))
    yield from ((f"loss, {key.removeprefix('loss/')}", key, _decimal) for key in components)
    if len(components) != 1:
        yield "loss", "loss", _decimal
    yield "norm of the gradient", "grad_norm", _decimal
    yield "turns an episode", "rollout/turns", formatting.decimal
    yield "repairs accepted", "correction/accepted", formatting.count
    yield "tokens a second", "tokens_per_second", formatting.count
    yield "FLOPs in all", "total/flops", formatting.flops
    yield "API cost in all", "total/api/cost", formatting.decimal


def _decimal(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3f}"


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """The course of ``values`` in at most ``width`` characters: means of equal parts, lowest to highest."""
    parts = min(width, len(values))
    edges = [i * len(values) // parts for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    level = (len(SPARKS) - 1) / span if span else 0.0
    return "".join(SPARKS[round((mean - low) * level)] for mean in means)


def _alarms(stages: Sequence[tuple[str, Run]]) -> list[RenderableType]:
    """The last ones, of all stages."""
    found = [(label, alarm) for label, stage in stages for alarm in alarms(stage.metrics)]
    if not found:
        return []
    lines = [""]
    for label, alarm in found[-MOST_ALARMS:]:
        name = alarm.name.replace("_", " ") + (f" of {alarm.about}" if alarm.about else "")
        where = f"{label}, step {alarm.step}" if label else f"step {alarm.step}"
        lines.append(f"[bold yellow]alarm[/] {escape(name)} ({escape(where)}): {escape(alarm.seen)}")
        lines.append(f"      [dim]try {escape(alarm.remedy)}[/]")
    earlier = len(found) - MOST_ALARMS
    return [*lines, *([f"[dim]{earlier} earlier alarms: see the report[/]"] if earlier > 0 else [])]
