"""Teachers who debate before they teach: what they are asked, what they hear, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.config import Debate, RunConfig, load_config
from opd_agents.episode import Limits
from opd_agents.errors import ConfigError
from opd_agents.policies.base import Action, History
from opd_agents.runs import RunFolder
from opd_agents.starting import load_session
from opd_agents.teachers.debate import Debaters
from opd_agents.teaching import check_references
from opd_agents.trainer import train
from opd_agents.types import Actor, Message, StopReason, Trajectory

HERE = "test_debate"


@pytest.fixture
def make(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> Callable[..., RunConfig]:
    """A run of the preset; its teachers are one that was trained for longer, and the student's start."""

    def made(*overrides: str, run: str = "run", debate: Any = None, **changes: Any) -> RunConfig:
        members = {"first": {"model": str(tiny_teacher)}, "second": {"model": str(tiny_student)}}
        raw = tiny.sft(
            tmp_path / run, method="mad_opd", student={"model": str(tiny_student)},
            rollout={"episodes_per_step": 4, **tiny.LIMITS},
            teacher={"members": members, "debate": {"max_tokens": 4} | (debate or {})},
        )  # fmt: skip
        raw["trainer"] |= {"steps": 2}
        return load_config(raw | changes, *overrides)

    return made


class Speaker:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, chat: Chat, says: Sequence[str]) -> None:
        self.chat, self.says, self.heard = chat, list(says), list[str]()

    def act(self, histories: Sequence[History]) -> list[Action]:
        self.heard += [str(self.chat.tokenizer.decode(list(one.ids))) for one in histories]
        said = self.says.pop(0)
        return [Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=said) for _ in histories]


@pytest.fixture
def two(sampled: list[Trajectory]) -> list[Trajectory]:
    """Two episodes of one task and one of another."""
    return [sampled[0], sampled[1], sampled[4]]


def debaters(chat: Chat, rounds: int, *says: Sequence[str]) -> tuple[Debaters, list[Speaker]]:
    speakers = [Speaker(chat, own) for own in says]
    members = {name: one for name, one in zip(("one", "other"), speakers, strict=False)}
    return Debaters(Debate(rounds=rounds, max_tokens=9), chat, members, Limits()), speakers


def test_a_debate_goes_on_in_rounds_and_all_is_told(desk_chat: Chat, two: list[Trajectory]) -> None:
    """Of each task once, without a word of what the student did."""
    held, (one, other) = debaters(
        desk_chat, 2, ["by name", "by id. Confidence: 90"], ["I ask", "confidence: 30"]
    )
    packed = pack(two)
    told, shares = held.condition(packed, two)
    for speaker in (one, other):
        assert len(speaker.heard) == 4  # two tasks, twice
        assert all("Do not act yet" in heard and "<tool_call>" not in heard for heard in speaker.heard)
        assert all(
            "one, round 1: by name" in heard and "other, round 1: I ask" in heard
            for heard in speaker.heard[2:]
        )
        assert all("by name" not in heard and "I ask" not in heard for heard in speaker.heard[:2])
    assert "You are other" in other.heard[2] and "You are one" in one.heard[2]
    ratio = math.exp(0.9 - 0.3)
    expected = torch.tensor([ratio, 1.0]) / (1 + ratio)
    torch.testing.assert_close(shares, expected.expand(3, 2))
    for before, after in zip(packed.rows, told.rows, strict=True):
        text = str(desk_chat.tokenizer.decode(after.tolist()))
        order = [text.index(said) for said in ("by name", "I ask", "by id.", "confidence: 30")]
        assert order == sorted(order) and len(after) > len(before)
    assert torch.equal(told.target, packed.target)
    assert torch.equal(held.condition(packed, two)[1], shares) and len(one.heard) == 4  # as it was held


