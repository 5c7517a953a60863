"""What a step's line tells of references and schedules, of episodes and of tokens."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine import T, assigned_to, component, planned
from rewarded import Rewarded
from rolling import trajectory, turn

from opd_agents.batch import KINDS
from opd_agents.config import load_config
from opd_agents.episode_metrics import episode_metrics, recovery, refused_or_repeated
from opd_agents.loss import micro_losses
from opd_agents.runs import latest_checkpoint
from opd_agents.token_metrics import token_metrics
from opd_agents.trainer import train
from opd_agents.types import Outcome, SpanKind, ToolCall

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
        assert 0 < row["distill/overlap"] <= 1 and row["distill/teacher_entropy"] > 0


# ---- of episodes ----


def episode(uid: str, actions: str, won: bool, group: str = "g", wrong: str = "", p: float = 0.5) -> Any:
    """A letter an action, of two tokens with probability ``p`` each; ``wrong``: the letters that a tool
    refuses."""
    turns = [
        dataclasses.replace(
            turn([1], [2, 3], logprobs=[math.log(p)] * 2), action=letter,
            tool_error="no" if letter in wrong else None,
        )
        for letter in actions
    ]  # fmt: skip
    outcome = Outcome.SUCCESS if won else Outcome.FAILURE
    return dataclasses.replace(trajectory(turns, uid=uid, group=group), outcome=outcome)


def test_passes_and_differences_within_groups() -> None:
    """By hand: of the first group 1 of 4 succeeds and of the second 3, of which two act alike."""
    first = [episode(f"a{i}", text, i == 0, "a") for i, text in enumerate(("xy", "xy", "xy", "z"))]
    second = [episode(f"b{i}", text, i < 3, "b") for i, text in enumerate(("x", "x", "y", "z"))]
    row = episode_metrics([*first, *second, episode("c", "x", True, "")])
    assert row["rollout/pass_at_2"] == pytest.approx((1 / 2 + 1) / 2)
    assert row["rollout/pass_at_4"] == 1
    assert row["rollout/distinct"] == pytest.approx((3 + 5) / (6 + 6))
    assert row["rollout/distinct_successes"] == pytest.approx(2 / 3)
    assert row["rollout/distinct_1"] == pytest.approx((2 / 14 + 2 / 8) / 2)  # every action is of the same two
    assert row["rollout/distinct_2"] == pytest.approx((1 / 7 + 1 / 4) / 2)
    assert row["rollout/action_tokens"] == 2
    assert not any("pass" in key or "distinct" in key for key in episode_metrics([first[0], second[0]]))
    assert "rollout/distinct_successes" not in episode_metrics(first)
    assert episode_metrics([]) == {}


def test_the_calibration_error_is_that_of_its_bins() -> None:
    sure = [episode(f"s{i}", "xx", i < 3, p=0.95) for i in range(4)]
    unsure = [episode(f"u{i}", "x", i < 1, p=0.25) for i in range(2)]
    row = episode_metrics([*sure, *unsure])
    assert row["calibration/confidence"] == pytest.approx((8 * 0.95 + 2 * 0.25) / 10)
    assert row["calibration/ece"] == pytest.approx((8 * abs(0.95 - 0.75) + 2 * abs(0.25 - 0.5)) / 10)
    certain = episode_metrics([episode("c", "x", True, p=1.0)])
    assert certain["calibration/ece"] == 0


def test_what_a_wrong_action_does_to_the_rest() -> None:
    played = (("abcd", False), ("ab", True), ("abc", True), ("a", False))
    rolled = [episode(actions, actions, won) for actions, won in played]
    wrong = [[False, True, True, False], [False, False], [True, False, False], [True]]
    row = recovery(rolled, wrong)
    assert row == pytest.approx(
        {
            "rollout/astray": 2 / 4,  # the last had no turn left
            "rollout/wrong_first": 3 / (2 + 2 + 1 + 1),
            "rollout/wrong_after": 1 / (2 + 2),
            "rollout/recovery": 1 / 2,
        }
    )
    assert recovery([rolled[1]], [wrong[1]]) == {"rollout/astray": 0, "rollout/wrong_first": 0}
    assert recovery([], []) == {}


def test_a_call_that_was_answered_in_this_state_is_not_repeated() -> None:
    """Unlike one that was refused."""
    call = ToolCall("look", {})
    one = episode("0", "abcde", False, wrong="a")
    states = ("s", "s", "s", "t", "s")
    calls = ((call,), (call,), (call,), (call,), ())
    turns = [
        dataclasses.replace(turn, state_digest=state, calls=made)
        for turn, state, made in zip(one.turns, states, calls, strict=True)
    ]
    found = list(refused_or_repeated(dataclasses.replace(one, turns=tuple(turns))))
    assert found == [True, False, True, False, False]


# ---- of tokens ----


def test_figures_of_tokens_are_those_of_their_places(rewarded: Rewarded) -> None:
    """Entropy and KL by kind and depth, the signal to noise of d, and what components see, one by one."""
    experience = rewarded.experience(rewarded.episodes)
    joint = {"kind": "policy", "references": {"teacher": {"coef": 0.5}}, "rewards": {"verifier": {}}}
    ends = {"kind": "ce", "select": {"spans": ["special"]}}
    raw: dict[str, dict[str, Any]] = {"distill": tiny.DISTILL, "joint": joint, "ends": ends}
    components = {name: component(**one) for name, one in raw.items()}
    row = token_metrics(experience, assigned_to(experience, components), components, recorded=False)
    packed, frozen = experience.packed, experience.frozen
    teacher, special = frozen.references["teacher"], KINDS.index(SpanKind.SPECIAL)
    turn_of = [packed.turns[number][1] for number in packed.turn.tolist()]
    for key, values in {"student/entropy": frozen.entropy, "distill/kl": teacher.kl}.items():
        assert values is not None
        deep = [v for v, turn in zip(values.tolist(), turn_of, strict=True) if turn in (2, 3)]
        assert row[f"{key}_turns_3_4"] == pytest.approx(sum(deep) / len(deep))
        assert row[key] == pytest.approx(float(values.mean()))
        assert row[f"{key}_special"] == pytest.approx(float(values[packed.kind == special].mean()))
    d = (teacher.logprob - frozen.logprob).double()
    means = torch.stack([d[packed.episode == e].mean() for e in range(len(rewarded.episodes))])
    assert row["distill/snr"] == pytest.approx(float(abs(means.mean()) / (means.std() / len(means) ** 0.5)))
    share = float((packed.kind == special).double().mean())
    assert row["selected/ends"] == pytest.approx(share) and row["spans/ends"] == pytest.approx(share)
    assert row["selected/distill"] == 1 and "spans/distill" not in row
    assert teacher.kl is not None
    assert row["top_token/distill"] == pytest.approx(float(teacher.kl.max() / teacher.kl.sum()))
    parts = assigned_to(experience, components).composed["joint"].parts
    ratio = float(parts["teacher"].norm() / parts["verifier"].norm())
    assert row["advantage_ratio/joint"] == pytest.approx(ratio)


def test_what_clipping_has_left_without_a_gradient_is_counted(rewarded: Rewarded) -> None:
    """In however many micro-batches, of the components that clip."""
    experience = rewarded.experience(rewarded.episodes)
    components = {"verifier": component(**tiny.POLICY), "distill": component(**tiny.DISTILL)}
    seen, packed = rewarded.seen(rewarded.episodes), experience.packed
    high, low = seen.r > 1.2, seen.r < 0.8
    expected = ((seen.verified > 0) & high) | ((seen.verified < 0) & low)
    for tokens in (400, 10_000):
        todo = planned(experience, components)
        for micro in packed.micro_batches(tokens, todo.keep):
            micro_losses(rewarded.model, packed, micro, todo, experience.signals, T)
        clipped = todo.parts["verifier"].clipped
        assert clipped is not None and torch.equal(clipped, expected)
        assert 0.02 < float(expected.double().mean()) < 0.9
        assert todo.parts["distill"].clipped is None
