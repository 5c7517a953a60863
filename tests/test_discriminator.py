"""A discriminator: its loss and gradient against the formula, what it reads, whom it compares, that it and
the student are apart, and whole runs that learn with it and go on where they died."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from api_server import ApiServer, Expert
from engine import in_float64
from rolling import trajectory, turn
from test_resume import Killed, stop_before
from torch import Tensor
from torch.autograd import grad, gradcheck

from opd_agents import envs
from opd_agents.batch import pack
from opd_agents.config import Lora, RunConfig, load_config
from opd_agents.config.sections import TrainerSettings
from opd_agents.discriminator import Discriminator, compared, make_discriminator, teacher_student_pairs
from opd_agents.errors import AlignmentError, CheckpointError, ConfigError
from opd_agents.experience import credit, score, with_likeness
from opd_agents.objectives import bradley_terry
from opd_agents.playing import play_step
from opd_agents.policies.adapters import add_adapter
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder
from opd_agents.starting import check_inputs, load_session
from opd_agents.trainer import train
from opd_agents.types import Outcome, Trajectory
from opd_agents.updates import update, update_discriminator

PAIRS = [(0, 1), (0, 2), (3, 1), (5, 4)]


def loss(scores: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    return torch.stack([(1 + (scores[b] - scores[a]).exp()).log() for a, b in pairs]).mean()


# ---- the loss on pairs ----


def test_the_slopes_are_the_gradient_of_the_bradley_terry_loss() -> None:
    scores = torch.randn(
        7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    found = bradley_terry(scores, PAIRS)
    assert found.losses.mean().item() == pytest.approx(loss(scores, PAIRS).item(), abs=1e-12)
    assert torch.allclose(found.slopes, grad(loss(scores, PAIRS), scores)[0], atol=1e-12)
    assert gradcheck(lambda s: loss(s, PAIRS), scores)
    assert abs(found.slopes.sum().item()) < 1e-12 and found.slopes[6] == 0 and not found.slopes.requires_grad
    moved = bradley_terry(scores + 1e3, PAIRS)
    assert torch.allclose(moved.slopes, found.slopes, atol=1e-9)


def test_equal_scores_give_log_2_and_far_ones_no_overflow() -> None:
    equal = bradley_terry(torch.full((6,), 3.0), PAIRS)
    assert equal.losses.tolist() == pytest.approx([math.log(2)] * 4)
    assert equal.slopes.tolist() == pytest.approx([-0.25, 0.25, 0.125, -0.125, 0.125, -0.125])
    far = bradley_terry(torch.tensor([1e4, -1e4]), [(0, 1), (1, 0)])
    assert far.losses.tolist() == [0.0, 2e4] and far.slopes.tolist() == [0.5, -0.5]


def test_scores_of_no_pair_are_not_looked_at() -> None:
    nothing = bradley_terry(torch.tensor([math.nan, 1.0]), [])
    assert nothing.slopes.tolist() == [0.0, 0.0] and nothing.losses.shape == (0,)
    with pytest.raises(AlignmentError, match="not finite"):
        bradley_terry(torch.tensor([math.nan, 1.0]), [(1, 0)])


# ---- what it reads ----


def opinionated(model: Any, **trainer: Any) -> Discriminator:
    """In float64, with a direction."""
    made = Discriminator(in_float64(model).base_model, TrainerSettings(**trainer))
    made.reader.direction.data = torch.randn(
        made.reader.direction.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    made.optimizer = type(made.optimizer)(made.reader, "adamw", 0.0)
    return made


def plainly(made: Discriminator, one: Trajectory) -> Tensor:
    """The score of an episode: the whole of its last row, one at a time, its last state."""
    *_, (start, stop) = one.segments()
    ids = [id_ for turn in one.turns[start:stop] for id_ in (*turn.context_ids, *turn.action_ids)]
    hidden = made.reader.body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return hidden @ made.reader.direction


def test_a_score_is_of_the_whole_episode_at_its_last_action(student: Any, sampled: list[Trajectory]) -> None:
    made = opinionated(student, micro_batch_tokens=300)
    split = dataclasses.replace(  # a history that was rendered anew before the last turn
        sampled[0],
        turns=(*sampled[0].turns[:-1], dataclasses.replace(sampled[0].turns[-1], starts_segment=True)),
    )
    batch = [*sampled, split, trajectory([])]
    read = torch.tensor([True] * 11 + [False] + [True] * 2)
    scores = made.scores(pack(batch), read)
    assert scores.isnan().tolist() == [False] * 11 + [True, False, True]
    with torch.no_grad():
        expected = [float(plainly(made, one)) for one in (*sampled[:11], split)]
    assert scores[~scores.isnan()].tolist() == pytest.approx(expected, abs=1e-5)
    assert abs(scores[0] - scores[12]) > 0.01 and made.flops > 0


def test_an_update_has_the_gradient_of_the_formula(
    student: Any, sampled: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, packed = opinionated(student, micro_batch_tokens=300, clip_norm=1e9), pack(sampled)
    pairs = [(0, 1), (0, 2), (4, 5), (8, 1)]
    scores = made.scores(packed, torch.ones(12, dtype=torch.bool))
    whole = loss(torch.stack([plainly(made, one) for one in sampled]), pairs)
    named = dict(made.reader.named_parameters())
    expected = dict(zip(named, grad(whole, list(named.values())), strict=True))
    monkeypatch.setattr(made.optimizer, "step", lambda rate: None)
    row = made.learn(packed, scores, pairs, 0.1)
    assert row["discriminator/loss"] == pytest.approx(whole.item(), rel=1e-5)
    for name, parameter in named.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-7), name
    higher = [float(scores[a] > scores[b]) for a, b in pairs]
    assert row["discriminator/accuracy"] == sum(higher) / 4 and row["discriminator/pairs"] == 4
    margins = [float(scores[a] - scores[b]) for a, b in pairs]
    assert row["discriminator/margin"] == pytest.approx(sum(margins) / 4, abs=1e-6)


def test_without_pairs_nothing_is_learned_and_that_is_said(student: Any, sampled: list[Trajectory]) -> None:
    made, packed = opinionated(student), pack(sampled)
    before = copy.deepcopy(made.reader.state_dict())
    row = made.learn(packed, made.scores(packed, torch.ones(12, dtype=torch.bool)), [], 0.1)
    assert row["discriminator/pairs"] == 0
    assert [row[f"discriminator/{key}"] for key in ("loss", "accuracy", "margin")] == [None] * 3
    assert all(torch.equal(before[name], now) for name, now in made.reader.state_dict().items())


def test_whom_it_compares() -> None:
    own = [trajectory([turn([1], [2])], uid=str(i), group=f"g{i // 2}") for i in range(4)]
    shown = [dataclasses.replace(one, uid=f"d{one.uid}", demonstration=True) for one in own[1:3]]
    failed = dataclasses.replace(own[0], uid="f", outcome=Outcome.ERROR)
    replaced = dataclasses.replace(own[0], uid="r", replaced=True)
    lost = dataclasses.replace(shown[0], uid="l", outcome=Outcome.ERROR)
    alone = dataclasses.replace(own[0], uid="a", group="")
    batch = [*own, *shown, failed, replaced, lost, alone]
    assert compared(batch).tolist() == [True] * 6 + [False] * 4
    assert teacher_student_pairs(batch, compared(batch)) == [(4, 0), (4, 1), (5, 2), (5, 3)]
    assert teacher_student_pairs([*own, lost], compared([*own, lost])) == []  # the teacher failed


# ---- apart from the student ----


def config(output: Path, *overrides: str, **changes: Any) -> RunConfig:
    """A fresh student on two-turn tasks that the scripted expert plays, too."""
    student = {"build": tiny.BUILD | {"tokenizer_episodes": 40}}
    raw = tiny.sft(output, method="gad", student=student) | changes
    raw["rollout"] = {
        "episodes_per_step": 8, "group_size": 4, "demonstrations": {"actor": "expert"}, **tiny.LIMITS
    }  # fmt: skip
    raw["trainer"] |= {"steps": 4, "checkpoint_every": 2}
    return load_config(raw, *overrides)


def test_neither_loss_reaches_the_others_weights(tmp_path: Path) -> None:
    made = config(tmp_path / "run", "loss.components.gad.coef=1", "loss.components.warm_up=")
    session = load_session(made, RunFolder(tmp_path / "run", {}, resume=True))
    assert session.discriminator is not None
    reader = session.discriminator.reader
    torch.nn.init.normal_(reader.direction, generator=torch.Generator().manual_seed(0))
    play = partial(rollout, make=envs.make, chat=session.chat, limits=session.limits, temperature=1.0)
    played = play_step(
        made, 0, session.task_counts, partial(play, policy=session.behaviour),
        partial(play, policy=session.demonstrator),
    )  # fmt: skip
    experience = with_likeness(session, score(session, played.trajectories))
    assert experience.likeness is not None and not experience.likeness.requires_grad
    before = [copy.deepcopy(one.state_dict()) for one in (session.model, reader)]
    row = update(session, experience, credit(session, experience))
    assert row["grad_norm"] > 1e-3 and all(p.grad is None for p in reader.parameters())
    after = copy.deepcopy(session.model.state_dict())
    assert not same(before[0], after) and same(before[1], reader.state_dict())
    told = update_discriminator(session, experience)
    assert told["discriminator/pairs"] == 8 and (told["discriminator/grad_norm"] or 0) > 1e-3
    assert same(after, session.model.state_dict()) and not same(before[1], reader.state_dict())
    assert all(p.grad is None for p in session.model.parameters())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_beside_an_adapter_it_is_an_adapter_on_the_same_base(
    tiny_llama: Any, desk_chat: Any, sampled: list[Trajectory], tmp_path: Path
) -> None:
    model = tiny_llama(seed=3)
    add_adapter(model, Lora(rank=2, alpha=4.0), 0)
    made = make_discriminator(config(tmp_path), model, desk_chat)
    assert made is not None
    shared = {id(p) for p in model.parameters()}
    own = {name for name, p in made.reader.named_parameters() if id(p) not in shared}
    assert own == {name for name, p in made.reader.named_parameters() if p.requires_grad}
    assert own and all("lora_" in name or name == "direction" for name in own)
    before, everything = copy.deepcopy(model.state_dict()), torch.ones(12, dtype=torch.bool)
    for _ in range(2):
        scores = made.scores(pack(sampled), everything)
        row = made.learn(pack(sampled), scores, [(0, 1), (4, 5)], 0.01)
    assert row["discriminator/margin"] != 0 and same(before, model.state_dict())


# ---- whole runs ----


def test_it_learns_to_tell_a_teacher_behind_an_api_from_the_student(tmp_path: Path) -> None:
    """By episodes of OrderDesk that a server plays; once the warm-up is over it rewards the student."""
    desk: dict[str, Any] = tiny.DESK | {"limit": 8}
    with ApiServer(Expert(desk["id"], desk["options"], tasks=8)) as server:
        teacher = {"kind": "api", "model": "m", "endpoint": {"base_url": server.url, "key": None}}
        made = config(
            tmp_path / "run", "rollout.demonstrations.actor=teacher", "rollout.max_context_tokens=256",
            environments=[desk], teacher=teacher,
        )  # fmt: skip
        rows = tiny.metrics(train(made))
    assert all(row["demonstrations/success"] == 1 and row["discriminator/pairs"] == 8 for row in rows)
    assert rows[0]["discriminator/loss"] == pytest.approx(math.log(2))
    assert rows[0]["discriminator/accuracy"] == 0.5 and rows[-1]["discriminator/accuracy"] > 0.8
    assert [row["loss/warm_up"] > 0 for row in rows] == [True, True, False, False]
    assert [row["loss/gad"] != 0 for row in rows] == [False, False, True, True]
    assert all(row["advantage/gad.likeness"] > 0 for row in rows[2:])


def test_a_run_that_died_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two checkpoints, with a discriminator that learns at a rate of its own."""
    rate = "discriminator.learning_rate={kind: cosine, start: 0.01, end: 0.001}"
    whole = tiny.final_state(train(config(tmp_path / "whole", rate)))
    assert "discriminator.pt" in whole
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, 3)
        train(config(tmp_path / "run", rate))
    assert tiny.final_state(train(config(tmp_path / "run", rate), resume=True)) == whole
    rates = [row["discriminator/learning_rate"] for row in whole["metrics"]]
    assert rates[0] == 0.01 > rates[1] and whole["metrics"][0]["learning_rate"] == 0.02
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    (newest / "discriminator.pt").write_bytes(b"")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="not whole"):
        train(config(tmp_path / "run", rate), resume=True)


