"""Runs whose corrections are proposed in each of the ways that the config knows."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from opd_agents.config import load_config
from opd_agents.errors import ConfigError
from opd_agents.trainer import train

CORRECTION: dict[str, Any] = tiny.LOOSE | {"episodes_per_step": 4, "token_share": 0.9}
IMITATED = {"kind": "ce", "coef": 0.1, "select": {"source": "correction"}}


@pytest.mark.parametrize(
    "propose",
    [
        {"where": "improbable", "below": -0.5},
        {"where": "divergent", "above": 0.05},
        {"where": "disagreed"},
        {"where": "dropped", "rollouts": 4},
        {"by": "expert", "where": "disagreed"},
        {"by": "expert", "where": "dropped"},
    ],
)
def test_errors_are_located_corrected_and_learned_from(
    tmp_path: Path, tiny_teacher: Path, propose: dict[str, Any]
) -> None:
    """The expert needs no teacher, and one that only acts is enough where nothing is scored."""
    scored = propose.get("where") in ("improbable", "divergent")
    parts = {"fixed": IMITATED} | ({"distill": tiny.DISTILL} if scored else {"verifier": tiny.POLICY})
    teacher = {} if propose.get("by") == "expert" else {"teacher": {"model": str(tiny_teacher)}}
    config = tiny.mix(
        tmp_path / "run", tiny_teacher, "trainer.steps=3", loss={"components": parts}, evaluation=None,
        correction=CORRECTION | {"propose": propose}, **({"teacher": None} | teacher),
    )  # fmt: skip
    rows = tiny.metrics(train(config))
    assert sum(row["correction/proposed"] for row in rows) > 0
    assert rows[-1]["total/correction_tokens"] > 0


@pytest.mark.parametrize(
    ("propose", "told"),
    [
        ({"where": "dropped", "below": -1.0}, "`below` is of `where: improbable`"),
        ({"by": "judge", "samples": 2}, "`samples` is of `where: disagreed`"),
        ({"by": "judge", "where": "dropped"}, "`where` is not asked with `by: judge`"),
        ({"by": "expert", "where": "disagreed", "samples": 2}, "a scripted expert always does the same"),
        ({"by": "expert", "where": "divergent"}, "needs a `teacher"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, tiny_teacher: Path, propose: dict[str, Any], told: str
) -> None:
    raw = tiny.sft(
        tmp_path, method=None, rollout={"group_size": 4, "episodes_per_step": 8},
        loss={"components": {"p": tiny.POLICY}}, correction=CORRECTION | {"propose": propose},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=told):
        load_config(raw)
