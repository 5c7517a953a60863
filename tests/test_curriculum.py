"""Tasks drawn by what the student's episodes on them have shown: pass rates, bands, levels."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from rolling import trajectory, turn
from scipy.stats import chisquare

from opd_agents import trainer
from opd_agents.config import Curriculum, EnvironmentSource, RunConfig, load_config
from opd_agents.curriculum import FILE, PassRates
from opd_agents.errors import CheckpointError, ConfigError
from opd_agents.playing import play_step
from opd_agents.session import Session
from opd_agents.tasks import draw_episodes, redraw_episodes
from opd_agents.trainer import train
from opd_agents.types import Outcome, Task, Trajectory

DESK = EnvironmentSource(id="tiny/Parity-v0")
LONGER = EnvironmentSource(id="tiny/Parity-v0", options={"wanted": 3})


def known(**settings: Any) -> PassRates:
    return PassRates(Curriculum(**settings))


def episodes(task: int, successes: int, failures: int, source: EnvironmentSource = DESK) -> list[Trajectory]:
    outcomes = [Outcome.SUCCESS] * successes + [Outcome.FAILURE] * failures
    return [played(task, outcome, source) for outcome in outcomes]


def played(task: int, outcome: Outcome, source: EnvironmentSource = DESK, **fields: Any) -> Trajectory:
    named = {"env_id": source.id, "env_kwargs": source.options, "task": Task(str(task), source.split)}
    return trajectory([turn([1], [2])], outcome=outcome, **named, **fields)


def shares(rates: PassRates, size: int = 5, source: EnvironmentSource = DESK) -> np.ndarray:
    """How often each task is drawn, by the length of its part of [0, 1)."""
    drawn = rates.draw(source, size, (np.arange(100_000) + 0.5) / 100_000)
    return np.bincount(drawn, minlength=size) / len(drawn)


# ---- pass rates ----


def test_what_an_episode_showed_counts_half_after_a_half_life() -> None:
    rates = known(half_life=2).after(episodes(0, 3, 1)).after([]).after(episodes(0, 0, 1))
    [tally] = rates.tallies.values()
    assert tally["0"] == pytest.approx((1.5, 3.0))
    for _ in range(16):
        rates = rates.after([])
    assert [len(tasks) for tasks in rates.tallies.values()] == [1]
    assert [len(tasks) for tasks in rates.after([]).tallies.values()] == [0]  # less than .01 of an episode


def test_only_what_the_student_did_counts() -> None:
    others = [played(0, Outcome.ERROR), played(0, Outcome.SUCCESS, demonstration=True)]
    assert known().after(others).tallies == {}
    [tasks] = known().after([played(0, Outcome.UNFINISHED)]).tallies.values()
    assert tasks == {"0": (0, 1)}


def test_a_pass_rate_lies_between_what_is_known_of_the_task_and_of_all() -> None:
    assert known().of(DESK) == (0.5, {})
    overall, rates = known().after(episodes(0, 8, 0) + episodes(1, 1, 1)).of(DESK)
    assert overall == pytest.approx((1 + 9) / (2 + 10))
    assert rates == pytest.approx({"0": (2 * overall + 8) / 10, "1": (2 * overall + 1) / 4})


def test_tasks_are_drawn_in_proportion_to_p_times_1_minus_p() -> None:
    rates = known().after(episodes(0, 8, 0) + episodes(1, 0, 8) + episodes(2, 4, 4) + episodes(3, 1, 1))
    expected = np.array([p * (1 - p) for p in (0.9, 0.1, 0.5, 0.5, 0.5)])  # half succeed; the last is new
    assert shares(rates) == pytest.approx(expected / expected.sum(), abs=1e-4)
    drawn = rates.draw(DESK, 5, np.random.default_rng(0).random(4000))
    assert chisquare(np.bincount(drawn, minlength=5), 4000 * expected / expected.sum()).pvalue > 0.001


def test_a_band_leaves_out_the_solved_and_the_hopeless_until_they_are_forgotten() -> None:
    rates = known(draw="uniform", band=[0.15, 0.85], half_life=1)
    rates = rates.after(episodes(0, 8, 0) + episodes(1, 0, 8) + episodes(2, 2, 2))
    assert shares(rates) == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3], abs=1e-4)
    assert rates.metrics([DESK])["curriculum/in_band"] == pytest.approx(1 / 3)
    assert shares(rates.after([])) == pytest.approx([0.2] * 5, abs=1e-4)  # (1 + 4) / (2 + 4) is within


def test_where_most_are_solved_the_band_is_of_those_that_failed() -> None:
    """Also of a million tasks of which hardly any was ever played."""
    solved = [e for task in range(100) for e in episodes(task, 1, 0)]
    rates = known(band=[0.1, 0.9]).after(solved + episodes(500, 0, 1) + episodes(501, 1, 1))
    drawn = rates.draw(DESK, 1_000_000, np.random.default_rng(0).random(300))
    assert {*drawn.tolist()} == {500, 501}
    nothing_left = known(band=[0.1, 0.9]).after(solved)
    assert len({*nothing_left.draw(DESK, 1000, np.random.default_rng(0).random(300)).tolist()}) > 200
    assert nothing_left.metrics([DESK])["curriculum/in_band"] == 0


def test_the_next_level_joins_while_the_one_before_is_passed() -> None:
    rates = known(next_level=0.75)
    levels = [DESK, LONGER]
    assert rates.levels(levels) == 1  # nothing is known
    assert rates.after(episodes(0, 1, 0)).levels(levels) == 1  # 2 / 3: luck
    passed = rates.after(episodes(0, 4, 0) + episodes(1, 3, 0) + episodes(0, 0, 5, LONGER))
    assert passed.levels(levels) == 2
    assert passed.metrics(levels)["curriculum/levels"] == 2
    assert passed.after(episodes(0, 0, 3)).levels(levels) == 1  # it has forgotten the first


# ---- what a step plays ----


def config(*overrides: str, sources: Sequence[EnvironmentSource] = (DESK,)) -> RunConfig:
    raw = {
        "name": "x", "student": {"model": "unread"},
        "environments": [source.model_dump() for source in sources],
        "rollout": {"episodes_per_step": 12, "group_size": 3, "curriculum": {}},
        "loss": {"components": {"grpo": tiny.POLICY}},
    }  # fmt: skip
    return load_config(raw, *overrides)


def test_a_step_and_its_redraws_draw_by_what_is_known_with_fresh_noise() -> None:
    made, rates = (
        config(),
        known(band=[0.3, 0.7]).after(
            episodes(0, 5, 5) + [e for t in range(1, 20) for e in episodes(t, 9, 0)]
        ),
    )
    for drawn in (draw_episodes(made, 3, [20], rates), redraw_episodes(made, 3, [20], range(4), 1, rates)):
        assert [e.task.id for e in drawn] == ["0"] * 12
        assert len({e.seed for e in drawn}) == 12
    assert draw_episodes(made, 3, [20], rates) == draw_episodes(made, 3, [20], rates)
    limited = config(sources=[DESK.model_copy(update={"limit": 20})])
    first, second = (draw_episodes(limited, step, [20], rates) for step in (0, 1))
    assert not {e.seed for e in first} & {e.seed for e in second}
    assert "0" not in {
        e.task.id for e in draw_episodes(made, 3, [20])
    }  # evenly, as where all environments are begun


def test_levels_share_the_groups_by_weight() -> None:
    sources = [DESK, LONGER.model_copy(update={"weight": 3.0})]
    made = config("rollout.curriculum={next_level: 0.8}", sources=sources)
    settings = made.rollout.curriculum
    assert settings is not None
    rates = PassRates(settings)
    passed = rates.after(episodes(0, 9, 0))
    for now, expected in ((rates, [4, 0]), (passed, [1, 3])):
        for step in range(3):
            drawn = [e.env_kwargs.get("wanted", 2) for e in draw_episodes(made, step, [20, 20], now)[::3]]
            assert [drawn.count(2), drawn.count(3)] == expected


def test_episodes_of_redrawn_groups_are_known_too() -> None:
    made = config("rollout.redraws=1")
    tried: Counter[str] = Counter()

    def play(asked: Sequence[Any]) -> list[Trajectory]:
        tried.update(e.task.id for e in asked)
        return [played(int(e.task.id), Outcome.FAILURE, uid=e.uid, group=e.group) for e in asked]

    result = play_step(made, 0, [20], play, play, known=known())
    [tasks] = known().after(result.trajectories + result.discarded).tallies.values()
    assert {task: n for task, (_, n) in tasks.items()} == tried and tried.total() == 24


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.curriculum={next_level: 0.8}"], "levels, from the easiest on"),
        (["rollout.teacher_share=0.5", "teacher.model=t"], r"rollout\.source: student"),
        (["rollout.curriculum.band=[0.5, 0.2]"], "lowest < highest"),
        (["rollout.beginning={actor: expert, left: 2}"], r"rollout\.source: student"),
        (["rollout.source=expert", "loss.components={ce: {kind: ce}}"], r"rollout\.source: student"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


# ---- over checkpoints ----


def test_pass_rates_are_read_as_they_were_written(tmp_path: Path) -> None:
    rates = known(half_life=3).after(episodes(0, 2, 1)).after(episodes(7, 0, 1, LONGER))
    rates.save(tmp_path)
    assert known(half_life=3).loaded(tmp_path) == rates
    assert known().before(tmp_path / "elsewhere") == known()
    other_split = DESK.model_copy(update={"split": "validation"})
    assert shares(rates.before(tmp_path), source=other_split) == pytest.approx([0.2] * 5, abs=1e-4)
    (tmp_path / FILE).write_text("nothing")
    with pytest.raises(CheckpointError, match=FILE):
        known().before(tmp_path)


def test_a_run_by_pass_rates_that_died_goes_on_as_if_it_had_not(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its second stage begins with what the first has found out."""

    def staged(name: str) -> RunConfig:
        curriculum = {"band": [0.2, 0.8], "half_life": 4}
        raw = tiny.mix(
            tmp_path / name,
            tiny_teacher,
            correction=None,
            loss={"components": {"p": tiny.POLICY}},
            teacher=None,
        )
        own = raw.model_dump(mode="json", exclude_unset=True)
        own["rollout"] |= {"curriculum": curriculum, "redraws": 1}
        until = {"metric": "curriculum/tasks", "above": 5}
        stages = {"first": {"trainer": {"until": [until]}}, "second": {"trainer": {"steps": 2}}}
        return load_config(own | {"stages": stages})

    straight = train(staged("straight"))
    known_then = json.loads(next((straight / "first/checkpoints").glob(f"step-*/{FILE}")).read_text())
    original, steps = trainer.train_step, []

    def dies(session: Session) -> dict[str, Any]:
        steps.append(session.known)
        if len(steps) in (2, 4):
            raise KeyboardInterrupt
        return original(session)

    monkeypatch.setattr(trainer, "train_step", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(staged("died"), resume=True)
    train(staged("died"), resume=True)
    for stage in ("first", "second"):
        assert tiny.final_state(tmp_path / "died" / stage) == tiny.final_state(straight / stage)
    first, second = (tiny.metrics(straight / stage) for stage in ("first", "second"))
    summary = json.loads((straight / "summary.json").read_text())["stages"]
    assert summary["first"]["ended"].startswith("trainer.until, curriculum/tasks: ")
    assert summary["second"]["ended"] == "trainer.steps"
    assert len(first) < 5 and known_then
    assert second[0]["curriculum/tasks"] >= first[-1]["curriculum/tasks"]
