"""A suite: which tasks of which environments an agent is measured on."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, ValidationError

from opd_agents import envs
from opd_agents.config import EnvironmentSource, Section, absolute_inputs, read_yaml
from opd_agents.episode import Episode, Limits
from opd_agents.errors import ConfigError, UnknownName
from opd_agents.tasks import split_sizes
from opd_agents.types import Task

SUITES = importlib.resources.files("opd_agents.configs.suites")


class SuiteEnvironment(Section):
    id: str
    tasks: int = Field(100, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)


class SuiteLimits(Section):
    max_tokens_per_turn: int = Field(256, gt=0)
    max_context_tokens: int = Field(8192, gt=0)
    max_observation_tokens: int = Field(2048, gt=0)
    step_timeout: float | None = Field(None, gt=0)
    episode_timeout: float | None = Field(None, gt=0)
    max_live: int | None = Field(None, gt=0)


class Suite(Section):
    """The first ``tasks`` tasks of each environment's split (all, if it has fewer), one sampled episode each
    at ``temperature`` and one greedy."""

    name: str
    title: str = ""
    environments: list[SuiteEnvironment] = Field(min_length=1)
    temperature: float = Field(1.0, gt=0)
    limits: SuiteLimits = SuiteLimits()

    def rollout_limits(self) -> Limits:
        return Limits(**self.limits.model_dump())

    def episodes(self, split: str, limit: int | None, seed: int) -> list[Episode]:
        """Task 0 of every environment, then task 1, ...; ``limit`` keeps the first so many of them.

        Raises UnknownName for an environment or split that does not exist.
        """
        sizes = split_sizes(
            [EnvironmentSource(id=e.id, split=split, options=e.options) for e in self.environments]
        )
        counts = [min(source.tasks, size) for source, size in zip(self.environments, sizes, strict=True)]
        chosen = sorted((index, place) for place, count in enumerate(counts) for index in range(count))
        return [
            Episode(
                uid=f"{self.environments[place].id}:{split}:{index}:{place}",
                env_id=self.environments[place].id,
                env_kwargs=self.environments[place].options,
                seed=seed * 1_000_003 + number,
                task=Task(str(index), split),
                stream=(seed, 2**62, number),
            )
            for number, (index, place) in enumerate(chosen[:limit])
        ]


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
