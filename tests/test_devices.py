"""Models on another device than the packed table: the whole line there, and on CUDA where there is one."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from away import AWAY, Away, away, sent
from engine import component, planned
from rolling import desk_episodes, rolled, sampler
from test_architectures import SAMPLED, SMALL
from test_sampler import converse, ended_by_many

from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.experience import Experience
from opd_agents.frozen import check_behaviour, frozen_terms
from opd_agents.loss import micro_losses
from opd_agents.policies.models import build_model, local_device
from opd_agents.teachers.local import ModelTeacher
from opd_agents.trainer import train

COMPONENTS = {
    "distill": component(kind="distill", ratio_clip=2.0),
    "policy": component(kind="policy", references={"teacher": {}}),
    "ce": component(kind="ce", denominator="turn"),
}
TEMPERATURE = 1.1


def one_step(student: Any, teacher: Any, chat: Chat) -> dict[str, Any]:
    """Episodes of several turns, their frozen terms, losses and gradients; all but the last on the CPU."""
    policy = sampler(student, chat, temperature=TEMPERATURE)
    episodes = rolled(desk_episodes(6, group_size=3, max_turns=3), policy, chat, temperature=TEMPERATURE)
    packed = pack(episodes)
    signal = ModelTeacher(teacher, chat, TEMPERATURE).score(packed, 500)
    assert signal.hidden.device == packed.target.device
    signals = {"teacher": signal}
    frozen = frozen_terms(student, packed, signals, TEMPERATURE, 500)
    check_behaviour(packed, episodes, frozen, 0, 1e-3)
    every = torch.ones_like(packed.target).bool()
    experience = Experience(tuple(episodes), packed, signals, {}, frozen, every)
    todo = planned(experience, COMPONENTS, temperature=TEMPERATURE)
    losses = []
    for micro in packed.micro_batches(500, todo.keep):
        parts = micro_losses(student, packed, micro, todo, signals, TEMPERATURE)
        torch.stack(list(parts.values())).sum().backward()
        losses.append(torch.stack([part.detach() for part in parts.values()]))
    return {
        "ids": [turn.action_ids for t in episodes for turn in t.turns],
        "terms": [frozen.logprob, frozen.entropy, *frozen.references["teacher"]],
        "losses": losses,
        "gradients": [p.grad for p in student.parameters()],
    }


def same(mine: dict[str, Any], theirs: dict[str, Any], atol: float) -> None:
    assert mine["ids"] == theirs["ids"]
    for key in ("terms", "losses", "gradients"):
        for one, other in zip(mine[key], theirs[key], strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=1e-3)


def test_a_whole_step_on_another_device_than_the_packed_table(
    tiny_llama: Any, teacher: Any, desk_chat: Chat
) -> None:
    student = tiny_llama(seed=1, num_key_value_heads=2)
    here = one_step(student, teacher, desk_chat)
    with away():
        other = sent(student)
        assert other.device == AWAY != student.device
        there = one_step(other, sent(teacher), desk_chat)
        assert all(not isinstance(tensor, Away) for tensor in there["terms"] + there["losses"])
        there["gradients"] = [gradient.inner for gradient in there["gradients"]]
    same(there, here, atol=1e-4)


def test_windows_and_soft_caps_on_another_device(desk_chat: Chat) -> None:
    fields = SMALL | SAMPLED["gemma2"] | {"initializer_range": 0.3}
    model = build_model("gemma2", fields, desk_chat.tokenizer, seed=3)
    here, _ = converse(ended_by_many(model))
    with away():
        there, _ = converse(ended_by_many(sent(model)))
    assert [action.ids for action in there] == [action.ids for action in here]


def test_the_second_device_refuses_what_cuda_refuses() -> None:
    with away():
        there = torch.ones(2, 3, device=AWAY)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(5, 3)[torch.tensor([0, 1], device=AWAY)]
        assert (there + 1)[torch.tensor([0])].sum().cpu() == 6  # numbers and indices may come from the CPU


def test_without_a_gpu_models_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda", 3)


@pytest.mark.real("cuda")
def test_a_whole_step_on_cuda(tiny_llama: Any, desk_chat: Chat) -> None:
    student, judge = tiny_llama(seed=1), tiny_llama(seed=2)
    assert student.device == torch.device("cuda", 0)
    there = one_step(student, judge, desk_chat)
    there["gradients"] = [gradient.cpu() for gradient in there["gradients"]]
    student.zero_grad()
    same(there, one_step(student.cpu(), judge.cpu(), desk_chat), atol=1e-3)


@pytest.mark.real("cuda")
def test_a_run_on_cuda_goes_on_from_its_checkpoint(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny.mix(tmp_path / "run", tiny_teacher, "trainer.steps=4")
    rows = tiny.metrics(train(config))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    again = tiny.metrics(train(config, resume=True))
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    assert again[-1]["loss"] == pytest.approx(rows[-1]["loss"], rel=0.1)
