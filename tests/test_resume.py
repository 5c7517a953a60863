"""A run that was stopped, interrupted or killed and resumed is the uninterrupted run, bit for bit."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from opd_agents import cli, trainer
from opd_agents.config import RunConfig, load_config
from opd_agents.errors import RunFolderError
from opd_agents.runs import checkpoints_in
from opd_agents.session import Session
from opd_agents.trainer import train, train_seeds

HERE = Path(__file__).parent
STEPS = 7  # with a checkpoint every second step


class Killed(BaseException):
    """Stands for a kill: nothing after it may count on having run."""


@pytest.fixture(scope="module")
def make(tiny_teacher: Path) -> Callable[..., RunConfig]:
    """The config of these tests, at a given output: every part of the trainer takes part."""

    def config(output: Path, *overrides: str) -> RunConfig:
        schedule = "trainer.learning_rate={kind: cosine, start: 0.01, end: 0.001}"
        evaluation = {"suite": tiny.SUITE, "limit": 4, "every": 3}
        parts = (f"trainer.steps={STEPS}", schedule, *overrides)
        return tiny.mix(output, tiny_teacher, *parts, evaluation=evaluation)

    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make: Callable[..., RunConfig]) -> dict[str, Any]:
    """What the uninterrupted run leaves."""
    state = tiny.final_state(train(make(tmp_path_factory.mktemp("whole") / "run")))
    rows = state["metrics"]
    assert sum(row["correction/accepted"] for row in rows) > 0
    assert sum(row["groups/nonzero"] for row in rows) > 0
    return state


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The training dies when ``step`` steps are done, without warning."""
    original = trainer.train_step

    def train_step(session: Session) -> dict[str, Any]:
        if session.step == step:
            raise Killed
        return original(session)

    monkeypatch.setattr(trainer, "train_step", train_step)