def test_it_may_begin_as_another_checkpoint_of_the_students_vocabulary(
    tmp_path: Path, tiny_student: Path, student: Any, desk_chat: Any
) -> None:
    begun = {"model": str(tiny_student)}
    made = config(tmp_path / "run", "trainer.steps=1", student=begun, discriminator=begun)
    session = load_session(made, RunFolder(tmp_path / "run", {}, resume=True))
    assert session.discriminator is not None
    assert same(session.discriminator.reader.body.state_dict(), session.model.base_model.state_dict())
    with pytest.raises(ConfigError, match=r"discriminator\.model: .* another vocabulary"):
        make_discriminator(made, student, desk_chat)
    with pytest.raises(CheckpointError, match="nowhere"):
        check_inputs(config(tmp_path / "other", discriminator={"model": "./nowhere"}))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("discriminator=", "give a section `discriminator"),
        ("loss.components.gad.rewards.likeness.discriminator=false", "no reward asks for its scores"),
        ("rollout.demonstrations=", "nothing to compare|would select nothing"),
        ("rollout.redraws=1", "redraws looks at rewards before"),
        ("loss.components.gad.rewards.likeness.verbal=episode", "rewards of their own"),
        ("loss.components.gad.rewards.likeness={baseline: none, normalise: none}", "needs a baseline"),
        ("discriminator.rate=1", "unknown key `discriminator.rate`"),
    ],
)
def test_what_cannot_work_is_refused_when_the_config_loads(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, override)


def test_without_demonstrations_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare the student's episodes with"):
        config(tmp_path, "rollout.demonstrations=", "loss.components.warm_up=")
