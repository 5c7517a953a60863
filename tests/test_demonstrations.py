"""Further episodes of a group, acted by the teacher or the scripted expert."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from rolling import Scripted, desk_episodes, rolled, trajectory, turn
from test_redraws import Playing, played

from opd_agents.batch import pack
from opd_agents.config import Correction, RunConfig, load_config
from opd_agents.correction import improbable
from opd_agents.episode import Episode
from opd_agents.errors import ConfigError
from opd_agents.experience import Experience
from opd_agents.frozen import FrozenTerms
from opd_agents.playing import play_step
from opd_agents.policies import ExpertPolicy
from opd_agents.starting import check_inputs
from opd_agents.trainer import train
from opd_agents.types import Actor, Outcome, Trajectory, from_dict, to_dict

SHOWN = {"kind": "ce", "select": {"source": "demonstration"}}


def config(*overrides: str, **demonstrations: Any) -> RunConfig:
    """Four groups of two, with two demonstrations each."""
    raw = {
        "name": "shown", "student": {"model": "unread"}, "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {
            "episodes_per_step": 8, "group_size": 2,
            "demonstrations": {"actor": "expert", "per_group": 2} | demonstrations,
        },
        "loss": {"components": {"shown": SHOWN}},
    }  # fmt: skip
    return load_config(raw, *overrides)


def step(made: RunConfig, play: Playing, expert: Playing, number: int = 3) -> list[Trajectory]:
    return play_step(made, number, [20], play, expert).trajectories


def test_each_group_gets_demonstrations_of_its_task_after_the_students_episodes() -> None:
    play, expert = Playing(lambda e: 0.0), Playing(lambda e: 1.0)
    trajectories = step(config(), play, expert)
    (own,), (asked,) = play.calls, expert.calls
    assert [t.uid for t in trajectories] == [e.uid for e in own + asked] == sorted(e.uid for e in own + asked)
    assert [t.demonstration for t in trajectories] == [False] * 8 + [True] * 8
    assert [e.group for e in asked[::2]] == [e.group for e in own[::2]] == [e.group for e in asked[1::2]]
    assert [e.task for e in asked[::2]] == [e.task for e in own[::2]] == [e.task for e in asked[1::2]]
    assert [e.stream for e in own + asked] == [(0, 3, number) for number in range(16)]
    assert len({e.seed for e in own + asked}) == 16
    again = Playing(lambda e: 1.0)
    step(config(), Playing(lambda e: 1.0), again)
    assert again.calls == expert.calls  # by (seed, step) alone
    plain = config("rollout.demonstrations=", "loss.components.shown.select.source=")
    alone = Playing(lambda e: 0.0)
    step(plain, alone, expert)
    assert alone.calls == play.calls and len(expert.calls) == 1


def test_only_groups_without_a_success_if_so_asked() -> None:
    def reward(episode: Episode) -> float:
        return {0: 0.0, 1: 1.0, 2: 0.9, 3: 1.0 if episode.stream[2] == 7 else 0.0}[episode.stream[2] // 2]

    expert = Playing(lambda e: 1.0)
    trajectories = step(config(when="group_failed", per_group=1), Playing(reward), expert)
    assert [e.group for e in expert.calls[0]] == ["000003-g0000", "000003-g0002"]
    assert len(trajectories) == 10
    nobody = Playing(lambda e: 1.0)
    assert len(step(config(when="group_failed"), Playing(lambda e: 1.0), nobody)) == 8
    assert nobody.calls == [[]]


def test_a_demonstration_of_a_single_episode_shares_its_group() -> None:
    made = config("rollout.group_size=1", per_group=1)
    trajectories = step(made, Playing(lambda e: 0.0), Playing(lambda e: 1.0))
    groups = [t.group for t in trajectories]
    assert groups[:8] == groups[8:] and len(set(groups)) == 8 and all(groups)


def test_the_expert_acts_and_says_so_in_the_trajectory() -> None:
    made = config("rollout.episodes_per_step=2", per_group=1)
    student = Scripted(lambda history: "odd")

    def play(policy: Any) -> Any:
        return lambda episodes: rolled(episodes, policy)

    trajectories = play_step(made, 0, [20], play(student), play(ExpertPolicy())).trajectories
    assert [t.turns[0].actor for t in trajectories] == [Actor.STUDENT, Actor.STUDENT, Actor.EXPERT]
    assert [t.demonstration for t in trajectories] == [False, False, True]
    assert [t.success for t in trajectories] == [False, False, True]
    assert from_dict(Trajectory, to_dict(trajectories[2])) == trajectories[2]
    old = to_dict(trajectories[0])
    del old["demonstration"]  # written before there were any
    assert from_dict(Trajectory, old) == trajectories[0]


def test_demonstrations_are_no_rollouts_and_are_not_repaired() -> None:
    failed = {"outcome": Outcome.FAILURE}
    episodes = desk_episodes(2)
    mine = [played(e, 0.0, **failed) for e in episodes]
    shown = trajectory([turn([1], [2, 3])], uid="shown", demonstration=True, **failed)
    packed = pack([*mine, shown])
    size = len(packed.target)
    nothing = packed.behaviour.new_zeros(size)
    experience = Experience(
        (*mine, shown), packed, {}, {}, FrozenTerms(nothing, nothing, {}), nothing == 0
    )  # fmt: skip
    assert experience.rollouts == tuple(mine) and experience.demonstrations == (shown,)
    below = Correction().propose.below
    errors = improbable([*mine, shown], packed, nothing + 2 * below, below)
    assert [t.uid for t, _ in errors] == [t.uid for t in mine]


def test_an_environment_without_an_expert_is_refused_before_anything_runs(tmp_path: Path) -> None:
    rows = [{"prompt": "Say yes.", "answer": "yes"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"tasks": str(tmp_path / "rows.jsonl"), "verifier": "test_demonstrations:never"}
    raw = tiny.sft(tmp_path / "run") | {
        "environments": [{"id": "opd_agents/PromptTask-v0", "options": options}]
    }
    sources: Sequence[dict[str, Any]] = [
        {"source": "expert"},
        {"source": "student", "demonstrations": {"actor": "expert"}},
    ]
    for source in sources:
        made = load_config(raw | {"rollout": source | tiny.LIMITS | {"episodes_per_step": 2}})
        with pytest.raises(ConfigError, match="no scripted expert"):
            check_inputs(made)


def never(answer: str, row: Any) -> bool:
    return False


@pytest.mark.parametrize("actor", ["expert", "teacher"])
def test_a_student_learns_from_them_in_a_run(tmp_path: Path, tiny_teacher: Path, actor: str) -> None:
    run = train(
        tiny.mix(
            tmp_path / "run", tiny_teacher, f"rollout.demonstrations.actor={actor}", "trainer.steps=2",
            "rollout.demonstrations.per_group=2", correction=None,
            loss={"components": {"shown": SHOWN, "verifier": tiny.POLICY}},
        )
    )  # fmt: skip
    for number, row in enumerate(tiny.metrics(run), start=1):
        assert (row["rollout/episodes"], row["demonstrations/episodes"]) == (8, 4)
        assert row["loss/shown"] > 0
        file = run / "trajectories" / f"step-{number:06d}.jsonl"
        lines = [json.loads(line)["trajectory"] for line in file.read_text().splitlines()]
        assert [line["demonstration"] for line in lines] == [False] * 8 + [True] * 4
        assert {turn["actor"] for line in lines[8:] for turn in line["turns"]} == {actor}
        success = [line["outcome"] == "success" for line in lines]
        assert row["rollout/success"] == sum(success[:8]) / 8
        assert row["demonstrations/success"] == sum(success[8:]) / 4
        assert actor == "teacher" or all(success[8:])
        tokens = [
            sum(len(t["action_ids"]) for t in line["turns"] if t["logprobs"] is not None) for line in lines
        ]
        assert row["rollout/generated_tokens"] == sum(tokens) and (actor == "teacher") == any(tokens[8:])