@pytest.mark.parametrize("step", [0, 3, 4, STEPS - 1])
def test_a_run_that_died_after_any_step_goes_on_as_if_it_had_not(
    tmp_path: Path,
    make: Callable[..., RunConfig],
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    config = make(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, step)
        train(config)
    assert len(checkpoints_in(tmp_path)) == min(step // 2, 2)
    assert tiny.final_state(train(config, resume=True)) == whole


def test_many_deaths(
    tmp_path: Path, make: Callable[..., RunConfig], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(tmp_path)
    for step in (1, 3, 2, 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_before(patch, step)
            train(config, resume=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "progr')
    assert tiny.final_state(train(config, resume=True)) == whole


def test_the_flops_of_a_resumed_run_are_exact(
    tmp_path: Path, make: Callable[..., RunConfig], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a float would round, beyond 2**53."""
    original, before = trainer.load_session, 2**60 + 1

    def load_session(config: RunConfig, *where: Any) -> Session:
        session = original(config, *where)
        session.totals["flops"] += 0 if session.step else before
        return session

    monkeypatch.setattr(trainer, "load_session", load_session)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, 3)
        train(make(tmp_path, "trainer.steps=4"))
    rows = tiny.metrics(train(make(tmp_path, "trainer.steps=4"), resume=True))
    assert [row["total/flops"] - before for row in rows] == [
        row["total/flops"] for row in whole["metrics"][:4]
    ]


def test_a_run_with_a_budget_of_flops(
    tmp_path: Path, make: Callable[..., RunConfig], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedule then follows the FLOPs spent, those before the resume included."""
    budget = f"trainer.flops={whole['metrics'][4]['total/flops'] - 1}"
    straight = tiny.final_state(train(make(tmp_path / "a", budget)))
    assert len(straight["metrics"]) < STEPS
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, 3)
        train(make(tmp_path / "b", budget))
    assert tiny.final_state(train(make(tmp_path / "b", budget), resume=True)) == straight


def test_a_fixed_set_of_expert_episodes_and_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> RunConfig:
        raw = tiny.sft(tmp_path / name, environments=[{"id": "tiny/Parity-v0", "limit": 5}])
        return load_config(raw, "trainer.optimizer=adamw", "trainer.steps=5", "trainer.checkpoint_every=3")

    straight = tiny.final_state(train(config("a")))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, 4)
        train(config("b"))
    assert tiny.final_state(train(config("b"), resume=True)) == straight


# ---- stages and seeds ----


def staged(make: Callable[..., RunConfig], output: Path) -> RunConfig:
    raw = make(output, "trainer.steps=4", "evaluation=").model_dump(mode="json", exclude_unset=True)
    loss, correction = raw.pop("loss"), raw.pop("correction")
    warm = {"method": "sft", "rollout": {"source": "expert"}, "trainer": {"steps": 3}}
    return load_config(raw | {"stages": {"warm": warm, "improve": {"loss": loss, "correction": correction}}})


@pytest.fixture(scope="module")
def whole_stages(tmp_path_factory: pytest.TempPathFactory, make: Callable[..., RunConfig]) -> Path:
    return train(staged(make, tmp_path_factory.mktemp("stages") / "run"))


@pytest.mark.parametrize(("stage", "step"), [("warm", 2), ("improve", 0), ("improve", 3)])
def test_a_run_with_stages_goes_on_where_it_died(
    tmp_path: Path,
    make: Callable[..., RunConfig],
    whole_stages: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    step: int,
) -> None:
    original = trainer.train_step

    def train_step(session: Session) -> dict[str, Any]:
        if session.step == step and session.config.name.endswith(stage):
            raise Killed
        return original(session)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "train_step", train_step)
        train(staged(make, tmp_path))
    resumed = train(staged(make, tmp_path), resume=True)
    for name in ("warm", "improve"):
        assert tiny.final_state(resumed / name) == tiny.final_state(whole_stages / name)
    summaries = [
        tiny.timeless(json.loads((run / "summary.json").read_text())) for run in (whole_stages, resumed)
    ]
    assert summaries[0] == summaries[1]


def test_seeds_go_on_where_they_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> RunConfig:
        return load_config(tiny.sft(tmp_path / name), "trainer.steps=3")

    straight = [tiny.final_state(run) for run in train_seeds(config("a"), [0, 1, 2])]
    original = trainer.train_step

    def train_step(session: Session) -> dict[str, Any]:
        if session.step == 2 and session.config.seed == 1:
            raise Killed
        return original(session)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "train_step", train_step)
        train_seeds(config("b"), [0, 1, 2])
    assert [tiny.final_state(run) for run in train_seeds(config("b"), [0, 1, 2], resume=True)] == straight


# ---- what a resume refuses, leaves alone, or starts ----


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(load_config(tiny.sft(tmp_path), "trainer.steps=2"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    stop_before(monkeypatch, 2)
    assert train(load_config(tiny.sft(tmp_path), "trainer.steps=2"), resume=True) == run
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in after if before.get(path) != after[path]} <= {"config.yaml"}


def test_a_finished_run_is_not_overwritten_nor_changed(tmp_path: Path) -> None:
    train(load_config(tiny.sft(tmp_path), "trainer.steps=1"))
    with pytest.raises(RunFolderError, match="--resume"):
        train(load_config(tiny.sft(tmp_path), "trainer.steps=1"))
    with pytest.raises(RunFolderError, match=r"trainer\.steps: 1 -> 2"):
        train(load_config(tiny.sft(tmp_path), "trainer.steps=2"), resume=True)


def test_resuming_what_does_not_exist_starts_it(tmp_path: Path) -> None:
    run = train(load_config(tiny.sft(tmp_path / "new"), "trainer.steps=1"), resume=True)
    assert [row["step"] for row in tiny.metrics(run)] == [1]


def test_a_moved_run_goes_on(
    tmp_path: Path, make: Callable[..., RunConfig], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, 3)
        train(make(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert tiny.final_state(train(make(tmp_path / "there"), resume=True)) == whole


def test_a_full_disk_leaves_the_older_checkpoint_and_says_what_to_do(
    tmp_path: Path, make: Callable[..., RunConfig], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, save = tmp_path / "x.yaml", Session.save
    written(make(tmp_path / "run"), file)

    def full(session: Session, folder: Path, optimizer_state: Any) -> None:
        save(session, folder, optimizer_state)
        if session.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", full)
        result = CliRunner().invoke(cli.app, ["train", str(file)], env={"OPD_DEBUG": "0"})
    assert result.exit_code == 1
    assert "disk is full" in result.stderr
    assert "--resume" in result.stderr
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    assert tiny.final_state(train(load_config(file), resume=True)) == whole


# ---- real processes, real signals ----


def environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OPD_DEBUG": "0"}


def written(config: RunConfig, file: Path) -> Path:
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return file


def kill_and_finish(config: RunConfig, file: Path, kills: list[str]) -> list[str]:
    """Run ``killing.py``; what it reports: a line for each kill and one for the end."""
    command = [sys.executable, str(HERE / "killing.py"), str(written(config, file)), *kills]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def at_random(draw: random.Random, steps: range, count: int) -> list[str]:
    """Up to a tenth of a second, which is about a step, after drawn steps, in their order."""
    return [f"time:{step}:{draw.random() / 10:.3f}" for step in sorted(draw.choices(steps, k=count))]


def test_killed_and_resumed(tmp_path: Path, make: Callable[..., RunConfig], whole: dict[str, Any]) -> None:
    rename = "os.replace:checkpoints/step-2"
    kills = [f"before:{rename}", f"after:{rename}", *at_random(random.Random(0), range(2, 5), 1)]
    assert kill_and_finish(make(tmp_path / "run"), tmp_path / "x.yaml", kills) == [
        *["killed"] * 3,
        "finished",
    ]
    assert tiny.final_state(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_killed_ten_times_and_resumed(tmp_path: Path, make: Callable[..., RunConfig], seed: int) -> None:
    draw = random.Random(seed)
    kills = [
        f"time:0:{draw.random() / 10:.3f}",
        "before:os.replace:checkpoints/step-2",
        "after:os.replace:checkpoints/step-2",
        "after:os.replace:checkpoints/step-2 ",  # to make room for step 6
        "before:os.replace:checkpoints/step-10",
        *at_random(draw, range(8, 16), 5),
    ]
    run = train(make(tmp_path / "whole", "trainer.steps=20"))
    reported = kill_and_finish(make(tmp_path / "run", "trainer.steps=20"), tmp_path / "x.yaml", kills)
    assert reported == [*["killed"] * 10, "finished"]
    assert tiny.final_state(tmp_path / "run") == tiny.final_state(run)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    tmp_path: Path, make: Callable[..., RunConfig], whole: dict[str, Any]
) -> None:
    file = written(make(tmp_path / "run"), tmp_path / "x.yaml")
    command = [sys.executable, "-m", "opd_agents", "train", str(file)]
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 60
    while not metrics.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert "--resume" in err
    last = tiny.metrics(tmp_path / "run")[-1]["step"]
    assert last < STEPS
    assert f"Stopped after step {last}" in " ".join(err.split())
    assert checkpoints_in(tmp_path / "run")[-1].name == f"step-{last}"
    assert tiny.final_state(train(load_config(file), resume=True)) == whole
