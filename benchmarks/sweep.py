"""Configs x seeds: train every cell, evaluate it, and compare the labels over the seeds.

    python benchmarks/sweep.py SWEEP.yaml [--jobs N]

    name: optimizers
    output: runs/optimizers            # from the working folder; default runs/NAME
    seeds: [0, 1, 2]
    runs:
      muon: {config: orderdesk_opd}    # a shipped experiment, or a file from this file's folder
      adamw: {config: orderdesk_opd, set: [trainer.optimizer=adamw]}
      longer: {config: orderdesk_opd, student: muon}  # from the student of run `muon`, of the same seed
      elsewhere: {config: babyai_opd, evaluate: {suite: babyai}}  # what is below is for the others
    evaluate: {suite: orderdesk, limit: 100}
    metrics: [success, success_greedy, total/flops]

A cell is the run folder OUTPUT/LABEL/seed-N of `opd-agents train`, with the figures of `opd-agents evaluate`
in its cell.json. A second call skips finished cells and resumes the others. A cell that fails is told in the
results and does not stop the rest. Exit codes: 0 all cells done, 1 some failed, 2 a mistake in the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import sweep_results
import typer
from pydantic import Field, ValidationError, field_validator, model_validator
from rich.console import Console
from rich.markup import escape

from opd_agents import envs
from opd_agents.config import RunConfig, Section, absolute_inputs, load_config, read_yaml
from opd_agents.errors import ConfigError, OpdError, UserError
from opd_agents.evaluation import load_suite
from opd_agents.runs import write_whole

Label = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # the name of a folder
Execute = Callable[[Sequence[str], Path], str]
console = Console(soft_wrap=True, highlight=False)


class SweepEvaluation(Section):
    suite: str
    limit: int | None = Field(None, gt=0)


class SweepRun(Section):
    config: str
    student: Label | None = None  # a run above it, whose student of the same seed it starts from
    set: tuple[str, ...] = ()
    evaluate: SweepEvaluation | None = None  # None: the sweep's


class Sweep(Section):
    name: Label
    output: str | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    runs: dict[Label, SweepRun] = Field(min_length=1)
    evaluate: SweepEvaluation
    metrics: list[str] = Field(["success", "success_greedy", "total/flops"], min_length=1)

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    @model_validator(mode="after")
    def _students_are_above(self) -> Sweep:
        labels = list(self.runs)
        for place, (label, run) in enumerate(self.runs.items()):
            if run.student is not None and run.student not in labels[:place]:
                raise ValueError(f"`runs.{label}.student`: no run {run.student!r} stands above it")
        return self

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("each seed once")
        return seeds


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: ``arguments`` of `opd-agents train`, and the config that they resolve to."""

    label: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    after: str | None  # the label of the cell that is done first
    config: RunConfig
    evaluation: SweepEvaluation

    @property
    def identity(self) -> dict[str, Any]:
        """What its figures belong to: with another config or evaluation the cell is not finished."""
        return {"config": self.config.model_dump(mode="json"), "evaluate": self.evaluation.model_dump()}

    def finished(self) -> bool:
        file = self.folder / "cell.json"
        return file.is_file() and self.identity.items() <= json.loads(file.read_text()).items()


def load_sweep(path: Path) -> tuple[Sweep, list[Cell]]:
    """The sweep and its cells, seed by seed. Raises UserError for any mistake in the file or its configs."""
    if not path.is_file():
        raise ConfigError(f"No sweep file {path}.")
    raw = absolute_inputs(read_yaml(path), path.parent)
    try:
        sweep = Sweep.model_validate(raw)
    except ValidationError as error:
        problems = (f"`{'.'.join(map(str, e['loc']))}`: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {'; '.join(problems)}.") from None
    cells = [_cell(sweep, label, seed, path.parent) for seed in sweep.seeds for label in sweep.runs]
    envs.import_plugins({name: None for cell in cells for name in cell.config.imports})
    for suite in {cell.evaluation.suite for cell in cells}:
        load_suite(suite)
    return sweep, cells


