"""Which runs are the same experiment at several seeds, and means with 95 % t-intervals over them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_agents.errors import RunFolderError
from opd_agents.evaluation.rates import t_factor
from opd_agents.report.reading import SEED_FOLDER, Run, read_run

OWN_KEYS = {"seed", "output", "name"}  # what runs of one experiment may differ in


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in nothing but their seed; one run is a group of its own."""

    name: str
    runs: tuple[Run, ...]

    @property
    def evaluated(self) -> bool:
        """An evaluation's folder, and no run's."""
        return self.runs[0].evaluated

    def training(self) -> dict[str, tuple[Run, ...]]:
        """Stage label -> that stage in every run which has it, in the order of the run."""
        stages: dict[str, list[Run]] = {}
        for run in self.runs:
            for label, stage in run.training():
                stages.setdefault(label, []).append(stage)
        return {label: tuple(runs) for label, runs in stages.items()}


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds and the half-width of its 95 % t-interval; None for a single seed."""

    value: float
    half: float | None


def mean_over_seeds(values: Sequence[float]) -> Mean:
    if len(values) < 2:
        return Mean(values[0], None)
    return Mean(statistics.fmean(values), t_factor(len(values)) * statistics.stdev(values))


def read_groups(paths: Sequence[Path]) -> list[Group]:
    """Read the folders; each folder of seeds is a group, other runs are grouped by equal configs.

    Raises:
        RunFolderError: no folder given, or one that cannot be read.
    """
    if not paths:
        raise RunFolderError("No run folder was given. Name one or more, such as runs/NAME.")
    groups: dict[Any, list[Run]] = {}
    names: dict[Any, str] = {}
    for path in {path.resolve(): path for path in paths}.values():
        run = read_run(path)
        key = ("seeds", run.path) if run.seeds else _identity(run)
        groups.setdefault(key, []).extend(run.seeds or (run,))
        names.setdefault(key, run.name if run.seeds else _name(run))
    return [
        group
        for key, runs in groups.items()
        for group in (
            [Group(names[key], tuple(runs))]
            if len(runs) == 1 or _distinct_seeds(runs)
            else [Group(run.name, (run,)) for run in runs]
        )
    ]


def _identity(run: Run) -> Any:
    """Equal for runs of one experiment."""
    if run.config:
        return json.dumps(_without_own_keys(run.config), sort_keys=True, default=str)
    return run.path.resolve().parent if SEED_FOLDER.fullmatch(run.name) else run.path.resolve()


def _without_own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in OWN_KEYS}
    if isinstance(stages := kept.get("stages"), Mapping):
        kept["stages"] = {
            name: _without_own_keys(stage) if isinstance(stage, Mapping) else stage
            for name, stage in stages.items()
        }
    return kept


def _distinct_seeds(runs: Sequence[Run]) -> bool:
    seeds = [run.config.get("seed", run.name) for run in runs]
    return len(set(seeds)) == len(seeds)


def _name(run: Run) -> str:
    return run.path.resolve().parent.name if SEED_FOLDER.fullmatch(run.name) else run.name
