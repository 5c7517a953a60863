"""Finished run folders as arms of a comparison: what each seed measured, at which compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from opd_agents.config import FLOP_PARTS
from opd_agents.errors import RunFolderError
from opd_agents.report.groups import OWN_KEYS, Group, read_groups
from opd_agents.report.reading import Run, number
from opd_agents.scaling.curve import Points

FEWEST = 3  # evaluations of a seed
WITHOUT_EFFECT = {"evaluation", "student.model", "trainer.checkpoint_every", "trainer.keep_last"}


@dataclass(frozen=True, slots=True)
class Arm:
    """One config, trained at several seeds. Of a seed on average: ``parts`` (FLOPs of `rollout`, `teacher`
    and `update`; None for runs that did not count them apart) and ``uncounted`` (tokens of models whose FLOPs
    nobody knows). ``parameters`` by model, ``config`` by dotted key, both of the last stage."""

    name: str
    seeds: tuple[Points, ...]
    parts: Mapping[str, float] | None
    uncounted: float
    parameters: Mapping[str, int]
    config: Mapping[str, Any]

    @property
    def size_ratio(self) -> float | None:
        """Weights of the teacher, of all together if they are several, for one of the student's."""
        teachers = [size for name, size in self.parameters.items() if name.partition(".")[0] == "teacher"]
        return sum(teachers) / self.parameters["student"] if teachers else None

    def changes(self, other: Arm) -> dict[str, Any]:
        """The keys in which it differs from ``other``, with its own values; None where it has none."""
        keys = self.config.keys() | other.config.keys()
        return {
            key: self.config.get(key) for key in sorted(keys) if self.config.get(key) != other.config.get(key)
        }


def read_arms(paths: Sequence[Path], metric: str) -> list[Arm]:
    """The folders of seeds, and runs that differ in their seed alone, an arm each; ``metric`` is `success` or
    `success_greedy`, in validation.

    Raises RunFolderError for a folder that cannot be read, a run that is not finished, fewer than two seeds
    or three evaluations, and evaluations on different tasks.
    """
    groups = read_groups(paths)
    arms = [_arm(group, metric) for group in groups]
    tasks = {group.name: _tasks(group) for group in groups}
    first = groups[0].name
    for name, own in tasks.items():
        if own != tasks[first]:
            raise RunFolderError(
                f"{first} and {name} were evaluated on different tasks, {tasks[first]} and {own}, so that"
                " their success rates cannot be compared. Train them with the same `evaluation`."
            )
    return arms


def _tasks(group: Group) -> dict[str, Any]:
    """Which tasks its last stage is evaluated on."""
    *_, (_, stage) = group.runs[0].training()
    settings = stage.config.get("evaluation") or {}
    return {key: settings.get(key) for key in ("suite", "split", "limit")}


def _arm(group: Group, metric: str) -> Arm:
    if len(group.runs) < 2:
        raise RunFolderError(
            f"{group.name} has a single seed, of which no interval can be made. Train more, such as with"
            " `opd-agents train CONFIG --seeds 0-2`, and give their folder."
        )
    seeds = tuple(_points(run, metric) for run in group.runs)
    stages = [[stage for _, stage in run.training()] for run in group.runs]
    keys = [f"total/flops/{part}" for part in FLOP_PARTS]
    counted = all(key in stage.metrics[-1] for of_run in stages for stage in of_run for key in keys)
    last = stages[0][-1]
    return Arm(
        name=group.name,
        seeds=seeds,
        parts={part: _spent(stages, key) for part, key in zip(FLOP_PARTS, keys, strict=True)}
        if counted
        else None,
        uncounted=_spent(stages, "total/uncounted_tokens"),
        parameters=last.summary.get("parameters", {}),
        config=dict(_flat(last.config)),
    )


def _spent(stages: Sequence[Sequence[Run]], key: str) -> float:
    """Of all stages of a seed together, on average."""
    return fmean(sum(number(stage.metrics[-1].get(key)) or 0.0 for stage in of_run) for of_run in stages)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        place = f"{prefix}{key}"
        if place in OWN_KEYS | WITHOUT_EFFECT:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{place}.")
        elif isinstance(value, str) and Path(value).is_absolute():
            yield place, "/".join(Path(value).parts[-2:])
        else:
            yield place, value


def _points(run: Run, metric: str) -> Points:
    """Success in validation over the FLOPs of all stages so far, the evaluation before the first included."""
    measured: list[tuple[float, float]] = []
    before = 0.0
    for _, stage in run.training():
        if not stage.summary:
            raise RunFolderError(
                f"{stage.path} has not finished: it has no summary.json. Finish it with `opd-agents train`"
                " and --resume, or leave it out."
            )
        start = (stage.summary.get("evaluation_at_start") or {}).get(metric)
        pairs = [(0.0, start)]
        pairs += [(row["total/flops"], row.get(f"eval/{metric}")) for row in stage.metrics]
        if pairs[-1][1] is None:  # evaluated after its last step
            pairs[-1] = pairs[-1][0], (stage.summary.get("evaluation") or {}).get(metric)
        measured += [(before + x, rate) for x, y in pairs if (rate := number(y)) is not None]
        before += pairs[-1][0]
    if len(measured) < FEWEST:
        raise RunFolderError(
            f"{run.path} has {len(measured)} evaluations, and a curve needs {FEWEST} at least. Train it with"
            " an `evaluation` (suite, every) that evaluates more often."
        )
    compute, success = zip(*measured, strict=True)
    return Points(np.array(compute), np.array(success))
