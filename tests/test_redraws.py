"""Groups whose episodes all have the same reward are replaced by fresh groups: dynamic sampling (DAPO)."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rolling import trajectory, turn
from scipy.stats import chisquare

from opd_agents import trainer
from opd_agents.config import RunConfig, load_config
from opd_agents.distributed import World
from opd_agents.episode import Episode
from opd_agents.errors import UserError
from opd_agents.playing import equal_groups, play_step
from opd_agents.session import Session
from opd_agents.tasks import draw_demonstrations, draw_episodes, redraw_episodes
from opd_agents.trainer import train_step
from opd_agents.types import Outcome, Trajectory

SIZES = [50]
STUDENT = {"model": "unread"}


def config(*overrides: str, rewards: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Four groups of three, of which the rewards of a `policy` component are compared."""
    raw = {
        "name": "redrawn", "student": STUDENT, "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {"episodes_per_step": 12, "group_size": 3, "redraws": 2},
        "loss": {"components": {"grpo": tiny.POLICY | {"rewards": rewards or {"verifier": {}}}}},
    }  # fmt: skip
    return load_config(raw | changes, *overrides)


class Playing:
    """Rolls nothing out: an episode's reward is what ``reward`` says; notes what it was asked to play."""

    def __init__(self, reward: Callable[[Episode], float]) -> None:
        self.reward, self.calls = reward, list[list[Episode]]()

    def __call__(self, episodes: Sequence[Episode]) -> list[Trajectory]:
        self.calls.append(list(episodes))
        return [played(episode, self.reward(episode)) for episode in episodes]


def played(episode: Episode, reward: float, **fields: Any) -> Trajectory:
    outcome = Outcome.SUCCESS if reward == 1 else Outcome.FAILURE
    fields = {"reward": reward, "outcome": outcome} | fields
    return trajectory(
        [turn([1], [2, 3])], uid=episode.uid, group=episode.group, task=episode.task, seed=episode.seed,
        demonstration=episode.demonstration, **fields,
    )  # fmt: skip


def group_of(episode: Episode) -> int:
    return episode.stream[2] % 2**40 // 3


def attempt_of(episode: Episode) -> int:
    return episode.stream[2] // 2**40


def parity(episode: Episode) -> float:
    """Tells the episodes of a group apart."""
    return float(episode.stream[2] % 3 == 0)


def step(made: RunConfig, play: Playing, number: int = 0, world: World | None = None) -> Any:
    return play_step(made, number, SIZES, play, play, world or World())


# ---- which groups, and how often ----


def test_only_groups_of_equal_rewards_are_replaced_and_each_in_its_place() -> None:
    """Group 1 tells its episodes apart at the first redraw, group 3 never."""

    def reward(episode: Episode) -> float:
        group, attempt = group_of(episode), attempt_of(episode)
        return 0.5 if group == 3 or (group, attempt) == (1, 0) else parity(episode)

    made, play = config(), Playing(reward)
    result = step(made, play)
    asked = [[(group_of(e), attempt_of(e)) for e in call[::3]] for call in play.calls]
    assert asked == [[(0, 0), (1, 0), (2, 0), (3, 0)], [(1, 1), (3, 1)], [(3, 2)]]
    groups = [t.group for t in result.trajectories[::3]]
    assert groups == ["000000-g0000", "000000-g0001-r1", "000000-g0002", "000000-g0003-r2"]
    assert len({t.uid for t in result.trajectories}) == 12
    assert sorted(t.uid for t in result.trajectories) == [t.uid for t in result.trajectories]
    assert (result.redrawn, sum(t.n_action_tokens for t in result.discarded)) == (3, 3 * 3 * 2)
    assert result.metrics(made) == {"groups/redrawn": 3}
    made = config("rollout.redraws=0")
    kept = step(made, Playing(reward))
    assert [t.uid for t in kept.trajectories[:3]] == [t.uid for t in result.trajectories[:3]]
    assert (kept.redrawn, kept.discarded, kept.metrics(made)) == (0, [], {})


def test_where_all_groups_differ_nothing_is_played_again() -> None:
    play = Playing(parity)
    assert step(config(), play).redrawn == 0 and len(play.calls) == 1


def test_a_step_and_its_redraws_do_not_depend_on_what_was_played_before() -> None:
    play, again = Playing(lambda e: 0.0), Playing(lambda e: 0.0)
    for number in range(4):
        step(config(), play, number)
    step(config(), again, 3)
    assert play.calls[-3:] == again.calls
    other = Playing(lambda e: 0.0)
    step(config("seed=1"), other, 3)
    assert [e.task for call in other.calls for e in call] != [e.task for call in again.calls for e in call]


