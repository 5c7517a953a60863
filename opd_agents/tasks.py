"""Which episodes a training step rolls out: drawn from (seed, step) alone, so a resume draws the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from opd_agents import envs
from opd_agents.config import EnvironmentSource, RunConfig
from opd_agents.errors import ConfigError, UnknownName
from opd_agents.rollout import Episode
from opd_agents.types import Task


def draw_episodes(config: RunConfig, step: int, sizes: Sequence[int]) -> list[Episode]:
    """``rollout.episodes_per_step`` episodes in groups of ``group_size``; ``sizes``: tasks per environment.

    All episodes of a group share a task; each has its own noise. With ``limit`` the tasks are visited once
    an epoch, in a new order each time, and an episode's noise is the task's: a fixed data set.
    """
    rollout, sources = config.rollout, config.environments
    groups = rollout.episodes_per_step // rollout.group_size
    random = np.random.Generator(np.random.Philox(key=[config.seed, step], counter=[0, 0, 0, 2**63]))
    shares = np.array([source.weight for source in sources])
    chosen = random.choice(len(sources), size=groups, p=shares / shares.sum())
    drawn = random.integers(np.array(sizes)[chosen])
    episodes = []
    for group, (which, index) in enumerate(zip(chosen.tolist(), drawn.tolist(), strict=True)):
        source = sources[which]
        if source.limit:
            epoch, place = divmod(step * groups + group, sizes[which])
            index = int(_order(config.seed, which, sizes[which], epoch)[place])
        for sample in range(rollout.group_size):
            noise = np.random.SeedSequence([config.seed, which, index, sample]).generate_state(1)[0]
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
    """How many tasks each source has. Raises for an unknown environment or split, or a too large limit."""
    sizes = []
    for source in sources:
        env = envs.make(source.id, **source.options)
        try:
            if source.split not in env.split_sizes:
                raise UnknownName(
                    f"split of {source.id}", source.split, env.split_sizes, f"opd-agents envs {source.id}"
                )
            size = env.split_sizes[source.split]
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
