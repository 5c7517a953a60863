"""One step's episodes: groups of a task each; those that teach nothing redrawn; demonstrations added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

from opd_agents.config import Demonstrations, Policy, RunConfig
from opd_agents.curriculum import PassRates
from opd_agents.distributed import ALONE, World
from opd_agents.episode import Episode
from opd_agents.judging import NOT_ASKED, Judged, Opinions
from opd_agents.plugins import Reward, load_reward
from opd_agents.policies import RelayPolicy
from opd_agents.policies.base import Policy as Acts
from opd_agents.tasks import draw_demonstrations, draw_episodes, redraw_episodes
from opd_agents.types import Outcome, Trajectory

T = TypeVar("T")
Play: TypeAlias = Callable[[Sequence[Episode]], Sequence[Trajectory]]
"""Episodes in, what became of each out, in their order."""
Judging: TypeAlias = Callable[[Sequence[Trajectory]], Judged]


class Played(NamedTuple):
    """``trajectories``: the step's groups in order, then demonstrations. ``redrawn`` counts the groups that
    were replaced, each as often as it was; ``discarded`` are their episodes."""

    trajectories: list[Trajectory]
    redrawn: int
    discarded: list[Trajectory]
    judged: Judged  # what was said of the student's episodes

    @property
    def generated_tokens(self) -> int:
        """What models wrote, also in groups that were replaced."""
        return sum(one.n_action_tokens for one in self.trajectories + self.discarded)

    def metrics(self, config: RunConfig) -> dict[str, float | None]:
        """Of what the config asks for."""
        row: dict[str, float | None] = {}
        if config.rollout.redraws:
            row["groups/redrawn"] = self.redrawn
        if config.rollout.demonstrations:
            shown = [trajectory.success for trajectory in self.trajectories if trajectory.demonstration]
            row["demonstrations/episodes"] = len(shown)
            row["demonstrations/success"] = sum(shown) / len(shown) if shown else None
            if config.rollout.demonstrations.when == "rejected":
                row["demonstrations/rejected"] = sum(trajectory.replaced for trajectory in self.trajectories)
        if config.judge:
            row |= self.judged.metrics()
        return row


def play_step(
    config: RunConfig,
    step: int,
    sizes: Sequence[int],
    play: Play,
    demonstrate: Play,
    world: World = ALONE,
    judge: Judging = lambda trajectories: NOT_ASKED,
    known: PassRates | None = None,
) -> Played:
    """The episodes that a step learns from; a resume draws the same. ``sizes``: tasks per environment;
    ``known``: what a curriculum goes by.

    ``play`` rolls out for the source, ``demonstrate`` for ``rollout.demonstrations``. Groups of equal rewards
    (:func:`equal_groups`) are replaced up to ``rollout.redraws`` times, then kept as they are. The ``judge``
    is asked, by one rank, about the groups that are left, and demonstrations come after. A group stays on one
    rank, and every rank gets all trajectories.
    """
    size, extra = config.rollout.group_size, config.rollout.demonstrations
    episodes = draw_episodes(config, step, sizes, known)
    groups = [*_chunks(world.shared(episodes, play, size), size)]
    first = episodes[::size]
    places: Sequence[int] = range(len(groups))
    redrawn, discarded = 0, list[Trajectory]()
    for attempt in range(1, config.rollout.redraws + 1):
        places = world.from_main(partial(equal_groups, config, groups, places))
        if not places:
            break
        discarded += [trajectory for place in places for trajectory in groups[place]]
        redrawn += len(places)
        fresh = redraw_episodes(config, step, sizes, places, attempt, known)
        played = _chunks(world.shared(fresh, play, size), size)
        for place, one, group in zip(places, fresh[::size], played, strict=True):
            first[place], groups[place] = one, group
    trajectories = [trajectory for group in groups for trajectory in group]
    judged = world.from_main(partial(judge, trajectories))
    hints = {one.trajectory: one.hint for one in judged.feedback if one.hint}
    trajectories = [replace(one, hint=hints.get(one.uid, "")) for one in trajectories]
    if extra is not None:
        trajectories = _with_rejections(trajectories, extra, judged)
        groups = [*_chunks(trajectories, size)]
        wanted = [(one, _demonstrations(group, extra)) for one, group in zip(first, groups, strict=True)]
        demonstrations = draw_demonstrations(config, step, wanted)
        # a group's on one rank, as what its episodes ask of an API alike is then asked once
        trajectories += world.shared(demonstrations, demonstrate, [count for _, count in wanted])
    return Played(trajectories, redrawn, discarded, judged)


def play_behind(
    episodes: Sequence[Episode], first: Acts, then: Acts, *, left: int, play: Callable[..., list[Trajectory]]
) -> list[Trajectory]:
    """The ``episodes``, begun by ``first`` and finished by ``then``, who takes over where ``left`` turns
    remain of those that ``first`` needs when it plays the first episode of the group alone.

    What it would do is done anew in every episode, whose noise is its own. A task that it does not solve
    alone is ``then``'s from its first turn on. ``play`` rolls out with a ``policy``.
    """
    groups = {one.group or one.uid: one for one in reversed(episodes)}
    alone = [replace(one, uid=f"{one.uid}-beginning") for one in groups.values()]
    shown = dict(zip(groups, play(alone, policy=first), strict=True))
    turns = {group: max(0, len(one.turns) - left) if one.success else 0 for group, one in shown.items()}
    relay = RelayPolicy(first, then, {one.uid: turns[one.group or one.uid] for one in episodes})
    return play(episodes, policy=relay)


def _with_rejections(
    trajectories: Sequence[Trajectory], extra: Demonstrations, judged: Judged
) -> list[Trajectory]:
    """Those of too low a score marked as replaced; what was not judged stays."""
    if extra.at_least is None:
        return list(trajectories)
    opinions = Opinions(judged.feedback)
    scores = [opinions.episode_score(trajectory) for trajectory in trajectories]
    rejected = [score is not None and score < extra.at_least for score in scores]
    return [replace(t, replaced=out) for t, out in zip(trajectories, rejected, strict=True)]


def _demonstrations(group: Sequence[Trajectory], extra: Demonstrations) -> int:
    """How many a group gets."""
    match extra.when:
        case "rejected":
            return sum(trajectory.replaced for trajectory in group)
        case "group_failed" if any(trajectory.success for trajectory in group):
            return 0
    return extra.per_group


def equal_groups(
    config: RunConfig, groups: Sequence[Sequence[Trajectory]], places: Sequence[int]
) -> list[int]:
    """Those of the ``places`` whose groups give no advantage: of each reward that a `policy` component
    compares, the environment's or a plug-in's, all episodes have the same. Episodes whose environment failed
    do not count, nor those cut off where the part masks them. Raises UserError as :func:`load_reward`."""
    compared = [*_compared(config)]

    def equal(group: Sequence[Trajectory]) -> bool:
        for reward, cut_off in compared:
            played = (one for one in group if one.outcome is not Outcome.ERROR)
            if len({reward(one) for one in played if cut_off or not one.cut_off}) > 1:
                return False
        return True

    return [place for place in places if equal(groups[place])]


def _compared(config: RunConfig) -> Iterator[tuple[Reward, bool]]:
    """The reward of each part of an advantage, and whether episodes that were cut off count there."""
    for name, component in config.loss.components.items():
        if isinstance(component, Policy):
            for part, settings in component.rewards.items():
                key = f"loss.components.{name}.rewards.{part}.reward"
                reward = load_reward(settings.reward, key) if settings.reward else _of_environment
                yield reward, settings.unfinished == "scored"


def _of_environment(trajectory: Trajectory) -> float:
    return trajectory.reward


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
