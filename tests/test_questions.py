"""The four questions on planted cases, measured: a scripted or a tiny teacher, a tiny student that plays."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import yaml
from api_server import ApiServer
from test_checking import failed, taught_by_api
from typer.testing import CliRunner

import opd_agents as opd
from opd_agents.batch import range_of
from opd_agents.checking import check
from opd_agents.cli import app
from opd_agents.config import RunConfig
from opd_agents.correction.evidence import Arm
from opd_agents.policies.base import Action, History
from opd_agents.policies.models import Head
from opd_agents.questions import Asked, ask
from opd_agents.recommending import Choice
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.teachers import Capability
from opd_agents.teachers.local import LocalTeacher
from opd_agents.types import Actor, StopReason

HERE, RIGHT, WRONG = "test_questions", "yes, sir", "Go on."
ACTS_ONLY: dict[str, Any] = {
    "loss": {"components": {"verifier": tiny.POLICY}},
    "correction": tiny.LOOSE | {"propose": {"where": "disagreed"}},
}


class Track(tiny.Parity):
    """So many texts, the last of which must be right: whatever was said before it."""

    def success(self) -> float | bool:
        return len(self.answers) == self.wanted and self.answers[-1] == RIGHT


class Unforkable(Track):
    fork_mode: ClassVar = "none"

    def digest_text(self) -> str:
        return repr(self.answers)


class Scripted:
    """Says what is right; a ``lost`` one only where it has said so from the first turn on."""

    can: ClassVar = frozenset({Capability.ACT})
    tokens = flops = 0

    def __init__(
        self, model: str | None, chat: Any, *, dtype: str, temperature: float, lost: bool = False
    ) -> None:
        self.lost = lost
        self.greedy = self

    def act(self, histories: Sequence[History]) -> list[Action]:
        texts = [
            WRONG if self.lost and any(t.action != RIGHT for t in one.turns) else RIGHT for one in histories
        ]
        return [Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=text) for text in texts]


class Foreign(LocalTeacher):
    """Does what is right, and finds probable what its student never says."""

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=RIGHT) for _ in histories]

    def head(self) -> Head:
        return dataclasses.replace(super().head(), factor=-1.0)


opd.register("planted/Track-v0", f"{HERE}:Track")
opd.register("planted/Unforkable-v0", f"{HERE}:Unforkable")


def config(
    folder: Path, models: Path, kind: str, env: str = "Track", turns: int = 3, **changes: Any
) -> RunConfig:
    environment = {"id": f"planted/{env}-v0", "options": {"wanted": turns}}
    options = changes.pop("options", {})
    teacher = {"kind": f"{HERE}:{kind}", "options": options} | (
        {"model": str(models)} if kind == "Foreign" else {}
    )
    return tiny.mix(folder / "run", models, teacher=teacher, environments=[environment], **changes)


def session_of(loaded: RunConfig) -> Session:
    folder = RunFolder(Path(loaded.folder), loaded.model_dump(mode="json"), resume=False)
    return load_session(loaded, folder)


def asked_of(loaded: RunConfig, rollouts: int = 24) -> Asked:
    return ask(session_of(loaded), rollouts)


def test_a_teacher_that_is_no_better(tmp_path: Path, tiny_student: Path) -> None:
    """The student's own weights: nothing to tell apart, in distributions, in text or in actions."""
    found = asked_of(tiny.mix(tmp_path / "run", tiny_student, student={"model": str(tiny_student)}))
    figures, gap = found.figures, found.answers.gap
    assert figures.kl is not None and abs(figures.kl.value) < 1e-6
    assert figures.overlap is not None and figures.overlap.value == 1
    assert figures.perplexity == figures.own_perplexity
    assert gap.holds is False and gap.sure and found.answers.compatible.holds
    assert (
        found.recommendation.choice is Choice.RL and 0 < figures.student.wins < 24 == figures.teacher.played
    )


@pytest.mark.parametrize(
    ("turns", "lost", "choice"),
    [(3, False, Choice.OPD), (3, True, Choice.SFT), (1, False, Choice.SFT)],
    ids=["sound", "lost", "one turn"],
)
def test_a_teacher_that_only_acts(
    turns: int, lost: bool, choice: Choice, tmp_path: Path, tiny_teacher: Path
) -> None:
    found = asked_of(
        config(tmp_path, tiny_teacher, "Scripted", turns=turns, options={"lost": lost}, **ACTS_ONLY)
    )
    figures, answers = found.figures, found.answers
    assert figures.teacher == Arm(24, 24) and answers.gap.holds and answers.gap.sure
    assert figures.kl is None and figures.overlap is None
    assert answers.horizon.holds is (turns > 1) and answers.horizon.sure
    assert answers.reliable.holds is (None if turns == 1 else not lost)
    assert found.recommendation.choice is choice
    ranges = [(depth.first, depth.last) for depth in figures.depths]
    assert ranges == [(1, 1), (2, 2), (3, 4)][: range_of(turns - 1) + 1]
    for depth in figures.depths[1:]:
        states = depth.alone.wins  # some of the student's episodes end early, as their context is full
        assert states > 12 and depth.continued == Arm(0 if lost else states, states)


