"""What a run computes: the formulas beside what torch counts, and the three parts of a step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_agents.chat import Chat
from opd_agents.config import FLOP_PARTS, Lora, RunConfig
from opd_agents.policies.adapters import add_adapter
from opd_agents.policies.models import backward_flops, build_model, forward_flops, n_parameters
from opd_agents.references import References
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.trainer import train_step

TOKENS, WIDTH = 96, 48  # two rows without padding, each token with its whole row as context, as torch counts
FIELDS = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
ACCURACY = 0.02


def counted(model: Any) -> tuple[int, int]:
    """FLOPs of a forward and a backward pass, as torch counts the operations that it executes."""
    model.set_attn_implementation("eager")  # torch counts no fused one on a CPU
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=torch.arange(TOKENS).reshape(2, WIDTH)).logits.square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_and_its_gradient_cost_what_torch_counts(family: str, desk_chat: Chat) -> None:
    model = build_model(family, FIELDS | FAMILIES[family], desk_chat.tokenizer, 0)
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")  # torch counts no grouped product
    forward, backward = counted(model)
    assert forward_flops(model, TOKENS, WIDTH) == pytest.approx(forward, rel=ACCURACY)
    assert backward_flops(model, TOKENS, WIDTH) == pytest.approx(backward, rel=ACCURACY)


def test_frozen_weights_under_an_adapter_have_no_gradient_that_costs(desk_chat: Chat) -> None:
    model = build_model("qwen3", FIELDS | FAMILIES["qwen3"], desk_chat.tokenizer, 0)
    add_adapter(model, Lora(rank=4), seed=0)
    forward, backward = counted(model)
    assert forward_flops(model, TOKENS, WIDTH) == pytest.approx(forward, rel=ACCURACY)
    # nothing flows below the first layer's adapters, which the formula does not know
    assert backward == pytest.approx(backward_flops(model, TOKENS, WIDTH), rel=0.1)


def started(config: RunConfig) -> Session:
    return load_session(config, RunFolder(config.folder, config.model_dump(mode="json"), resume=False))


def test_a_step_costs_what_its_passes_do(tmp_path: Path, tiny_teacher: Path) -> None:
    """A frozen copy of the student scores once; the student passes over the same tokens once without gradient
    and once with, which is three passes more."""
    config = tiny.mix(
        tmp_path / "run", tiny_teacher, "teacher.weights=frozen", teacher={"kind": "self"}, correction=None,
        loss={"components": {"distill": tiny.DISTILL}},
    )  # fmt: skip
    session = started(config)
    first, second = train_step(session), train_step(session)
    for row in (first, second):
        parts = {part: row[f"flops/{part}"] for part in FLOP_PARTS}
        assert parts["update"] == pytest.approx(4 * parts["teacher"], rel=0.1)
        assert 0.3 < parts["rollout"] / parts["teacher"] < 1.1  # each token is read or written once
        assert row["total/flops"] == sum(row[f"total/flops/{part}"] for part in FLOP_PARTS)
    for part in FLOP_PARTS:
        assert second[f"total/flops/{part}"] == first[f"flops/{part}"] + second[f"flops/{part}"]
    assert session.parameters == {"student": n_parameters(session.model)} | {
        "teacher": n_parameters(session.model)
    }


def test_what_proves_a_repair_is_of_the_teacher(tmp_path: Path, tiny_teacher: Path) -> None:
    session = started(tiny.mix(tmp_path / "run", tiny_teacher))
    while not (row := train_step(session))["correction/rollouts"]:
        pass
    scored, sampled = session.references.flops, session.student_sampler.flops
    teacher, rollout = session.totals["flops/teacher"], session.totals["flops/rollout"]
    assert teacher > scored and rollout < sampled
    assert teacher + rollout == scored + sampled
    assert row["total/flops"] == sum(row[f"total/flops/{part}"] for part in FLOP_PARTS)


def test_tokens_whose_flops_nobody_knows_are_told() -> None:
    def references(**flops: int | None) -> Any:
        singles = {name: SimpleNamespace(flops=own, tokens=10) for name, own in flops.items()}
        return SimpleNamespace(singles=singles)

    known, mixed = references(teacher=5, anchor=0), references(teacher=5, judge=None, other=None)
    assert References.flops.fget(known) == References.flops.fget(mixed) == 5  # type: ignore[attr-defined]
    assert References.uncounted.fget(known) == {}  # type: ignore[attr-defined]
    assert References.uncounted.fget(mixed) == {"uncounted_tokens": 20}  # type: ignore[attr-defined]


def test_a_summary_tells_the_parts_and_the_sizes(tiny_teacher: Path) -> None:
    summary = json.loads((tiny_teacher / "summary.json").read_text())
    assert summary["total/flops"] == sum(summary[f"total/flops/{part}"] for part in FLOP_PARTS)
    assert summary["total/flops/update"] > 0 == summary["total/flops/teacher"]  # the expert costs none
    assert summary["parameters"].keys() == {"student"}
