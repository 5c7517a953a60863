"""Training bfloat16 weights: float32 masters, exact sums of gradients, and the run that float32 would be."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rolling import desk_episodes, rolled, sampler
from safetensors.torch import load_file
from torch import nn

from opd_agents import updates
from opd_agents.batch import pack
from opd_agents.config import RunConfig, load_config
from opd_agents.errors import AlignmentError
from opd_agents.frozen import check_behaviour, frozen_terms
from opd_agents.optimizers import ModelOptimizer
from opd_agents.policies.probe import GAPS
from opd_agents.runs import latest_checkpoint
from opd_agents.trainer import train

LORA = {"rank": 4, "alpha": 8.0}
BF16 = "student.dtype=bfloat16"


def one_weight(dtype: torch.dtype, kind: str = "adamw") -> tuple[nn.Linear, ModelOptimizer]:
    model = nn.Linear(4, 4, bias=False, dtype=dtype)
    nn.init.ones_(model.weight)
    return model, ModelOptimizer(model, kind, weight_decay=0.0)


# ---- the optimizer ----


def test_updates_smaller_than_the_resolution_add_up() -> None:
    """Between 0.5 and 1 two bfloat16 numbers are 0.004 apart; each update is 0.001."""
    model, optimizer = one_weight(torch.bfloat16)
    without = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([without], lr=0.001, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(40):
        model.weight.grad, without.grad = torch.ones_like(model.weight), torch.ones_like(without)
        optimizer.collect()
        optimizer.step(0.001)
        plain.step()
    assert torch.equal(without, torch.ones_like(without))
    torch.testing.assert_close(model.weight.float(), torch.full((4, 4), 0.96), atol=0.003, rtol=0)
    torch.testing.assert_close(optimizer.masters[0], torch.full((4, 4), 0.96), atol=1e-4, rtol=0)


def test_gradients_of_many_micro_batches_add_up() -> None:
    """In bfloat16 256 + 1 is 256."""
    model, optimizer = one_weight(torch.bfloat16)
    for _ in range(300):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.collect()
    assert model.weight.grad is None
    assert torch.equal(optimizer.masters[0].grad, torch.full((4, 4), 300.0))
    assert optimizer.clip(1.0) == pytest.approx(1200.0)
    torch.testing.assert_close(optimizer.masters[0].grad.norm(), torch.tensor(1.0))


def test_float32_weights_are_their_own_masters() -> None:
    model, optimizer = one_weight(torch.float32)
    assert optimizer.masters[0] is model.weight
    assert optimizer.state_dict()["masters"] == []


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_is_saved_and_loaded_goes_on_the_same(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def go_on(model: nn.Linear, optimizer: ModelOptimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            model.weight.grad = torch.randn(4, 4, generator=generator).to(dtype)
            optimizer.collect()
            optimizer.step(0.003)

    model, optimizer = one_weight(dtype, kind)
    go_on(model, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other, again = one_weight(dtype, kind)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for pair in ((model, optimizer), (other, again)):
        go_on(*pair, range(5, 9))
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(optimizer.masters[0], again.masters[0])


# ---- runs ----


def config(output: Path, teacher: Path, *overrides: str, lora: bool = False) -> RunConfig:
    """A run with every part, in bfloat16: of a whole fresh model, or of an adapter."""
    student = (
        {"model": str(teacher), "lora": LORA} if lora else {"build": tiny.BUILD | {"tokenizer": str(teacher)}}
    )
    return tiny.mix(output, teacher, BF16, *overrides, student=student)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_killed_run_goes_on_as_if_it_had_not(
    tiny_teacher: Path, tmp_path: Path, dies_after: Any, lora: bool
) -> None:
    whole = train(config(tmp_path / "whole", tiny_teacher, lora=lora))
    with dies_after(3):
        train(config(tmp_path / "run", tiny_teacher, lora=lora))
    resumed = train(config(tmp_path / "run", tiny_teacher, lora=lora), resume=True)
    assert tiny.final_state(resumed) == tiny.final_state(whole)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    weights = load_file(latest_checkpoint(whole) / file)
    masters = torch.load(latest_checkpoint(whole) / "optimizer.pt")["masters"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in masters} == {torch.float32}
    assert sum(master.numel() for master in masters) == sum(tensor.numel() for tensor in weights.values())
    rounded = sorted(float(master.bfloat16().double().sum()) for master in masters)
    assert rounded == sorted(float(tensor.double().sum()) for tensor in weights.values())


def test_it_follows_the_float32_run(tmp_path: Path) -> None:
    """On the expert's episodes, which are the same for both."""
    steps = ("trainer.steps=8", "trainer.optimizer=adamw")
    full = tiny.metrics(train(load_config(tiny.sft(tmp_path / "float32"), *steps)))
    half = tiny.metrics(train(load_config(tiny.sft(tmp_path / "bfloat16"), *steps, BF16)))
    assert full[-1]["loss"] < full[0]["loss"] / 1.5
    for a, b in zip(full, half, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.03)
        assert b["total/flops"] == a["total/flops"]


@pytest.mark.parametrize("shares", [False, True])
def test_a_split_into_micro_batches_gives_the_gradient_of_the_whole(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    gradients = []
    original = updates.accumulate

    def accumulate(session: Any, *arguments: Any, **options: Any) -> Any:
        result = original(session, *arguments, **options | {"shares": shares})
        gradients.append(torch.cat([m.grad.flatten() for m in session.optimizer.masters]).clone())
        return result

    monkeypatch.setattr(updates, "accumulate", accumulate)
    for tokens in (16384, 40):
        size = (f"trainer.micro_batch_tokens={tokens}", "trainer.steps=1", "trainer.updates_per_step=1")
        train(config(tmp_path / str(tokens), tiny_teacher, *size))
    whole, split = gradients
    assert whole.dtype == torch.float32
    assert float((split - whole).norm() / whole.norm()) < 0.02
    assert float(whole.norm()) > 0


def test_large_logits_are_no_reason_to_stop_and_other_weights_are(tiny_llama: Any, desk_chat: Any) -> None:
    """Of logits around 30, as models of size have, bfloat16 knows no more than an eighth or a quarter."""
    model = tiny_llama(seed=1, tie_word_embeddings=False, num_hidden_layers=6).to(torch.bfloat16)

    def rescored() -> float:
        terms = frozen_terms(model, packed, {}, 1.0, 4000)
        return check_behaviour(packed, episodes, terms, 0, **GAPS["bfloat16"])

    with torch.no_grad():
        model.lm_head.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
        episodes = rolled(desk_episodes(24, max_turns=3), sampler(model, desk_chat), desk_chat)
        packed = pack(episodes)
        assert rescored() > 0.2
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))  # each logit is another token's
        with pytest.raises(AlignmentError, match="tolerance 5; mean"):
            rescored()
