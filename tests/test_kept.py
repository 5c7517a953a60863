"""What came of repairs, learned from in later steps, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from test_resume import Killed, stop_before

from opd_agents.config import RunConfig
from opd_agents.errors import ConfigError
from opd_agents.session import KEPT
from opd_agents.trainer import train

EASILY = {
    "episodes_per_step": 4, "audit": None, "token_share": 0.9, "kept": 2, "practice": 2,
    "verify": {"rollouts": [1], "rivals": []}, "propose": {"by": "expert", "where": "disagreed"},
}  # fmt: skip
LOSS = {
    "mended": {"kind": "ce", "select": {"source": "correction", "actor": "expert"}},
    "practised": {"kind": "policy", "select": {"actor": "student"}, "rewards": {
        "key_step": {"key_step": "match", "normalise": "none"}}},
}  # fmt: skip


def run_of(output: Path, teacher: Path, *overrides: str, **correction: Any) -> RunConfig:
    given = {"correction": EASILY | correction, "loss": {"components": LOSS}}
    return tiny.mix(output, teacher, "trainer.steps=5", "trainer.checkpoint_every=1", *overrides, **given)


def test_repairs_are_learned_from_as_long_as_they_are_not_too_stale(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    rows = tiny.metrics(train(run_of(tmp_path / "run", tiny_teacher)))
    new = [row["correction/accepted"] + row["practice/episodes"] for row in rows]
    assert sum(new) > 0 and rows[0]["correction/kept"] == 0
    assert [row["correction/kept"] for row in rows] == [sum(new[max(0, n - 2) : n]) for n in range(len(new))]


def test_a_resume_has_what_was_kept(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(run_of(tmp_path / "whole", tiny_teacher))
    config = run_of(tmp_path / "broken", tiny_teacher)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, 4)
        train(config)
    checkpoint = sorted((tmp_path / "broken" / "checkpoints").iterdir())[-1]
    assert (checkpoint / KEPT).read_text()
    assert tiny.final_state(train(config, resume=True)) == tiny.final_state(whole)


def test_without_it_a_checkpoint_has_no_such_file(tmp_path: Path, tiny_teacher: Path) -> None:
    run = train(run_of(tmp_path / "run", tiny_teacher, "trainer.steps=1", kept=0))
    assert not list(run.rglob(KEPT)) and "correction/kept" not in tiny.metrics(run)[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"practice": None}, "key_step is of the rollouts from states before accepted repairs"),
        ({"propose": {"by": "student"}}, "take `where: dropped`"),
    ],
)
def test_what_does_not_fit_is_told(
    tmp_path: Path, tiny_teacher: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run_of(tmp_path / "run", tiny_teacher, **change)
