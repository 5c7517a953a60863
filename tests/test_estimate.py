"""Estimated memory beside what torch really keeps, on small models of several architectures."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd_agents.config import RunConfig, load_config
from opd_agents.config.loading import find_experiment
from opd_agents.discriminator import Reader
from opd_agents.estimate import memory
from opd_agents.optimizers import ModelOptimizer
from opd_agents.policies.adapters import add_adapter
from opd_agents.policies.models import hidden_states

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
QWEN3_1_7B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip

QWEN3_0_6B = QWEN3_1_7B | {"hidden_size": 1024, "intermediate_size": 3072}


def model(model_type: str = "llama", dtype: torch.dtype = torch.float32, **shape: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **(SHAPE | shape))
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def config(*overrides: str) -> RunConfig:
    raw = {
        "name": "estimate", "method": "gkd", "student": {"model": "s"}, "teacher": {"model": "t"},
        "environments": [{"id": "opd_agents/OrderDesk-v0"}],
    }  # fmt: skip
    return load_config(raw, *overrides)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_the_optimizer_are_exact(kind: str, dtype: torch.dtype) -> None:
    student = model(dtype=dtype)
    parts = memory(config(f"trainer.optimizer={kind}"), student, [])
    optimizer = ModelOptimizer(student, kind, 0.0)
    for weight in optimizer.weights:
        weight.grad = torch.ones_like(weight)
    optimizer.collect()
    held = sum(m.grad.nbytes for m in optimizer.masters if m.grad is not None)
    optimizer.step(0.1)
    state = [value for one in optimizer.optimizers for of in one.state.values() for value in of.values()]
    assert parts["student"] == sum(p.nbytes for p in student.parameters())
    assert parts.get("masters", 0) == sum(m.nbytes for _, m in optimizer._copied())
    assert parts["gradients"] == held + sum(w.nbytes for w, _ in optimizer._copied())
    assert parts["optimizer"] == sum(v.nbytes for v in state if isinstance(v, torch.Tensor) and v.ndim)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
def test_activations_are_of_the_size_that_autograd_keeps(kind: str) -> None:
    shape: dict[str, Any] = {"num_key_value_heads": 4} if kind == "gpt2" else {"head_dim": 16}
    student, tokens = model(kind, **shape), 8 * 32
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = hidden_states(student, torch.zeros(8, 32, dtype=torch.int64)).sum()
    estimated = memory(config(f"trainer.micro_batch_tokens={tokens}"), student, [])["activations"]
    loss.backward()
    assert 0.4 < estimated / sum(kept.values()) < 2.5


def test_a_shared_weight_is_counted_once_and_a_teacher_beside_it() -> None:
    student, teacher = model(), model(hidden_size=32)
    alone = memory(config(), student, [student])
    assert "teachers" not in alone
    assert memory(config(), student, [teacher])["teachers"] == sum(p.nbytes for p in teacher.parameters())


def test_a_discriminator_counts_with_all_that_its_updates_keep() -> None:
    student = model()
    body: Any = student.base_model
    whole = Reader(copy.deepcopy(body))  # weights, gradients and two moments
    assert memory(config(), student, [], whole)["discriminator"] == 4 * sum(
        p.nbytes for p in whole.parameters()
    )
    shared = Reader(body.requires_grad_(False))
    assert memory(config(), student, [], shared)["discriminator"] == 4 * shared.direction.nbytes


def test_a_large_model_is_estimated_from_its_shape_alone() -> None:
    with torch.device("meta"):
        student = model("qwen3", torch.bfloat16, **QWEN3_1_7B)
    weights = 1_720_574_976  # as published: 1.7 billion
    parts = memory(config("trainer.gradient_checkpointing=true"), student, [])
    assert parts["student"] == 2 * weights
    assert parts["optimizer"] == 8 * weights and parts["masters"] == 4 * weights
    whole = memory(config(), student, [])["activations"]
    assert parts["activations"] < whole / 8
    rows = memory(config("rollout.episodes_per_step=64"), student, [])["cache"]
    assert rows == 64 * 8192 * 28 * 2 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [("qwen3_1gpu", QWEN3_1_7B), ("qwen3_8gpu", QWEN3_1_7B), ("qwen3_api", QWEN3_0_6B)],
)
def test_a_recipe_says_what_is_estimated(name: str, shape: dict[str, Any]) -> None:
    recipe = load_config(name, "teacher.model=t")
    recipe = [recipe, *recipe.stages.values()][-1]
    with torch.device("meta"):
        student = model("qwen3", torch.bfloat16, **shape)
        if recipe.student.lora is not None:
            add_adapter(student, recipe.student.lora, 0)
    gigabytes = sum(memory(recipe, student, []).values()) / 2**30
    assert f": {gigabytes:.0f} GiB" in find_experiment(name).read_text(encoding="utf-8")
