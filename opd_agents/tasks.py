"""Which episodes a training step rolls out: drawn from (seed, step) and what a checkpoint holds, so a resume
draws the same.

Their uids and the numbers of their noise and draws: the step's groups, then demonstrations; a redrawn group
has those of the group whose place it takes, marked with the attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from opd_agents import envs
from opd_agents.config import EnvironmentSource, RunConfig
from opd_agents.curriculum import PassRates
from opd_agents.episode import Episode
from opd_agents.errors import ConfigError
from opd_agents.recordings import student_groups, student_groups_before
from opd_agents.schedules import dealt
from opd_agents.types import Task

ATTEMPT = 2**40  # stream numbers of one draw of a step's groups; each redraw has the next so many


def draw_episodes(
    config: RunConfig, step: int, sizes: Sequence[int], known: PassRates | None = None
) -> list[Episode]:
    """The step's episodes, in groups of ``rollout.group_size``; ``sizes``: tasks per environment.

    They are ``rollout.episodes_per_step``, less those of the groups that are recorded, dealt out to the
    environments by weight. All episodes of a group share a task; each has its own noise. The tasks of a file
    are visited once an epoch, in a new order each time, and so are those of a ``limit``, where an episode's
    noise is the task's: a fixed data set. With a curriculum, what is ``known`` of tasks and levels says which
    are drawn, as often as it will, each time with fresh noise.
    """
    if not config.environments:  # all experience is recorded
        return []
    groups, chosen, visits, random = _sources(config, step, known)
    drawn = _drawn(config, sizes, chosen, known, random)
    episodes = []
    for group, which, index in zip(groups, chosen.tolist(), drawn.tolist(), strict=True):
        source, fresh = config.environments[which], list[int]()
        if known is not None:
            fresh = [step, group]
        elif source.limit or "tasks" in source.options:
            epoch, place = divmod(visits[which], sizes[which])
            index = int(_order(config.seed, which, sizes[which], epoch)[place])
            fresh = [] if source.limit else [epoch]
        visits[which] += 1
        episodes += _group(config, step, group, which, index, fresh)
    return episodes


def redraw_episodes(
    config: RunConfig,
    step: int,
    sizes: Sequence[int],
    places: Sequence[int],
    attempt: int,
    known: PassRates | None = None,
) -> list[Episode]:
    """Fresh groups for those in ``places`` of the step's that are played, the ``attempt``-th time (1, ...).

    Each has a task of the same environment, drawn from (seed, step, attempt, place) alone, evenly or by what
    is ``known``. It is an extra visit: the epochs over task files and limits go on as if nothing had been
    redrawn.
    """
    groups, chosen, _, _ = _sources(config, step, known)
    random = np.random.Generator(np.random.Philox(key=[config.seed, step], counter=[0, attempt, 4, 2**63]))
    drawn = _drawn(config, sizes, chosen, known, random)
    episodes = []
    for place in places:
        which, index = int(chosen[place]), int(drawn[place])
        fixed = config.environments[which].limit and known is None
        fresh = [] if fixed else [step, attempt, place]
        episodes += _group(config, step, groups[place], which, index, fresh, attempt)
    return episodes


def _drawn(
    config: RunConfig,
    sizes: Sequence[int],
    chosen: np.ndarray,
    known: PassRates | None,
    random: np.random.Generator,
) -> np.ndarray:
    """A task of each environment in ``chosen``, by what is known of them, or evenly."""
    if known is None:
        return random.integers(np.array(sizes)[chosen])
    uniforms, drawn = random.random(len(chosen)), np.zeros(len(chosen), dtype=np.int64)
    for which in np.unique(chosen).tolist():
        mine = chosen == which
        drawn[mine] = known.draw(config.environments[which], sizes[which], uniforms[mine])
    return drawn


def draw_demonstrations(config: RunConfig, step: int, wanted: Sequence[tuple[Episode, int]]) -> list[Episode]:
    """So many further episodes for each group, of which the first episodes are given: of its task and name,
    with noise, draws and uids of their own."""
    rollout, extra = config.rollout, config.rollout.demonstrations
    episodes: list[Episode] = []
    if extra is None:
        return episodes
    most = rollout.group_size if extra.when == "rejected" else extra.per_group
    for one, count in wanted:
        attempt, number = divmod(one.stream[2], ATTEMPT)
        for sample in range(count):
            place = rollout.episodes_per_step + number // rollout.group_size * most + sample
            noise = np.random.SeedSequence([one.seed, 1 + sample]).generate_state(1)[0]
            uid, stream = _name(step, f"{place:04d}", attempt), (config.seed, step, attempt * ATTEMPT + place)
            episodes.append(replace(one, uid=uid, seed=int(noise), stream=stream, demonstration=True))
    return episodes


def _sources(
    config: RunConfig, step: int, known: PassRates | None
) -> tuple[list[int], np.ndarray, list[int], np.random.Generator]:
    """The numbers of the step's groups that are played, the environment of each, how many groups each
    environment has had before (at the levels of now), and the generator of the step's further draws."""
    groups = np.flatnonzero(student_groups(config, step)).tolist()
    before = student_groups_before(config, step)
    levels = len(config.environments) if known is None else known.levels(config.environments)
    weights = [source.weight for source in config.environments[:levels]]
    visits, after = dealt(before, weights), dealt(before + len(groups), weights)
    random = np.random.Generator(np.random.Philox(key=[config.seed, step], counter=[0, 0, 0, 2**63]))
    chosen = np.repeat(np.arange(len(weights)), np.subtract(after, visits))
    return groups, chosen[random.random(len(groups)).argsort()], visits, random


def _group(
    config: RunConfig, step: int, group: int, which: int, index: int, fresh: Sequence[int], attempt: int = 0
) -> list[Episode]:
    """The episodes of one group: task ``index`` of environment ``which``, with noise that is ``fresh``."""
    rollout, source = config.rollout, config.environments[which]
    named = rollout.group_size > 1 or rollout.demonstrations is not None
    episodes = []
    for sample in range(rollout.group_size):
        noise = np.random.SeedSequence([config.seed, which, index, sample, *fresh]).generate_state(1)[0]
        number = group * rollout.group_size + sample
        episodes.append(
            Episode(
                uid=_name(step, f"{number:04d}", attempt),
                env_id=source.id,
                env_kwargs=source.options,
                seed=int(noise),
                task=Task(str(index), source.split),
                stream=(config.seed, step, attempt * ATTEMPT + number),
                group=_name(step, f"g{group:04d}", attempt) if named else "",
            )
        )
    return episodes


def _name(step: int, number: str, attempt: int) -> str:
    """Of an episode or a group; sorted, they stand in the order of their numbers."""
    return f"{step:06d}-{number}" + (f"-r{attempt}" if attempt else "")


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


def check_experts(config: RunConfig) -> None:
    """Raises ConfigError where the scripted expert is to act in an environment that has none."""
    extra = config.rollout.demonstrations
    others = {other.actor for other in (extra, config.rollout.alternatives) if other is not None}
    corrects = config.correction is not None and config.correction.propose.by == "expert"
    if "expert" not in config.rollout.actors | others and not corrects:
        return
    for source in config.environments:
        if not envs.has_expert(source.id, source.options):
            raise ConfigError(
                f"{source.id} has no scripted expert, who is to act (rollout.source, rollout.demonstrations,"
                " rollout.alternatives, correction.propose)."
                " Let the teacher act, or take another environment."
            )


@lru_cache(maxsize=64)
def _order(seed: int, which: int, size: int, epoch: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, which, size, 2**62]))
    return random.permutation(size)
