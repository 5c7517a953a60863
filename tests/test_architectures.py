"""Families of models through the whole line, and their attention in the sampler: sliding windows that
episodes outgrow, layers of two types, experts, soft caps and sinks (both in the eager kernels only)."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_sampler
import tiny
import torch
from test_sampler import converse, ended_by_many, history
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from opd_agents.chat import Chat
from opd_agents.config import load_config
from opd_agents.errors import CheckpointError
from opd_agents.objectives import token_terms
from opd_agents.policies import reader
from opd_agents.policies.models import (
    build_model,
    forward_flops,
    head,
    hidden_states,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from opd_agents.runs import RunFolder
from opd_agents.starting import load_session
from opd_agents.trainer import train

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
TRAINED: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 8, **MIXED},
    "mistral": {"sliding_window": 12},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
SAMPLED: dict[str, dict[str, Any]] = TRAINED | {
    "gemma2": {"sliding_window": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **MIXED},
    "gpt_oss": {"sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "cohere2": {"sliding_window": 12, "logit_scale": 0.5, **MIXED},
    "granite": {"logits_scaling": 0.5},
}


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_trains_through_the_whole_line(family: str, tmp_path: Path) -> None:
    fields = SMALL | TRAINED[family]
    build = {"model_type": family, "config": fields}
    teacher = train(load_config(tiny.sft(tmp_path / "teacher", student={"build": build})))
    student = {"build": build | {"tokenizer": str(teacher)}}
    config = tiny.mix(tmp_path / "run", teacher, "trainer.steps=3", student=student)
    run = train(config)
    rows = tiny.metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["loss/distill"] > 0
    assert rows[-1]["total/correction_tokens"] > 0

    straight = tiny.final_state(run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-3")
    train(config, resume=True)
    assert tiny.final_state(run) == straight

    tokenizer = load_tokenizer(str(run / "checkpoints" / "step-3"))
    ids = torch.arange(len(tokenizer))[None]
    assert ids.shape[1] > 12  # the window
    trained = load_session(config, RunFolder(run, config.model_dump(mode="json"), resume=True)).model
    plain = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-3")
    with torch.no_grad():
        logits = plain(ids).logits
        torch.testing.assert_close(head(trained)(hidden_states(trained, ids)), logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits, build_model(family, fields, tokenizer, config.seed)(ids).logits)


@pytest.fixture(params=SAMPLED)
def model(request: pytest.FixtureRequest, desk_chat: Chat) -> Any:
    """Random, with spread logits and attention."""
    fields = SMALL | SAMPLED[request.param] | {"initializer_range": 0.3}
    return build_model(request.param, fields, desk_chat.tokenizer, seed=3)


def test_over_several_ragged_turns_the_sampler_scores_as_the_trainer_does(model: Any) -> None:
    """With the cache kept across turns, without, and fed in parts."""
    random, ids = itertools.count(20), {e: () for e in range(5)}
    keeping, feeding = (ended_by_many(model, 0.8, reuse=reuse) for reuse in (True, False))
    for episodes in test_sampler.ROUNDS[:3]:
        episodes = [e for e in episodes if e in ids]
        for e in episodes:
            ids[e] += tuple(20 + next(random) % 80 for _ in range(3 + 4 * e))
        histories = [history(ids[e], uid=f"e{e}", stream=(7, 1, e)) for e in episodes]
        actions = keeping.act(histories)
        for e, action, fed in zip(episodes, actions, feeding.act(histories), strict=True):
            assert action.ids == fed.ids
            assert action.logprobs == pytest.approx(fed.logprobs, abs=1e-5)
            row = torch.tensor([ids[e] + action.ids])
            with torch.no_grad():
                states = hidden_states(model, row)[0, len(ids[e]) - 1 : -1]
                target = torch.tensor(action.ids)
                terms = token_terms(states, head(model), target, temperature=0.8)
            assert action.logprobs == pytest.approx(terms.logprob.tolist(), abs=1e-4)
            ids[e] += action.ids
    assert max(map(len, ids.values())) > 3 * 12


def test_a_long_context_may_be_fed_in_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rounds = converse(ended_by_many(model))
    widths: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(reader, "PREFILL_ELEMENTS", 200)
    parts, _ = converse(ended_by_many(model))
    assert [action.ids for action in parts] == [action.ids for action in whole]
    for one, other in zip(parts, whole, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len(rounds) < len([width for width in widths if width > 1]) and max(widths) < 9


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_next", "linear_attention"), ("lfm2", "conv"), ("llama4_text", "chunked_attention")],
)
def test_layers_that_keep_no_keys_of_each_token_are_refused(
    family: str, kind: str, desk_chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", SMALL, desk_chat.tokenizer, 0)
    monkeypatch.setattr(model.config, "layer_types", ["full_attention", kind], raising=False)
    with pytest.raises(CheckpointError, match=f"layers of the type {kind}"):
        ended_by_many(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "mistral"])
def test_flops_count_the_chosen_experts_and_the_window(family: str, desk_chat: Chat) -> None:
    fields = SMALL | TRAINED[family] | {"hidden_size": 64, "tie_word_embeddings": True}
    model = build_model(family, fields, desk_chat.tokenizer, 0)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch counts no grouped product
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(96).reshape(2, 48))
    # torch counts the full square of each layer's attention, windows included
    windowed = 96 * 4 * 16 * (48 - 12) * {"gemma3_text": 1, "mistral": 2}.get(family, 0)
    counted = counter.get_total_flops() - windowed
    assert forward_flops(model, 96, 48) == pytest.approx(counted, rel=0.02)


def test_a_family_can_be_loaded_again(tmp_path: Path, model: Any, desk_chat: Chat) -> None:
    save_checkpoint(tmp_path, model, desk_chat.tokenizer, {})
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        again = load_model(str(tmp_path), "float32")(ids).logits
        torch.testing.assert_close(again, model(ids).logits, atol=1e-5, rtol=1e-5)
