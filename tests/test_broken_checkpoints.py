"""Checkpoints and runs whose files are broken, or of a kind that cannot be trained: told, with the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from opd_agents.chat import Chat
from opd_agents.config import load_config
from opd_agents.errors import CheckpointError, ConfigError, RunFolderError
from opd_agents.evaluation.contestants import load_contestant
from opd_agents.export import export
from opd_agents.policies.models import (
    build_model,
    load_chat,
    load_merged,
    load_model,
    load_tokenizer,
    save_checkpoint,
    saved_dtype,
)
from opd_agents.runs import latest_checkpoint
from opd_agents.trainer import train

Edit = Callable[[Path], Any]


def setting(file: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        saved = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(saved | changes))

    return edit


def writing(file: str, content: bytes) -> Edit:
    return lambda folder: (folder / file).write_bytes(content)


def cutting(file: str) -> Edit:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:40])


@pytest.fixture
def folder(tmp_path: Path, student: Any, desk_chat: Chat) -> Path:
    save_checkpoint(tmp_path / "model", student, desk_chat.tokenizer, {"system": ""})
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cutting("model.safetensors"), "Cannot load a model"),
        (writing("config.json", b"[]"), "Cannot load a tokenizer"),
        (setting("config.json", hidden_size="wide"), "hidden_size"),
        (setting("config.json", intermediate_size=40), r"6 weights of other shapes .*, 48\), not .*, 40\)"),
        (setting("config.json", vocab_size=3, pad_token_id=7), "Cannot load a model.*Padding_idx"),
        (writing("opd_agents_chat.json", b"{"), "opd_agents_chat.json holds no settings"),
        (writing("opd_agents_chat.json", b'{"sytem": ""}'), "opd_agents_chat.json holds no settings"),
        (writing("tokenizer.json", b"{}"), "Cannot load a tokenizer"),
    ],
)
def test_a_broken_folder_is_told_by_the_one_error(folder: Path, edit: Edit, message: str) -> None:
    load_contestant(str(folder), 1.0)
    edit(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_contestant(str(folder), 1.0)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_transformers_makes_up_is_refused(folder: Path) -> None:
    """Of a known model type without tokenizer files it makes one that knows no text."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    setting("config.json", model_type="qwen2")(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer"):
        load_tokenizer(str(folder))


def test_models_that_read_more_than_text_are_refused(folder: Path, desk_chat: Chat) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(desk_chat.tokenizer)}
    vision = small | {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"Gemma3ForConditionalGeneration reads more than text"):
        load_model(str(folder), "float32")


def test_weights_that_are_no_floating_point_numbers_are_refused(folder: Path, monkeypatch: Any) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def quantised(*args: Any, **kwargs: Any) -> Any:
        model, found = load(*args, **kwargs)
        gate = model.model.layers[0].mlp.gate_proj
        gate.weight = torch.nn.Parameter(gate.weight.to(torch.int8), requires_grad=False)
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantised)
    with pytest.raises(CheckpointError, match=r"quantised weights \(torch.int8\)"):
        load_model(str(folder), "bfloat16")


@pytest.mark.parametrize("fields", [{"vocab_size": 9}, {"hidden_size": "wide"}, {"hidden_size": 33}])
def test_a_model_that_cannot_be_built_is_the_configs_mistake(fields: Any, desk_chat: Chat) -> None:
    small: dict[str, Any] = tiny.BUILD["config"]  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"student\.build: no model of type 'llama'"):
        build_model("llama", small | fields, desk_chat.tokenizer, 0)
    with pytest.raises(ConfigError, match=r"'lama'.*Unrecognized") as caught:
        build_model("lama", {}, desk_chat.tokenizer, 0)
    assert len(str(caught.value)) < 500  # and not all the types that there are


# ---- runs ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """An adapter, trained for a moment."""
    output = tmp_path_factory.mktemp("broken") / "run"
    return train(adapter_config(output, tiny_teacher))


