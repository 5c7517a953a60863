"""What a step's line tells of references and schedules."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny

from opd_agents.config import load_config
from opd_agents.runs import latest_checkpoint
from opd_agents.trainer import train

STEPS = 3


def run(output: Path, checkpoint: Path, /, **changes: Any) -> list[dict[str, Any]]:
    raw = {
        "name": "tiny",
        "output": str(output),
        "imports": ["tiny"],
        "student": {"model": str(latest_checkpoint(checkpoint))},
        "chat": tiny.BRIEF,
        "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {"episodes_per_step": 4, "group_size": 2, **tiny.LIMITS},
        "trainer": {"steps": STEPS, "learning_rate": 0.02, "optimizer": "muon", "tensorboard": False},
    }
    return tiny.metrics(train(load_config(raw | changes)))


def test_every_schedule_is_told_by_its_place(tmp_path: Path, tiny_teacher: Path) -> None:
    """Its value in the step itself, not in the next; a coefficient that is constant is not told."""
    ramp = {"kind": "linear", "start": 3.0, "end": 9.0}
    follows = {"kind": "adaptive", "metric": "kl/base", "target": 1e-5, "start": 1, "rate": 0.5}
    follows |= {"low": 0.1, "high": 9}
    joint = tiny.POLICY | {"references": {"base": {"reference": "base", "coef": follows}}}
    rows = run(
        tmp_path, tiny_teacher, references={"base": {"kind": "self"}},
        loss={"components": {"joint": joint, "entropy": {"kind": "entropy", "coef": 0.1}}},
        rollout={"episodes_per_step": 4, "group_size": 2, **tiny.LIMITS, "max_action_tokens": ramp},
    )  # fmt: skip
    place = "scheduled/loss.components.joint.references.base.coef"
    told = [{key: value for key, value in row.items() if key.startswith("scheduled/")} for row in rows]
    assert [one["scheduled/rollout.max_action_tokens"] for one in told] == pytest.approx([3, 5, 7])
    assert [sorted(one) for one in told] == [[place, "scheduled/rollout.max_action_tokens"]] * STEPS
    assert rows[0]["kl/base"] == pytest.approx(0, abs=1e-6) and rows[1]["kl/base"] > 1e-3
    assert [one[place] for one in told] == pytest.approx([1, math.exp(-0.5), 1])


def test_what_a_reference_was_silent_about_is_no_agreement(tmp_path: Path, tiny_teacher: Path) -> None:
    """The distance to a conditioned teacher is over the episodes that it had something to say about."""
    said = "PEER {context}"
    peers = {"kind": "self", "conditioning": {"sources": ["peer"], "template": said}}
    always = {"kind": "self", "conditioning": {"sources": ["text"], "text": "x", "template": said}}
    rows = run(
        tmp_path, tiny_teacher, teacher=peers, references={"always": always},
        rollout={"episodes_per_step": 8, "group_size": 2, **tiny.LIMITS},
        loss={
            "components": {
                "d": {"kind": "distill", "divergence": "reverse_kl"},
                "a": {"kind": "distill", "divergence": "reverse_kl", "reference": "always"},
            }
        },
    )  # fmt: skip
    taught = [row for row in rows if row["loss/d"] > 0]
    assert taught and any(0 < row["rollout/success"] < 0.8 for row in taught)  # some had no peer
    for row in taught:
        assert row["distill/kl"] == pytest.approx(row["loss/d"], rel=1e-4)  # the loss's mean is over the same
        assert row["kl/always"] == pytest.approx(row["loss/a"], rel=1e-4)
