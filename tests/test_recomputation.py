"""Gradient checkpointing is really active in training, changes no gradient and is off everywhere else."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from opd_agents.errors import ConfigError
from opd_agents.policies.models import build_model, hidden_states
from opd_agents.policies.recomputation import prepare_recomputation, recomputed
from opd_agents.trainer import train

IDS = torch.arange(20, 84)[None]
LORA = {"rank": 4, "alpha": 8.0}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def saved_bytes(model: Any) -> int:
    """What a forward pass keeps for the backward pass, weights aside."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(model, IDS).square().sum().backward()
    return sum(kept.values())


def test_layers_are_computed_twice_with_the_same_gradients_and_keep_less(tiny_llama: Any) -> None:
    model = tiny_llama(seed=4)
    calls: list[str] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    plain_bytes, plain = saved_bytes(model), gradients(model)
    assert len(calls) == 2
    prepare_recomputation(model)
    assert saved_bytes(model) == plain_bytes  # prepared, but not in use
    gradients(model)
    calls.clear()
    with recomputed(model):
        lean_bytes = saved_bytes(model)
    assert len(calls) == 4
    assert lean_bytes < plain_bytes / 3
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(model).items())


def test_nothing_drops_out_and_the_cache_works_again_afterwards(tiny_llama: Any) -> None:
    model = tiny_llama(seed=4, attention_dropout=0.5)
    prepare_recomputation(model)
    with torch.no_grad():
        expected = hidden_states(model, IDS)
    with recomputed(model):
        assert torch.equal(hidden_states(model, IDS).detach(), expected)
    assert not any(module.training for module in model.modules())
    with pytest.raises(KeyError), recomputed(model):
        raise KeyError
    assert not any(module.training for module in model.modules())
    assert model.model(input_ids=IDS, use_cache=True).past_key_values.get_seq_length() == IDS.shape[1]


def test_a_model_without_such_layers_is_refused(tiny_llama: Any) -> None:
    model = tiny_llama(seed=4)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match=r"trainer.gradient_checkpointing.*micro_batch_tokens"):
        prepare_recomputation(model)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_is_the_same_but_for_its_flops(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    student = {"model": str(tiny_teacher)} | ({"lora": LORA} if lora else {})
    recomputed_layers: list[str] = []

    def checkpoint(function: Any, *arguments: Any, **options: Any) -> Any:
        recomputed_layers.append(type(function.args[0]).__name__)
        return torch_checkpoint(function, *arguments, **options)

    def run(name: str, *overrides: str) -> Path:
        return train(tiny.mix(tmp_path / name, tiny_teacher, *overrides, "trainer.steps=3", student=student))

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", checkpoint)
    plain = run("plain")
    assert not recomputed_layers
    lean = run("lean", "trainer.gradient_checkpointing=true")
    assert set(recomputed_layers) == {"LlamaDecoderLayer"}
    a, b = tiny.final_state(plain), tiny.final_state(lean)
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert a[weights] == b[weights]
    flops = [[row["total/flops"] for row in state["metrics"]] for state in (a, b)]
    assert all(more > less for less, more in zip(*flops, strict=True))


def test_layers_that_would_drop_out_are_refused(desk_chat: Any) -> None:
    """OPT's layers drop out themselves, by 0.1 unless told otherwise; others leave it to their parts."""
    small = {
        "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="OPTForCausalLM drop out"):
        prepare_recomputation(build_model("opt", small, desk_chat.tokenizer, 0))
    prepare_recomputation(build_model("opt", small | {"dropout": 0.0}, desk_chat.tokenizer, 0))
    inside = {"attention_dropout": 0.5}
    prepare_recomputation(build_model("llama", tiny.BUILD["config"] | inside, desk_chat.tokenizer, 0))
