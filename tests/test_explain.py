"""`rollout --explain`: what is shown is what stands in the run folder, and what training does."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import refused, run

from opd_agents import trainer
from opd_agents.config import RunConfig, load_config
from opd_agents.errors import OpdError, UserError
from opd_agents.explaining import TRIES, Explained, explain_config, explain_run
from opd_agents.session import Session
from opd_agents.types import Actor

CORRECTION: dict[str, Any] = tiny.LOOSE | {
    "episodes_per_step": 4, "token_share": 0.9, "propose": {"by": "expert", "where": "disagreed"},
    "audit": {"share": 1.0, "rollouts": 3},
}  # fmt: skip
PARTS = {
    "verifier": tiny.POLICY,
    "imitation": {"kind": "ce", "coef": 0.1, "select": {"source": "correction", "actor": "expert"}},
}


def corrected(output: Path, student: Path, *overrides: str) -> RunConfig:
    """The expert corrects a student that goes wrong about every other time."""
    raw = tiny.mix(output, student, teacher=None, loss={"components": PARTS}, evaluation=None,
                   correction=CORRECTION, student={"model": str(student)}).model_dump()  # fmt: skip
    return load_config(raw, "trainer.steps=2", *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Path:
    return trainer.train(corrected(tmp_path_factory.mktemp("explain") / "run", tiny_student))


def first_accepted(file: Path) -> dict[str, Any]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return next(row for row in rows if row["repair"] and row["repair"]["accepted"])


def test_the_newest_accepted_repair_of_a_run_is_shown(trained: Path) -> None:
    done = run("rollout", str(trained), "--explain")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    row = first_accepted(trained / "trajectories" / "step-000002.jsonl")
    repair, evidence = row["repair"], row["repair"]["evidence"]
    assert shown.startswith(f"step 2, train task {row['trajectory']['task']['id']} of tiny/Parity-v0")
    assert f"The error: action {repair['turn'] + 1}, the first one that is none of 1 of the expert's" in shown
    assert f">{repair['turn'] + 1}" in shown
    for action in (repair["student_action"], repair["teacher_action"]):
        assert " ".join(action.split()) in shown
    for name, label in (("repair", "after the repair"), ("own", "after its own action")):
        assert f"{label} {evidence[name][0]} of {evidence[name][1]}" in shown
        assert f"{repair['audit'][name][0]} of {repair['audit'][name][1]}" in shown
    assert f"accepted: better than every rival with a probability of {evidence['better']:.3f}" in shown
    assert f"Learned from: {row['trajectory']['uid']}-repair" in shown and "in imitation" in shown


def test_every_action_is_shown_with_its_credit_and_the_components_that_count_it(trained: Path) -> None:
    found = explain_run(trained, step=1)
    row = first_accepted(trained / "trajectories" / "step-000001.jsonl")
    assert found.episode.trajectory.uid == row["trajectory"]["uid"]
    assert [set(turn) for turn in found.episode.counted] == [{"verifier"}] * len(found.episode.counted)
    assert all("verifier.verifier" in credit.advantage for credit in found.episode.credits)
    (branch,) = found.branches
    turn = found.repair["turn"]
    assert branch.trajectory.turns[turn].actor is Actor.EXPERT
    assert branch.counted[turn] == {"imitation": 1.0}
    assert not any(counted for k, counted in enumerate(branch.counted) if k != turn)


def told(found: Explained) -> tuple[object, ...]:
    return found.episode.trajectory, found.repair, [branch.trajectory for branch in found.branches]


def test_a_config_is_explained_by_its_first_steps_and_nothing_is_learned(
    trained: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, learned = trainer.train_step, list[bool]()

    def watched(session: Session) -> dict[str, Any]:
        before = [one.clone() for one in session.model.parameters()]
        row = step(session)
        after = session.model.parameters()
        learned.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return row

    monkeypatch.setattr(trainer, "train_step", watched)
    heard: list[str] = []
    found = explain_config(corrected(tmp_path / "run", tiny_student), heard.append)
    assert told(found) == told(explain_run(trained, step=1))
    assert learned == [False] and "accepted" in heard[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("success", "why"), [(1.0, "no episode failed: give harder tasks"), (0.5, "no error was located")]
)
def test_where_there_is_nothing_to_repair_it_is_said_why(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, success: float, why: str
) -> None:
    played: list[Session] = []

    def step(session: Session) -> dict[str, Any]:
        played.append(session)
        figures = {"rollout/episodes": 8, "rollout/success": success}
        return figures | {"step": len(played), "correction/proposed": 0, "correction/accepted": 0}

    monkeypatch.setattr(trainer, "train_step", step)
    with pytest.raises(OpdError, match=why) as caught:
        explain_config(corrected(tmp_path / "run", tiny_student))
    assert not isinstance(caught.value, UserError) and len(played) == TRIES
    assert f"step {TRIES}: 8 episodes, {round(8 * (1 - success))} without success" in str(caught.value)


def test_what_cannot_be_explained_is_refused(trained: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    assert "holds no episode with a repair." in refused("rollout", str(tiny_teacher), "--explain")
    assert "with a repair in step 7." in refused("rollout", str(trained), "--explain", "--step", "7")
    assert "no run folder" in refused("rollout", str(tmp_path), "--explain")
    assert "no section `correction`" in refused("rollout", "babyai_opd", "--explain")
    assert "whose config is settled" in refused("rollout", str(trained), "seed=1", "--explain")
    assert "--step is of a run folder" in refused("rollout", "quickstart", "--explain", "--step", "1")
    assert "and nothing else" in refused("rollout", str(trained), "--explain", "--policy", "expert")
    assert "Say who acts" in refused("rollout", "opd_agents/OrderDesk-v0")
    desk = ("opd_agents/OrderDesk-v0", "--policy", "expert")
    assert "--option" in refused("rollout", *desk, "level=easy")
