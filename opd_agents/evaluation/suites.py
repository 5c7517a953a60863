"""A suite: which tasks of which environments an agent is measured on, how often, and within which budgets."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError

from opd_agents import envs
from opd_agents.config import EnvironmentSource, Section, absolute_inputs, read_yaml
from opd_agents.episode import Episode, Limits
from opd_agents.errors import ConfigError, UnknownName
from opd_agents.tasks import split_sizes
from opd_agents.types import Task, to_json

SUITES = importlib.resources.files("opd_agents.configs.suites")
TaskId: TypeAlias = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class SuiteEnvironment(Section):
    """``tasks``: so many of the split's first tasks (all, if it has fewer), or their ids. ``split``: of its
    own; null: that which the suite is played on, `test` for `evaluate`. ``difficulty`` names a group of the
    breakdown; null: the option `level`. The tasks in ``known_bad`` are played, and reported beside the score:
    ones that no right answer solves."""

    id: str
    tasks: Annotated[int, Field(gt=0)] | Annotated[list[TaskId], Field(min_length=1)] = 100
    split: str | None = None
    difficulty: str | None = None
    known_bad: list[TaskId] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def difficulty_name(self) -> str | None:
        level = self.options.get("level")
        return self.difficulty or (level if isinstance(level, str) else None)

    def task_ids(self, size: int) -> list[str]:
        """Of a split of so many tasks. Raises ConfigError for an id that is not there."""
        if isinstance(self.tasks, int):
            return [str(index) for index in range(min(self.tasks, size))]
        for task in self.tasks:
            if task.isdecimal() and int(task) >= size:
                raise ConfigError(f"{self.id}: there is no task {task}; the split has 0 to {size - 1}.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(
                f"{self.id}: a task stands twice in `tasks`; `samples` plays all several times."
            )
        return self.tasks


class SuiteLimits(Section):
    """Budgets of an episode, and how many live at once: ``concurrency`` in all, ``max_live`` of one
    environment's."""

    max_turns: int | None = Field(None, gt=0)
    max_tokens_per_turn: int = Field(256, gt=0)
    max_action_tokens: int | None = Field(None, gt=0)
    max_context_tokens: int = Field(8192, gt=0)
    max_observation_tokens: int = Field(2048, gt=0)
    step_timeout: float | None = Field(None, gt=0)
    episode_timeout: float | None = Field(None, gt=0)
    max_live: int | None = Field(None, gt=0)
    concurrency: int | None = Field(512, gt=0)


class Suite(Section):
    """Tasks of each environment, each with ``samples`` episodes at ``temperature`` and a greedy one."""

    name: str
    title: str = ""
    environments: list[SuiteEnvironment] = Field(min_length=1)
    samples: int = Field(1, gt=0)
    temperature: float = Field(1.0, gt=0)
    limits: SuiteLimits = SuiteLimits()

    def rollout_limits(self) -> Limits:
        return Limits(**self.limits.model_dump())

    def labels(self) -> dict[tuple[str, str], str]:
        """A name for each environment by (id, options as JSON): its id, with options where ids are equal."""
        ids = [e.id for e in self.environments]
        return {
            (e.id, to_json(e.options)): e.id
            if ids.count(e.id) == 1
            else f"{e.id} {shown_options(e.options)}".rstrip()
            for e in self.environments
        }

    def chosen(self, split: str, limit: int | None) -> list[tuple[int, Task]]:
        """(place of the environment, task): the first task of every environment, then the second, ...;
        ``limit`` keeps the first so many.

        Raises UnknownName for an environment or split that does not exist, ConfigError for a task that does
        not, and where the suite has test tasks and another split is to be played, as training does.
        """
        splits = [e.split or split for e in self.environments]
        if "test" in splits and split != "test":
            raise ConfigError(
                f"The suite {self.name} names the split `test`, which is for `opd-agents evaluate` alone: "
                f"leave `split` out, and {split!r} is played."
            )
        sizes = split_sizes(
            [
                EnvironmentSource(id=e.id, split=own, options=e.options)
                for e, own in zip(self.environments, splits, strict=True)
            ]
        )
        ids = [e.task_ids(size) for e, size in zip(self.environments, sizes, strict=True)]
        ordered = sorted((index, place) for place, tasks in enumerate(ids) for index in range(len(tasks)))
        return [(place, Task(ids[place][index], splits[place])) for index, place in ordered[:limit]]

    def episodes(self, split: str, limit: int | None, seed: int, samples: int = 1) -> list[Episode]:
        """``samples`` episodes of each task that is ``chosen``, which raises. The first is the same, with the
        same noise, whatever their number."""
        return [
            Episode(
                uid=f"{self.environments[place].id}:{task.split}:{task.id}:{place}"
                + (f":{sample}" if sample else ""),
                env_id=self.environments[place].id,
                env_kwargs=self.environments[place].options,
                seed=seed * 1_000_003 + number + sample * 2**32,
                task=task,
                stream=(seed, 2**62, number + sample * 2**32),
            )
            for number, (place, task) in enumerate(self.chosen(split, limit))
            for sample in range(samples)
        ]


def shown_options(options: Mapping[str, Any]) -> str:
    """An environment's, for a person: ``level=easy``."""
    return " ".join(
        f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in options.items()
    )


def load_suite(name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Suite:
    """A shipped suite by name, a YAML file by path, or an environment id (its first 100 tasks), made with
    ``options``; a suite has its own. Relative paths in a file count from its folder."""
    is_environment = "/" in name and not name.endswith((".yaml", ".yml"))
    if options and not is_environment:
        raise ConfigError(
            f"{name} is a suite, which has options of its own: give an environment's id instead."
        )
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"No suite file {name}.")
        return _read(path)
    shipped = {
        e.name.removesuffix(".yaml"): Path(str(e)) for e in SUITES.iterdir() if e.name.endswith(".yaml")
    }
    if name in shipped:
        return _read(shipped[name])
    if is_environment:
        envs.make(name, **options).close()  # UnknownName for an environment that does not exist
        return Suite(name=name, environments=[SuiteEnvironment(id=name, options=dict(options))])
    raise UnknownName("suite", name, [*shipped, *envs.list_envs()], "opd-agents evaluate --help")


def _read(path: Path) -> Suite:
    try:
        return Suite.model_validate({"name": path.stem} | absolute_inputs(read_yaml(path), path.parent))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