def test_a_teacher_of_other_patterns(tmp_path: Path, tiny_teacher: Path) -> None:
    found = asked_of(config(tmp_path, tiny_teacher, "Foreign"))
    figures, compatible = found.figures, found.answers.compatible
    assert figures.kl is not None and figures.log_ratio is not None and figures.log_ratio.value > 1
    assert found.answers.gap.holds and compatible.holds is False and compatible.sure
    assert found.recommendation.choice is Choice.SFT and "patterns" in found.recommendation.reason


def test_a_teacher_that_is_told_after_the_episode(tmp_path: Path, tiny_teacher: Path) -> None:
    """What it would do without that says nothing of it."""
    told = {"kind": "self", "weights": "live", "conditioning": {"sources": ["feedback"]}}
    distill = {"loss": {"components": {"distill": tiny.DISTILL | {"ratio_clip": None}}}, "correction": None}
    found = asked_of(tiny.mix(tmp_path / "run", tiny_teacher, teacher=told, **distill))
    assert found.figures.teacher == Arm() and found.figures.is_student and found.figures.kl is not None
    assert "(feedback)" in found.answers.gap.says and found.answers.reliable.holds is None


def test_an_environment_that_cannot_fork(tmp_path: Path, tiny_teacher: Path) -> None:
    found = asked_of(
        config(tmp_path, tiny_teacher, "Scripted", "Unforkable", loss=ACTS_ONLY["loss"], correction=None)
    )
    assert found.answers.reliable.holds is None and "fork_mode is none" in found.answers.reliable.says
    assert found.figures.agreement == Arm() and found.recommendation.choice is Choice.OPD
    assert "unknown: compatible, reliable" in found.recommendation.reason


def test_figures_are_those_of_the_student_before_the_step(tmp_path: Path, tiny_teacher: Path) -> None:
    """`check` asks first, and what it spends counts in no total."""
    loaded = tiny.mix(tmp_path / "run", tiny_teacher)
    session = session_of(loaded)
    before = {name: weight.clone() for name, weight in session.model.state_dict().items()}
    found = ask(session, 8)
    session.count(sampled_for="rollout")
    assert session.totals["flops"] == session.totals["teacher_tokens"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in session.model.state_dict().items())
    [stage] = check(tiny.mix(tmp_path / "other", tiny_teacher), rollouts=8)
    assert stage.questions is not None and stage.questions.figures == found.figures


def test_the_command(tmp_path: Path, tiny_teacher: Path) -> None:
    file = tmp_path / "run.yaml"
    lost = config(tmp_path, tiny_teacher, "Scripted", options={"lost": True}, **ACTS_ONLY)
    file.write_text(yaml.safe_dump(lost.model_dump(mode="json")))
    done = CliRunner().invoke(app, ["check", str(file), "--rollouts", "8", "--json"])
    [stage] = json.loads(done.stdout)
    assert done.exit_code == 0 and stage["passed"]  # to advise against it is no failure
    assert stage["questions"]["recommendation"]["choice"] == Choice.SFT
    assert stage["questions"]["figures"]["teacher"]["share"] == 1
    shown = CliRunner().invoke(app, ["check", str(file), "--rollouts", "8"]).stdout
    assert "SFT first" in shown and "reliable" in shown and "turns 3-4" in shown
    left_out = CliRunner().invoke(app, ["check", str(file), "--rollouts", "0"]).stdout
    assert "advice" not in left_out and "loss" in left_out


def test_a_teacher_that_is_paid_is_asked_where_a_number_is_given(tmp_path: Path) -> None:
    with ApiServer(lambda body: RIGHT) as server:
        loaded = taught_by_api(tmp_path, server.url, None)
        [stage] = check(loaded, rollouts=None)
        assert stage.questions is None and "paid for" in str([finding.says for finding in stage.findings])
        requests = len(server.bodies)
        [stage] = check(loaded, rollouts=4)
    assert stage.questions is not None and stage.questions.figures.teacher == Arm(4, 4)
    assert len(server.bodies) > 2 * requests > 0


def test_a_stage_without_a_teacher_is_not_asked(tmp_path: Path, tiny_teacher: Path) -> None:
    alone = {"loss": {"components": {"verifier": tiny.POLICY}}, "teacher": None, "correction": None}
    [stage] = check(tiny.mix(tmp_path / "run", tiny_teacher, **alone), rollouts=8)
    assert stage.passed and failed([stage]) == {} and stage.questions is None
    assert "not asked: the stage has no teacher" in [finding.says for finding in stage.findings]