def test_equal_confidences_and_missing_ones_weigh_equally(desk_chat: Chat, two: list[Trajectory]) -> None:
    for ends in (("Confidence: 70", "Confidence: 70"), ("Confidence: 90", "who knows"), ("a", "b")):
        held, _ = debaters(desk_chat, 1, [ends[0]], [ends[1]])
        assert torch.equal(held.condition(pack(two), two)[1], torch.full((3, 2), 0.5))
    held, _ = debaters(
        desk_chat, 1, ["Confidence: 50, no, confidence: 100"], ["Confidence: 500"]
    )  # 100 at most
    assert torch.equal(held.condition(pack(two), two)[1], torch.full((3, 2), 0.5))


def test_without_rounds_there_is_the_ensemble(make: Callable[..., RunConfig], tiny_teacher: Path) -> None:
    """And one teacher, twice, is that teacher."""
    silent = make("trainer.steps=1", debate={"rounds": 0})
    plain = silent.model_copy(
        update={
            "teacher": silent.teacher.model_copy(update={"debate": None}),
            "output": f"{silent.output}-plain",
        }
    )
    assert loss(train(silent)) == loss(train(plain))
    same = {name: {"model": str(tiny_teacher)} for name in ("first", "second")}
    twice = make("trainer.steps=1", run="twice", teacher={"members": same, "debate": {"rounds": 0}})
    alone = tiny.mix(Path("x"), tiny_teacher).teacher
    once = twice.model_copy(update={"teacher": alone, "output": f"{twice.output}-once"})
    assert loss(train(twice)) == pytest.approx(loss(train(once)), rel=1e-5)


def loss(run: Path) -> float:
    value = tiny.metrics(run)[0]["loss"]
    assert isinstance(value, float) and value > 0
    return value


def test_the_preset_is_its_formula(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """From the prompts, rendered anew with what was said, to the mean over turns."""
    config = make("trainer.steps=1", "rollout.episodes_per_step=2")
    found = tiny.metrics(run := train(config))[0]["loss"]
    episodes = [trajectory for trajectory in played(run)]
    session = load_session(make(run="again"), RunFolder(tmp_path / "again", {}, resume=False))
    debate, members = session.references.debates["teacher"], session.references.singles
    debate.condition(pack(episodes), episodes)
    turns = []
    for episode in episodes:
        task = Message("user", episode.messages[-1].content)
        plain = session.chat.prompt_ids([task], (), "")
        said = debate._held[plain].said
        heard = Message("user", f"{task.content}\n\nExperts have debated how to do this:\n\n{said}")
        prompt, start = session.chat.prompt_ids([heard], (), ""), len(plain)
        ids = [i for turn in episode.turns for i in (*turn.context_ids, *turn.action_ids)]
        p = sum(
            distributions(members[f"teacher.{name}"].model, [*prompt, *ids[start:]])
            for name in config.teacher.members
        )
        p, q, place = p[len(prompt) - start :] / 2, distributions(session.model, ids), 0
        for turn in episode.turns:
            place += len(turn.context_ids)
            own = slice(place - 1, place - 1 + len(turn.action_ids))
            place += len(turn.action_ids)
            middle = (p[own] + q[own]) / 2
            jsd = [(one[own] * (one[own] / middle).log()).sum(-1) / 2 for one in (p, q)]
            turns.append(float((jsd[0] + jsd[1]).mean()))
    assert found == pytest.approx(sum(turns) / len(turns), rel=1e-4)


def distributions(model: Any, ids: Sequence[int]) -> Tensor:
    """After every token."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.double().softmax(-1)


def played(run: Path) -> list[Trajectory]:
    from test_ensemble import played as read

    return read(run)


def test_who_cannot_debate_is_refused(make: Callable[..., RunConfig], tiny_teacher: Path) -> None:
    with pytest.raises(ConfigError, match=r"members\.first\.conditioning"):
        make("teacher.members.first.conditioning={sources: [text], text: x}")
    with pytest.raises(ConfigError, match=r"members\.second\.weights.*take frozen"):
        make(teacher={"members": {"second": {"kind": "self", "weights": "live"}, "first": {"model": "x"}}})
    mute = {"kind": "test_plugins:Scorer", "model": str(tiny_teacher)}
    with pytest.raises(ConfigError, match=r"debate asks teacher\.first"):
        check_references(make(teacher={"members": {"first": mute, "second": {"model": str(tiny_teacher)}}}))
