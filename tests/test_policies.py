import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rolling import DESK, Scripted
from safetensors.torch import save_file
from scipy.stats import binomtest, chisquare
from torch.utils.flop_counter import FlopCounterMode

from opd_agents import envs
from opd_agents.errors import CheckpointError
from opd_agents.policies import History, MixturePolicy, RandomPolicy
from opd_agents.policies.models import (
    fit_vocabulary,
    forward_flops,
    head,
    hidden_states,
    load_chat,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from opd_agents.types import Actor, Message


@pytest.fixture(scope="module")
def desk():
    env = envs.make(DESK, level="easy")
    env.reset(seed=0, options={"split": "train", "task_id": "0"})
    return env


def histories(env, n, turn=0, ids=()):
    messages = tuple(Message("user", "x") for _ in range(2 + turn))
    return [History(f"e{i}", (3, 1, i), ids, messages, 10, env) for i in range(n)]


def test_random_calls_fit_their_schemas(desk):
    actions = RandomPolicy().act(histories(desk, 400))
    tools = {tool.name: tool.parameters["properties"] for tool in desk.tools}
    calls = [json.loads(action.text) for action in actions]
    for call in calls:
        assert set(call["arguments"]) == set(tools[call["name"]])
    counts = [sum(call["name"] == name for call in calls) for name in tools]
    assert chisquare(counts).pvalue > 0.001
    assert RandomPolicy().act(histories(desk, 400)) == actions


@pytest.fixture
def mixed():
    parts = {
        "student": (Scripted(lambda h: "s"), 5.0),
        "teacher": (Scripted(lambda h: "t", Actor.TEACHER), 3.0),
        "expert": (Scripted(lambda h: "e", Actor.EXPERT), 2.0),
    }
    return MixturePolicy(parts)


def test_a_mixture_draws_each_actor_with_its_share(mixed, desk):
    actors = [action.actor for turn in range(3) for action in mixed.act(histories(desk, 1000, turn))]
    for actor, share in ((Actor.STUDENT, 0.5), (Actor.TEACHER, 0.3), (Actor.EXPERT, 0.2)):
        assert binomtest(sum(a is actor for a in actors), 3000, share).pvalue > 0.001


def test_a_mixture_is_reproducible_whoever_shares_the_batch(mixed, desk):
    everyone = histories(desk, 50, ids=(1, 2, 3))
    actors = [a.actor for a in mixed.act(everyone)]
    assert [mixed.act([h])[0].actor for h in everyone] == actors
    assert [a.actor for a in mixed.act(everyone[::-1])] == actors[::-1]
    assert [a.actor for a in mixed.act(histories(desk, 50, turn=1, ids=(1, 2, 3, 4)))] != actors


def test_whose_turn_it_is_tells_nothing_about_what_is_drawn_next(desk):
    coin = MixturePolicy({"a": (Scripted(lambda h: "a"), 1.0), "b": (Scripted(lambda h: "b"), 1.0)})
    heads = np.array([action.text == "a" for action in coin.act(histories(desk, 1000))])
    for turn in (0, 1):  # the draws of the same turn and of the next one
        uniforms = np.array([h.random().random() for h in histories(desk, 1000, turn)])
        assert abs(np.corrcoef(heads, uniforms)[0, 1]) < 0.1


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2}], ids=["tied", "untied", "gqa"]
)
def test_flops_are_those_that_torch_counts(tiny_llama, fields):
    # Left out: norms, activations, rotary embeddings and softmax, which torch's counter leaves out too. It
    # counts attention (the eager one: no fused one on a CPU) over the full square of each row, so every token
    # has the whole row as its context here.
    model = tiny_llama(hidden_size=64, intermediate_size=160, **fields)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(96).reshape(2, 48))
    assert forward_flops(model, 96, 48) == pytest.approx(counter.get_total_flops(), rel=0.05)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(model)(hidden_states(model, torch.arange(96).reshape(2, 48)))
    assert forward_flops(model, 96, 48) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_seed_gives_a_model_and_leaves_the_global_generator_alone(tiny_llama):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = tiny_llama(seed=3), tiny_llama(seed=3), tiny_llama(seed=4)
    assert torch.rand(1) == expected
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert not any(torch.equal(x, z) for x, _, z in pairs if x.ndim == 2)
    assert not a.training


def test_right_padding_changes_no_state(student):
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        short = hidden_states(student, ids)
        padded = hidden_states(student, torch.cat([ids, torch.zeros(1, 9, dtype=torch.int64)], 1))
    torch.testing.assert_close(padded[:, :12], short, atol=1e-5, rtol=0)


def test_a_checkpoint_comes_back_as_it_was(tmp_path, student, desk_chat):
    settings = {"kwargs": desk_chat.kwargs, "system": desk_chat.system}
    save_checkpoint(tmp_path, student, desk_chat.tokenizer, settings)
    model, tokenizer = load_model(str(tmp_path), "float32"), load_tokenizer(str(tmp_path))
    fit_vocabulary(model, tokenizer, "here")
    saved, given = (
        load_chat(str(tmp_path), tokenizer),
        load_chat(str(tmp_path), tokenizer, {"system": "Be kind."}),
    )
    assert saved.fingerprint == desk_chat.fingerprint != given.fingerprint
    assert given.system == "Be kind." and given.kwargs == {}
    for mine, loaded in zip(student.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, loaded)
    assert not model.training
    with torch.no_grad():
        ids = torch.arange(20, 40)[None]
        assert torch.equal(student(ids).logits, model(ids).logits)


def test_a_mistyped_name_is_told_at_once_where_no_hub_can_be_reached(tmp_path):
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    program = """
import time
from opd_agents.errors import CheckpointError
from opd_agents.policies import models
started = time.monotonic()
for load in (models.load_tokenizer, lambda path: models.load_model(path, "float32")):
    try:
        load("techer")
    except CheckpointError as error:
        print(error)
print(time.monotonic() - started < 20, models._check_exists("model", "some/model"))
"""
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | unreachable, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first.startswith("Cannot load a tokenizer from 'techer', which is no folder here, from the hub:")
    assert second.startswith("Cannot load a model from 'techer'")
    assert last == "True None"


def test_checkpoints_that_cannot_be_used(tmp_path, student, desk_chat, tiny_llama):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(str(tmp_path / "nowhere"), "float32")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="Cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))
    save_checkpoint(tmp_path, student, desk_chat.tokenizer, {})
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="Cannot load a model"):
        load_model(str(tmp_path), "float32")
    weights = {
        name: value.clone() for name, value in student.state_dict().items() if name != "lm_head.weight"
    }
    cut = weights | {"model.norm.weight": torch.ones(7)}
    save_file(cut, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 weights of other shapes .*: model\.norm\.weight \(7,\), not \(32,\)"
    ):
        load_model(str(tmp_path), "float32")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights of a LlamaForCausalLM, among them model\.layers\.1"
    ):
        load_model(str(tmp_path), "float32")
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.add_tokens(["onemore"])
    with pytest.raises(CheckpointError, match="161 tokens and the model only 160"):
        fit_vocabulary(student, tokenizer, "here")
