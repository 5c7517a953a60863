"""Which episodes a training step rolls out: drawn from (seed, step) alone, so a resume draws the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from opd_agents import envs
from opd_agents.config import EnvironmentSource, RunConfig
from opd_agents.errors import ConfigError
from opd_agents.recordings import student_groups, student_groups_before
from opd_agents.rollout import Episode
from opd_agents.schedules import dealt
from opd_agents.types import Task


def draw_episodes(config: RunConfig, step: int, sizes: Sequence[int]) -> list[Episode]:
    """The step's episodes, in groups of ``rollout.group_size``; ``sizes``: tasks per environment.

    They are ``rollout.episodes_per_step``, less those of the groups that are recorded, dealt out to the
    environments by weight. All episodes of a group share a task; each has its own noise. The tasks of a file
    are visited once an epoch, in a new order each time, and so are those of a ``limit``, where an episode's
    noise is the task's: a fixed data set.
    """
    rollout, sources = config.rollout, config.environments
    if not sources:  # all experience is recorded
        return []
    groups = np.flatnonzero(student_groups(config, step)).tolist()
    before, weights = student_groups_before(config, step), [source.weight for source in sources]
    visits, after = dealt(before, weights), dealt(before + len(groups), weights)
    random = np.random.Generator(np.random.Philox(key=[config.seed, step], counter=[0, 0, 0, 2**63]))
    chosen = np.repeat(np.arange(len(sources)), np.subtract(after, visits))
    chosen = chosen[random.random(len(groups)).argsort()]
    drawn = random.integers(np.array(sizes)[chosen])
    episodes = []
    for group, which, index in zip(groups, chosen.tolist(), drawn.tolist(), strict=True):
        source, fresh = sources[which], list[int]()
        if source.limit or "tasks" in source.options:
            epoch, place = divmod(visits[which], sizes[which])
            index = int(_order(config.seed, which, sizes[which], epoch)[place])
            fresh = [] if source.limit else [epoch]
        visits[which] += 1
        for sample in range(rollout.group_size):
            noise = np.random.SeedSequence([config.seed, which, index, sample, *fresh]).generate_state(1)[0]
            number = group * rollout.group_size + sample
            episodes.append(
                Episode(
                    uid=f"{step:06d}-{number:04d}",
                    env_id=source.id,
                    env_kwargs=source.options,
                    seed=int(noise),
                    task=Task(str(index), source.split),
                    stream=(config.seed, step, number),
                    group=f"{step:06d}-g{group:04d}" if rollout.group_size > 1 else "",
                )
            )
    return episodes


def split_sizes(sources: Sequence[EnvironmentSource]) -> list[int]:
    """How many tasks each source has. Raises for an unknown environment or split, a task file that cannot be
    used, or a too large limit."""
    sizes = []
    for source in sources:
        env = envs.make(source.id, **source.options)
        try:
            size = env.split_size(source.split)
        finally:
            env.close()
        if source.limit and source.limit > size:
            raise ConfigError(
                f"{source.id}: limit is {source.limit}, but split {source.split!r} has only {size} tasks."
            )
        sizes.append(source.limit or size)
    return sizes


@lru_cache(maxsize=64)
def _order(seed: int, which: int, size: int, epoch: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, which, size, 2**62]))
    return random.permutation(size)
