"""Episodes of before the run: read back token by token, and learned from as if they were played now."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from opd_agents.config import load_config
from opd_agents.config.loading import RunConfig
from opd_agents.errors import AlignmentError, ConfigError, DataError
from opd_agents.trainer import train

TEACHES = {"kind": "policy", "references": {"teacher": {"discount": 0.0}}}
DISTILLED = {"components": {"distill": TEACHES}}


def described(output: Path, tiny_student: Path, teacher: Path, tiny_episodes: Path) -> dict[str, Any]:
    return {
        "name": "stored", "output": str(output), "imports": ["tiny"], "student": {"model": str(tiny_student)},
        "teacher": {"model": str(teacher)},
        "rollout": {"source": {"trajectories": str(tiny_episodes)}, "episodes_per_step": 6},
        "loss": DISTILLED,
        "trainer": {"steps": 3, "learning_rate": 0.001, "tensorboard": False},
    }  # fmt: skip


@pytest.fixture
def make(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, tiny_episodes: Path
) -> Callable[..., RunConfig]:
    def made(*overrides: str, file: Path = tiny_episodes, **changes: Any) -> RunConfig:
        return load_config(
            described(tmp_path / "run", tiny_student, tiny_teacher, file) | changes, *overrides
        )

    return made


def test_a_run_learns_from_them_and_generates_nothing(make: Callable[..., RunConfig]) -> None:
    rows = tiny.metrics(train(make("trainer.steps=8", "trainer.learning_rate=0.003")))
    assert rows[-1]["distill/kl"] < 0.9 * rows[0]["distill/kl"]
    assert rows[-1]["total/generated_tokens"] == 0 < rows[-1]["total/teacher_tokens"]
    assert [row["recorded/epoch"] for row in rows[:4]] == [0.5, 1.0, 1.5, 2.0]
    assert {row["recorded/conversations"] for row in rows} == {6}
    assert "rollout/success" not in rows[0] and "recorded/kl" not in rows[0]


def test_at_the_start_they_are_what_the_student_would_have_played(
    make: Callable[..., RunConfig], tmp_path: Path, tiny_episodes: Path
) -> None:
    """A step of a run that plays the very tasks itself, and learns from what it played, is the same step."""
    folder = train(make("trainer.steps=1", "rollout.episodes_per_step=12"))
    file = folder / "trajectories" / "step-000001.jsonl"
    learned = [json.loads(line)["trajectory"] for line in file.read_text().splitlines()]
    played = [json.loads(line)["trajectory"] for line in tiny_episodes.read_text().splitlines()]
    found = {one["task"]["id"]: one for one in learned}
    assert all(one["stored"] for one in learned)
    for one in played:
        assert found[one["task"]["id"]]["turns"] == one["turns"]


def test_a_student_that_did_not_play_them_is_refused(
    make: Callable[..., RunConfig], tiny_teacher: Path
) -> None:
    with pytest.raises(AlignmentError, match="re-scores the sampled tokens"):
        train(make(student={"model": str(tiny_teacher)}))


def test_a_resumed_run_is_the_same_run(make: Callable[..., RunConfig]) -> None:
    config = make("trainer.steps=4", "trainer.checkpoint_every=2")
    folder = train(config)
    whole = tiny.final_state(folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-4")
    assert tiny.final_state(train(config, resume=True)) == whole


def spoiled(change: str, row: dict[str, Any]) -> dict[str, Any]:
    episode = row["trajectory"]
    turn = episode["turns"][0]
    match change:
        case "no episode":
            return {"messages": []}
        case "test":
            episode["task"]["split"] = "test"
        case "expert":
            turn |= {"actor": "expert", "logprobs": None}
        case "cut":
            turn["logprobs"] = turn["logprobs"][1:]
        case "cooler":
            episode["temperature"] = 0.7
        case "prompt":
            turn["context_ids"] = turn["context_ids"][1:]
        case "ids":
            turn["action_ids"][0] += 1
        case "failed":
            episode |= {"outcome": "error", "error": "it broke"}
    return row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no episode", "line 2: no episode"),
        ("test", "is of the split `test`"),
        ("expert", "turn 0 is the expert's"),
        ("cut", "log-probs for .* ids"),
        ("cooler", r"sampled at temperature 0\.7, and rollout\.temperature is 1"),
        ("prompt", "first prompt is not what the student's chat template makes"),
        ("ids", "ids of turn 0 are not the tokens of its text"),
        ("failed", "the episode failed: it broke"),
    ],
)
def test_what_is_no_episode_of_the_students_is_refused(
    change: str, message: str, make: Callable[..., RunConfig], tiny_episodes: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in tiny_episodes.read_text().splitlines()]
    rows[1] = spoiled(change, copy.deepcopy(rows[1]))
    file = tmp_path / "spoiled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        train(make(file=file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correction": {}}, "neither corrected nor given demonstrations"),
        ({"rollout": {"source": {"trajectories": "x"}, "group_size": 2}}, "group_size must be 1"),
        (
            {"loss": {"components": {"c": {"kind": "ce", "select": {"actor": "teacher"}}}}},
            "actor `teacher` would select nothing: this run has student",
        ),
    ],
)
def test_what_needs_live_episodes_is_refused(
    changes: dict[str, Any], message: str, make: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)