def test_a_replacement_does_not_depend_on_which_others_are_replaced() -> None:
    made = config()
    together = redraw_episodes(made, 5, SIZES, [0, 2, 3], 1)
    assert redraw_episodes(made, 5, SIZES, [2], 1) == together[3:6]
    assert redraw_episodes(made, 5, SIZES, [2], 2)[0].task != together[3].task


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(1, 4), st.sets(st.integers(0, 3), min_size=1))
def test_fresh_episodes_share_nothing_with_any_other(number: int, attempt: int, places: set[int]) -> None:
    made = config()
    first = draw_episodes(made, number, SIZES)
    fresh = redraw_episodes(made, number, SIZES, [*places], attempt)
    episodes = [*first, *fresh]
    assert len({e.uid for e in episodes}) == len({e.stream for e in episodes}) == len(episodes)
    assert len({e.seed for e in fresh} | {e.seed for e in first}) == len(fresh) + len({e.seed for e in first})
    for start in range(0, len(episodes), 3):
        group = episodes[start : start + 3]
        assert len({(e.task, e.group) for e in group}) == 1
    assert len({e.group for e in episodes}) == len(episodes) // 3


def test_a_replacement_is_of_the_same_environment_and_uniform_over_its_tasks() -> None:
    sources = [{"id": "a/A-v0", "weight": 3}, {"id": "b/B-v0", "limit": 7}]
    made = config("rollout.episodes_per_step=30", environments=sources)
    found: Counter[tuple[str, str]] = Counter()
    for number in range(80):
        first = draw_episodes(made, number, [20, 7])[::3]
        fresh = redraw_episodes(made, number, [20, 7], range(10), 1)[::3]
        assert [e.env_id for e in first] == [e.env_id for e in fresh]
        found.update((e.env_id, e.task.id) for e in fresh)
    counts = [[found[name, str(i)] for i in range(size)] for name, size in (("a/A-v0", 20), ("b/B-v0", 7))]
    assert [sum(one) for one in counts] == [600, 200]
    assert all(chisquare(one).pvalue > 0.001 for one in counts)


def test_redraws_are_no_visits_of_an_epoch() -> None:
    """An epoch's order is a function of the step: what was replaced comes again an epoch later."""
    made = config(environments=[{"id": "tiny/Parity-v0", "limit": 8}])
    play = Playing(lambda e: 0.0)
    for number in range(4):
        play_step(made, number, [8], play, play)
    first = [e.task.id for call in play.calls for e in call[::3] if attempt_of(e) == 0]
    assert sorted(first[:8], key=int) == sorted(first[8:], key=int) == [str(i) for i in range(8)]


# ---- what is compared ----


def length(one: Trajectory) -> float:
    return float(len(one.uid) + int(one.uid[-1]))


def broken(one: Trajectory) -> float:
    raise KeyError("no such thing")


def three(*rewards: float, **fields: Any) -> list[Trajectory]:
    episodes = draw_episodes(config(), 0, SIZES)[:3]
    return [played(e, r, **fields) for e, r in zip(episodes, rewards, strict=True)]


def test_a_plug_in_is_compared_instead_of_the_environments_reward() -> None:
    own = config(rewards={"length": {"reward": "test_redraws:length"}})
    assert equal_groups(own, [three(1, 1, 1)], [0]) == []
    assert equal_groups(config(), [three(1, 1, 1)], [0]) == [0]
    both = config(rewards={"verifier": {}, "constant": {"reward": "test_redraws:constant"}})
    constant = config(rewards={"constant": {"reward": "test_redraws:constant"}})
    assert equal_groups(constant, [three(0, 1, 1)], [0]) == [0]
    assert equal_groups(both, [three(0, 1, 1)], [0]) == []  # one part that tells them apart is enough
    failing = config(rewards={"broken": {"reward": "test_redraws:broken"}})
    with pytest.raises(UserError, match=r"rewards\.broken\.reward .* KeyError"):
        equal_groups(failing, [three(0, 1, 1)], [0])


def constant(one: Trajectory) -> float:
    return 2.0


