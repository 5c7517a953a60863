"""The weights with the best evaluation: which they are, that they outlive pruning, and what a kill leaves."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from opd_agents import trainer
from opd_agents.config import RunConfig
from opd_agents.errors import CheckpointError
from opd_agents.evaluation import evaluate
from opd_agents.runs import BEST, FORMER_BEST, RunFolder, best_checkpoint, checkpoints_in, latest_checkpoint
from opd_agents.trainer import train


class Killed(BaseException):
    pass


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Replaces the figures of evaluations: of step N by the N-th number."""

    def patch(successes: list[float]) -> None:
        original = trainer.evaluate_session

        def evaluate_session(session: Any) -> Any:
            figures = {"interval": [0.0, 1.0], "episodes": 1} | both(successes[session.step])
            monkeypatch.setattr(trainer, "summarise", lambda *_: figures)
            return original(session)

        monkeypatch.setattr(trainer, "evaluate_session", evaluate_session)

    return patch


def both(success: float) -> dict[str, float]:
    return {"success": success, "success_greedy": 1 - success}


def config(output: Path, teacher: Path, *overrides: str) -> RunConfig:
    """Evaluated after each of six steps, with checkpoints after 3 and 6."""
    evaluation = {"suite": tiny.SUITE, "limit": 1, "every": 1}
    settings = ("trainer.steps=6", "trainer.checkpoint_every=3", "trainer.keep_last=1", *overrides)
    return tiny.mix(output, teacher, *settings, evaluation=evaluation)


def best_step(run: Path) -> int:
    return int(json.loads((run / BEST / "evaluation.json").read_text())["step"])


@pytest.mark.parametrize(
    ("successes", "override", "step"),
    [
        ([0.1, 0.2, 0.5, 0.3, 0.5, 0.4, 0.5], "trainer.keep_best=success", 2),  # a tie keeps the earlier
        ([0.1, 0.2, 0.5, 0.3, 0.5, 0.4, 0.5], "trainer.keep_best=success_greedy", 0),
        ([0.9, 0.2, 0.5, 0.3, 0.5, 0.4, 0.5], "trainer.keep_best=success", 0),  # it only got worse
        ([0.0] * 6 + [0.1], "trainer.keep_best=success", 6),
    ],
)
def test_the_best_of_all_evaluations_is_kept(
    tiny_teacher: Path, tmp_path: Path, scored: Any, successes: list[float], override: str, step: int
) -> None:
    scored(successes)
    run = train(config(tmp_path / "run", tiny_teacher, override))
    assert best_step(run) == step
    best = json.loads((run / "summary.json").read_text())["best"]
    assert best == {"folder": "best", "step": step} | both(successes[step])
    assert [path.name for path in checkpoints_in(run)] == ["step-6"]  # pruned, and the best outlived it
    assert not (run / FORMER_BEST).exists()
    assert not (run / BEST / "optimizer.pt").exists()


def test_none_is_kept_where_none_is_wanted_or_evaluated(tiny_teacher: Path, tmp_path: Path) -> None:
    run = train(config(tmp_path / "run", tiny_teacher, "trainer.keep_best=", "trainer.steps=1"))
    for folder in (run, tiny_teacher):
        assert not (folder / BEST).exists()
        assert json.loads((folder / "summary.json").read_text())["best"] is None
    with pytest.raises(CheckpointError, match="keep_best"):
        best_checkpoint(run)


def test_the_kept_weights_are_those_of_their_step(tiny_teacher: Path, tmp_path: Path, scored: Any) -> None:
    scored([0.1, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2])
    run = train(config(tmp_path / "run", tiny_teacher, "trainer.keep_last=9"))
    best, then = (
        (folder / "model.safetensors").read_bytes() for folder in (run / BEST, run / "checkpoints/step-3")
    )
    assert best == then != (latest_checkpoint(run) / "model.safetensors").read_bytes()
    rows = evaluate(tiny.SUITE, [str(run / BEST)], limit=2, split="validation")["policies"]
    assert rows[0]["episodes"] == 2


def dying(at: float) -> Callable[..., None]:
    """``os.replace`` that kills before its n-th call (``at`` = n) or after it (n + 0.5)."""
    rename, calls = os.replace, itertools.count()

    def replace(old: Path, new: Path) -> None:
        number = next(calls)
        if number == at:
            raise Killed
        rename(old, new)
        if number + 0.5 == at:
            raise Killed

    return replace


def go_on(path: Path, successes: list[float]) -> None:
    """What a run of six steps does to its folder, with texts for weights."""
    folder = RunFolder(path, {}, resume=True)
    done = [int(checkpoint.name.removeprefix("step-")) for checkpoint in folder.checkpoints()]
    start = done[-1] if done else 0
    folder.truncate(start)
    kept = folder.best()
    assert kept is None or kept["step"] <= start
    for step in range(start + 1 if done else 0, 7):
        best = folder.best()
        if best is None or successes[step] > best["success"]:
            text = f"weights of step {step}"
            result = {"step": step, "success": successes[step]}
            folder.save_best(result, lambda new, text=text: (new / "model").write_text(text))
        if step in (3, 6):
            folder.save_checkpoint(step, lambda new: None, 1)


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "successes", [[0.1, 0.2, 0.5, 0.3, 0.6, 0.7, 0.2], [0.1, 0.2, 0.5, 0.3, 0.4, 0.6, 0.5]]
)
def test_a_kill_at_any_rename_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, successes: list[float]
) -> None:
    go_on(tmp_path / "whole", successes)
    for half in itertools.count():
        path = tmp_path / str(half)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(half / 2))
            try:
                go_on(path, successes)
                break
            except Killed:
                pass
        go_on(path, successes)
        assert contents(path) == contents(tmp_path / "whole"), half
    assert half > 20


@pytest.mark.parametrize("dies_before", [1, 5])
def test_a_killed_run_goes_on_to_the_same_best(
    tiny_teacher: Path, tmp_path: Path, scored: Any, dies_after: Any, dies_before: int
) -> None:
    """Also where the best is past the checkpoint that it goes on from, and the former best before it."""
    scored([0.1, 0.5, 0.2, 0.3, 0.9, 0.6, 0.7])
    whole = tiny.final_state(train(config(tmp_path / "whole", tiny_teacher)))
    with dies_after(dies_before):
        train(config(tmp_path / "run", tiny_teacher))
    assert tiny.final_state(train(config(tmp_path / "run", tiny_teacher), resume=True)) == whole


def test_the_last_stages_best_is_the_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stages: {warm: {}, improve: {}, polish: {}}")
    for stage in ("warm", "improve"):
        (tmp_path / stage / BEST).mkdir(parents=True)
    assert best_checkpoint(tmp_path) == tmp_path / "improve" / BEST