def _cell(sweep: Sweep, label: str, seed: int, base: Path) -> Cell:
    run, folder = sweep.runs[label], sweep.folder / label / f"seed-{seed}"
    start = None if run.student is None else Path.cwd() / sweep.folder / run.student / folder.name
    first = () if start is None else (f"student.model={start}",)  # the same before and after it is there
    overrides = (*first, *(_absolute(item, base) for item in run.set), f"seed={seed}", f"output={folder}")
    try:
        loaded = load_config(run.config, *overrides)
    except UserError as error:
        raise ConfigError(f"runs.{label}: {error}") from error
    evaluation = run.evaluate or sweep.evaluate
    return Cell(label, seed, folder, (run.config, *overrides), run.student, loaded, evaluation)


def _absolute(item: str, folder: Path) -> str:
    """An override whose value is a file or checkpoint, from the sweep file's folder."""
    key, sign, value = item.partition("=")
    last = key.rpartition(".")[2]
    return f"{key}{sign}{absolute_inputs({last: value}, folder)[last]}"


def execute(arguments: Sequence[str], log: Path) -> str:
    """Run `opd-agents` in a process of its own; returns its standard output. Raises OSError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+", encoding="utf-8") as file:
        command = [sys.executable, "-m", "opd_agents", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True)
        file.seek(0)
        told = file.read().strip().splitlines()
        file.write(done.stdout)
    if done.returncode:
        raise OSError(told[-1] if told else f"exit code {done.returncode}")
    return done.stdout


def run_cells(cells: Sequence[Cell], jobs: int, execute: Execute = execute) -> list[dict[str, Any]]:
    """Finish all cells, ``jobs`` at a time; a row for each, in their order.

    Cells are begun in their order, so one that waits for another's student never waits for one not begun.
    """
    with ThreadPoolExecutor(jobs) as pool:
        begun: dict[tuple[str, int], Future[dict[str, Any]]] = {}
        for cell in cells:
            first = None if cell.after is None else begun[cell.after, cell.seed]
            begun[cell.label, cell.seed] = pool.submit(_run_cell, cell, execute, first)
        return [row.result() for row in begun.values()]


def _run_cell(cell: Cell, execute: Execute, first: Future[dict[str, Any]] | None) -> dict[str, Any]:
    if first is not None:
        first.result()
    started, error, values = time.perf_counter(), "", dict[str, float]()
    status = "skipped" if cell.finished() else "done"
    try:
        if status == "done":
            _train_and_evaluate(cell, execute)
        values = sweep_results.measured(cell.folder)
    except (OSError, OpdError) as problem:
        status, error = "failed", str(problem)
    seconds = "" if status == "skipped" else f" after {time.perf_counter() - started:.0f} s"
    console.print(f"{cell.label} seed {cell.seed}: {status}{seconds}{': ' if error else ''}{escape(error)}")
    return {"label": cell.label, "seed": cell.seed, "status": status, "error": error, "values": values}


def _train_and_evaluate(cell: Cell, execute: Execute) -> None:
    log = f"{cell.folder.name}-{{}}.log"
    execute(("train", *cell.arguments, "--resume"), cell.folder.with_name(log.format("train")))
    plugins = [word for module in cell.config.imports for word in ("--import", module)]
    limit = ["--limit", str(cell.evaluation.limit)] if cell.evaluation.limit else []
    command = (*plugins, "evaluate", cell.evaluation.suite, "--policy", str(cell.folder), *limit, "--json")
    result = json.loads(execute(command, cell.folder.with_name(log.format("evaluate"))))
    text = json.dumps(cell.identity | {"evaluation": result["policies"][0]}, indent=1)
    write_whole(cell.folder / "cell.json", text + "\n")


def main(
    file: Annotated[
        Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep; benchmarks/sweep.py shows one.")
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores.")] = 1,
) -> None:
    """Train and evaluate configs x seeds, and compare them."""
    try:
        sweep, cells = load_sweep(file)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from error
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    rows = run_cells(cells, jobs)
    console.print(sweep_results.write(sweep.folder, sweep.name, sweep.metrics, rows))
    console.print(f"Table, cells and plot: {sweep.folder}/results.json, .csv, .svg")
    raise typer.Exit(int(any(row["status"] == "failed" for row in rows)))


if __name__ == "__main__":
    typer.run(main)