def test_failed_environments_do_not_count_nor_masked_unfinished_episodes() -> None:
    masked = config(rewards={"verifier": {"unfinished": "masked"}})
    group = three(0, 0, 1)
    for outcome, made, wanted in (
        (Outcome.ERROR, config(), [0]),
        (Outcome.UNFINISHED, config(), []),
        (Outcome.UNFINISHED, masked, [0]),
    ):
        last = dataclasses.replace(group[2], outcome=outcome)
        assert equal_groups(made, [[*group[:2], last]], [0]) == wanted, outcome
    assert equal_groups(config(), [[dataclasses.replace(t, outcome=Outcome.ERROR) for t in group]], [0]) == [
        0
    ]


# ---- with demonstrations, on several ranks, in a run ----


def test_demonstrations_are_for_the_groups_that_are_left() -> None:
    shown = {"actor": "expert", "per_group": 2, "when": "group_failed"}

    def reward(episode: Episode) -> float:
        return 0.0 if group_of(episode) in (1, 3) else parity(episode)

    made = config(f"rollout.demonstrations={shown}", "rollout.redraws=1")
    play, expert = Playing(reward), Playing(lambda e: 1.0)
    result = play_step(made, 2, SIZES, play, expert)
    (asked,) = expert.calls
    assert [e.group for e in asked] == ["000002-g0001-r1"] * 2 + ["000002-g0003-r1"] * 2
    assert [t.demonstration for t in result.trajectories] == [False] * 12 + [True] * 4
    first = {t.group: t.task for t in result.trajectories[:12]}
    assert all(first[e.group] == e.task for e in asked)
    again = draw_demonstrations(made, 2, [(play.calls[0][3], 2)])  # of the group that was replaced
    assert not {e.stream for e in again} & {e.stream for e in asked}
    assert result.metrics(made)["demonstrations/episodes"] == 4


class OneOfTwo(World):
    """A rank of two whose other rank is played here too, as its answers would come."""

    def shared(self, items: Sequence[Any], work: Any, group: int = 1) -> list[Any]:
        groups = [items[i : i + group] for i in range(0, len(items), group)]
        done: list[list[Any]] = [[] for _ in groups]
        for rank in range(2):
            mine = [number for number in range(len(groups)) if number % 2 == rank]
            results = work([item for number in mine for item in groups[number]])
            for place, number in enumerate(mine):
                done[number] = results[place * group : (place + 1) * group]
        return [result for results in done for result in results]


def test_ranks_play_whole_groups_and_get_the_same() -> None:
    def reward(episode: Episode) -> float:
        return float(episode.seed % 5 == 0)

    alone, shared = Playing(reward), Playing(reward)
    assert step(config(), shared, 1, OneOfTwo()) == step(config(), alone, 1)
    for call in shared.calls:
        assert all(len({e.group for e in call[i : i + 3]}) == 1 for i in range(0, len(call), 3))


class Killed(BaseException):
    """Stands for a kill: nothing after it may count on having run."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> list[Path]:
    """With redraws and demonstrations: at once, and killed after its third step and resumed."""
    root = tmp_path_factory.mktemp("redrawn")
    learned = {"kind": "ce", "coef": 0.1, "select": {"source": "demonstration"}}
    fields = (
        "rollout.redraws=2", "rollout.group_size=2", "rollout.demonstrations.actor=teacher",
        "rollout.demonstrations.when=group_failed",
    )  # fmt: skip
    loss = {"components": {"verifier": tiny.POLICY, "shown": learned}}
    whole, parts = (
        tiny.mix(root / name, tiny_teacher, *fields, correction=None, loss=loss)
        for name in ("whole", "parts")
    )

    def killed(session: Session) -> dict[str, Any]:
        if session.step == 3:  # the newest checkpoint is of the second step
            raise Killed
        return train_step(session)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "train_step", killed)
        trainer.train(parts)
    return [trainer.train(whole), trainer.train(parts, resume=True)]


def test_a_resumed_run_redraws_the_same(runs: list[Path]) -> None:
    whole, parts = (tiny.final_state(run) for run in runs)
    assert whole == parts


def test_a_run_counts_what_it_threw_away(runs: list[Path]) -> None:
    rows, kept = tiny.metrics(runs[0]), 0
    for file in sorted((runs[0] / "trajectories").iterdir()):
        for line in file.read_text().splitlines():
            kept += sum(len(turn["action_ids"]) for turn in json.loads(line)["trajectory"]["turns"])
    assert rows[-1]["total/generated_tokens"] > kept
    assert sum(row["groups/redrawn"] for row in rows) > 0
    assert sum(row["demonstrations/episodes"] for row in rows) > 0
    assert all(row["rollout/episodes"] == 8 for row in rows)