def adapter_config(output: Path, base: Path) -> Any:
    student = {"model": str(base), "lora": {"rank": 2}}
    return load_config(tiny.sft(output, student=student), "trainer.steps=1")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Of a run that has not finished."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("edit", [cutting("optimizer.pt"), cutting("trainer.json")])
def test_a_checkpoint_that_cannot_be_resumed_says_so(copied: Path, tiny_teacher: Path, edit: Edit) -> None:
    edit(latest_checkpoint(copied))
    with pytest.raises(CheckpointError, match=r"step-1 is not whole .* Remove it"):
        train(adapter_config(copied, tiny_teacher), resume=True)
    shutil.rmtree(latest_checkpoint(copied))
    train(adapter_config(copied, tiny_teacher), resume=True)
    assert (latest_checkpoint(copied) / "trainer.json").is_file()


def test_a_config_of_a_run_that_cannot_be_read_is_named(copied: Path, tiny_teacher: Path) -> None:
    (copied / "config.yaml").write_text("{{{")
    with pytest.raises(RunFolderError, match=r"config\.yaml is no config of a run"):
        train(adapter_config(copied, tiny_teacher), resume=True)
    with pytest.raises(RunFolderError, match=r"config\.yaml is no config of a run"):
        load_contestant(str(copied), 1.0)


def test_an_adapter_that_is_not_whole_is_never_completed_at_random(copied: Path, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(copied)
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    for load in (load_model, load_merged):
        with pytest.raises(CheckpointError, match="lora_A"):
            load(str(checkpoint), "float32")
    save_file(weights | {name: weights[name][:, 1:].contiguous()}, file, {"format": "pt"})
    for load in (load_model, load_merged):
        with pytest.raises(CheckpointError, match="lora_A"):
            load(str(checkpoint), "float32")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="Cannot load a model"):
        export(copied, tmp_path / "model")
    (checkpoint / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="names no base_model_name_or_path"):
        load_model(str(checkpoint), "float32")


# ---- what a folder says of itself ----


def test_an_action_ends_where_the_generation_config_says(folder: Path) -> None:
    """Llama 3 and Qwen name several ids there; only special tokens count, for configs have defaults."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|other|>"]})
    tokenizer.save_pretrained(folder)
    by_itself = load_chat(str(folder), tokenizer)
    text, other = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|other|>"])
    word = next(iter(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder)))
    setting("generation_config.json", eos_token_id=[*by_itself.end_ids, text, word])(folder)
    chat = load_chat(str(folder), tokenizer)
    assert chat.end_ids == by_itself.end_ids | {text} and other not in chat.end_ids
    assert chat.parse([word, text], ended=True).text == tokenizer.decode([word])
    assert chat.fingerprint == by_itself.fingerprint  # a teacher with a longer list still fits
    (folder / "generation_config.json").unlink()
    assert load_chat(str(folder), tokenizer).end_ids == by_itself.end_ids


def test_an_adapters_actions_end_where_those_of_its_base_do(
    run: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(latest_checkpoint(tiny_teacher), base)
    tokenizer = load_tokenizer(str(base))
    setting("generation_config.json", eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id])(base)
    shutil.copytree(latest_checkpoint(run), tmp_path / "adapter")
    setting("adapter_config.json", base_model_name_or_path=str(base))(tmp_path / "adapter")
    assert tokenizer.pad_token_id in load_chat(str(tmp_path / "adapter"), tokenizer).end_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_is_evaluated_in_the_dtype_of_its_weights(
    dtype: str, student: Any, desk_chat: Chat, tmp_path: Path
) -> None:
    model = build_model("llama", tiny.BUILD["config"], desk_chat.tokenizer, 0).to(getattr(torch, dtype))
    save_checkpoint(tmp_path, model, desk_chat.tokenizer, {})
    assert saved_dtype(tmp_path) == dtype
    contestant: Any = load_contestant(str(tmp_path), 1.0)
    assert contestant.sampled.model.dtype == getattr(torch, dtype)
