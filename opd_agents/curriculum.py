"""What the student's own episodes have shown of tasks, and which tasks a step therefore draws."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from opd_agents.config import Curriculum, EnvironmentSource
from opd_agents.errors import CheckpointError
from opd_agents.types import Outcome, Trajectory

FILE = "pass_rates.json"  # in a checkpoint
FORGOTTEN = 0.01  # episodes; a task of which less is left is as good as new

Tally: TypeAlias = tuple[float, float]
"""Successes and episodes, both faded: what k steps ago counted 1 counts 2 ** (-k / half_life)."""


@dataclass(frozen=True, slots=True)
class PassRates:
    """The ``tallies`` of an environment's tasks, by :func:`_name` and the task's id; the same on all ranks,
    since all have all trajectories of a step."""

    settings: Curriculum
    tallies: Mapping[str, Mapping[str, Tally]] = field(default_factory=dict)

    def after(self, played: Iterable[Trajectory]) -> PassRates:
        """A step later, when these were played too. Demonstrations show nothing of the student, and an
        episode whose environment failed shows nothing at all; one that ran out of a budget has failed."""
        kept = 0.5 ** (1 / self.settings.half_life)
        tallies = {
            name: {i: (s * kept, n * kept) for i, (s, n) in tasks.items() if n * kept >= FORGOTTEN}
            for name, tasks in self.tallies.items()
        }
        for one in played:
            if not one.demonstration and one.outcome is not Outcome.ERROR:
                tasks = tallies.setdefault(_name(one.env_id, one.task.split, one.env_kwargs), {})
                successes, episodes = tasks.get(one.task.id, (0.0, 0.0))
                tasks[one.task.id] = (successes + one.success, episodes + 1)
        return replace(self, tallies=tallies)

    def of(self, source: EnvironmentSource) -> tuple[float, dict[str, float]]:
        """The pass rate on all of its tasks together, which is that of a task of which nothing is known, and
        those of the others by id."""
        tallies = self.tallies.get(_name(source.id, source.split, source.options), {})
        together = (sum(s for s, _ in tallies.values()), sum(n for _, n in tallies.values()))
        overall = pass_rate(together, 0.5)
        return overall, {task: pass_rate(tally, overall) for task, tally in tallies.items()}

    def levels(self, sources: Sequence[EnvironmentSource]) -> int:
        """How many of the environments are drawn, from the first on; at least one."""
        if self.settings.next_level is None:
            return len(sources)
        for number, source in enumerate(sources[:-1], start=1):
            if self.of(source)[0] < self.settings.next_level:
                return number
        return len(sources)

    def draw(self, source: EnvironmentSource, size: int, uniforms: np.ndarray) -> np.ndarray:
        """A task (int) of its first ``size`` for each number in [0, 1), by the tasks' weights."""
        overall, rates = self.of(source)
        weights = np.full(size, self._weight(overall))
        for task, rate in rates.items():
            if int(task) < size:  # an earlier run may have drawn from more
                weights[int(task)] = self._weight(rate)
        if not weights.any():
            weights[:] = 1.0
        edges = weights.cumsum()
        return np.searchsorted(edges, uniforms * edges[-1], side="right")

    def metrics(self, sources: Sequence[EnvironmentSource]) -> dict[str, float]:
        """Of the tasks that something is known of: how many they are, their mean pass rate, and the share
        that is in the band; how many environments are drawn as levels."""
        rates = [rate for source in sources for rate in self.of(source)[1].values()]
        row: dict[str, float] = {"curriculum/tasks": len(rates)}
        if rates:
            row["curriculum/pass_rate"] = sum(rates) / len(rates)
            if self.settings.band is not None:
                row["curriculum/in_band"] = sum(map(self._in_band, rates)) / len(rates)
        if self.settings.next_level is not None:
            row["curriculum/levels"] = self.levels(sources)
        return row

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.tallies), encoding="utf-8")

    def loaded(self, folder: Path) -> PassRates:
        """Those of a checkpoint. Raises OSError and ValueError."""
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return replace(
            self, tallies={name: {i: (s, n) for i, (s, n) in tasks.items()} for name, tasks in stored.items()}
        )

    def before(self, student: Path) -> PassRates:
        """Those of the checkpoint that a run begins with, if it has any. Raises CheckpointError."""
        try:
            return self.loaded(student) if (student / FILE).is_file() else self
        except ValueError as error:
            raise CheckpointError(
                f"{student / FILE} holds no pass rates ({error}); remove it to go without."
            ) from None

    def _weight(self, rate: float) -> float:
        if not self._in_band(rate):
            return 0.0
        return rate * (1 - rate) if self.settings.draw == "competence" else 1.0

    def _in_band(self, rate: float) -> bool:
        low, high = self.settings.band or (0.0, 1.0)
        return low <= rate <= high


def pass_rate(tally: Tally, prior: float) -> float:
    """The mean of a success rate after this evidence, by a Beta prior of this mean that weighs as much as two
    episodes."""
    successes, episodes = tally
    return (2 * prior + successes) / (2 + episodes)


def _name(env_id: str, split: str, options: Mapping[str, Any]) -> str:
    """An environment's, whatever its weight and limit in a config: runs that share it share what is known."""
    return json.dumps([env_id, split, dict(options)], sort_keys=True)
