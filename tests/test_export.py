"""Exported models are plain Hugging Face folders with the weights that were trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from test_cli import refused
from test_cli import run as command
from transformers import AutoModelForCausalLM

from opd_agents.errors import CheckpointError
from opd_agents.evaluation import evaluate
from opd_agents.export import export
from opd_agents.model_card import model_card
from opd_agents.policies.models import load_model
from opd_agents.runs import latest_checkpoint
from opd_agents.trainer import train

IDS = torch.arange(3, 40)[None]
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A run that trained an adapter of a tied model, with evaluations."""
    output = tmp_path_factory.mktemp("adapter") / "run"
    student = {"model": str(tiny_teacher), "lora": LORA}
    return train(
        tiny.mix(output, tiny_teacher, student=student, evaluation={"suite": tiny.SUITE, "every": 2})
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def test_an_adapter_is_merged(adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, tmp_path / "model") == latest_checkpoint(adapter)
    trained = load_model(str(latest_checkpoint(adapter)), "float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(plain), logits(trained), atol=1e-5, rtol=0)
    base = load_model(trained.peft_config["default"].base_model_name_or_path, "float32")
    assert float((logits(plain) - logits(base)).abs().max()) > 1e-3
    assert not [name for name in plain.state_dict() if "lora" in name or "base_layer" in name]
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"optimizer.pt", "trainer.json", "adapter_config.json"} and "README.md" in names


def test_it_loads_where_there_is_no_peft(adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "model")
    program = """
import sys
sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "Say 1."}], tokenize=False)
assert "Say 1." in text and "assistant" not in text, text
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(float(model(input_ids=torch.arange(3, 40)[None]).logits.double().sum()))
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "model")]
    environment = os.environ | {"PYTHONPATH": ""}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    expected = float(logits(load_model(str(latest_checkpoint(adapter)), "float32")).double().sum())
    assert float(result.stdout) == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_where_the_config_says(tiny_teacher: Path, tmp_path: Path, tied: bool) -> None:
    build = {"config": tiny.BUILD["config"] | {"tie_word_embeddings": tied}, "tokenizer": str(tiny_teacher)}
    base = train(tiny.mix(tmp_path / "base", tiny_teacher, "trainer.steps=1", student={"build": build}))
    student = {"model": str(base), "lora": LORA}
    run = train(tiny.mix(tmp_path / "run", tiny_teacher, "trainer.steps=1", student=student))
    export(run, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in weights(tmp_path / "model")) is not tied


def test_a_whole_model_keeps_its_weights_bit_for_bit(tiny_teacher: Path, tmp_path: Path) -> None:
    export(tiny_teacher, tmp_path / "model")
    source = weights(latest_checkpoint(tiny_teacher))
    copied = weights(tmp_path / "model")
    assert source.keys() == copied.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in source.items())


def test_a_dtype(adapter: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    for number, source in enumerate((adapter, tiny_teacher)):
        folder = tmp_path / str(number)
        export(source, folder, dtype="bfloat16")
        assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        export(folder, tmp_path / f"{number}-as-is")
        assert not (tmp_path / f"{number}-as-is/README.md").exists()  # of no run
        assert {tensor.dtype for tensor in weights(tmp_path / f"{number}-as-is").values()} == {torch.bfloat16}


def test_the_best_weights(adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, tmp_path / "best", best=True) == adapter / "best"
    best = load_model(str(adapter / "best"), "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    torch.testing.assert_close(logits(model), logits(best), atol=1e-5, rtol=0)


# ---- the model card ----


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_card_tells_of_exactly_these_weights(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(adapter, tmp_path / "newest")
    export(adapter, tmp_path / "best", best=True)
    summary, best = (json.loads((adapter / f).read_text()) for f in ("summary.json", "best/evaluation.json"))
    for name, step, figures in (("newest", 5, summary["evaluation"]), ("best", best["step"], best)):
        card = card_of(tmp_path / name)
        told = {one.metric_type: one for one in card.data.eval_results}
        assert told["success"].metric_value == figures["success"]
        args = {"episodes": figures["episodes"], "interval_95": figures["interval"]}
        assert told["success"].metric_args == args and told["success"].dataset_split == "validation"
        assert f"**tiny**, {step} steps, seed 0." in card.text
        low, high = figures["interval"]
        assert f"{100 * figures['success']:.1f} % | {100 * low:.1f} to {100 * high:.1f}" in card.text
        assert ("The weights were chosen by these figures" in card.text) == (name == "best")
        row = tiny.metrics(adapter)[step - 1] if step else {"total/flops": 0}
        assert f"{row['total/flops']:,} FLOPs" in card.text or not step
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("transformers", None, None)
    assert "preset `sft`" in card.text and "rank 4" in card.text  # the run that the student comes from, too
    assert "from random weights (llama)" in card.text and "No licence is stated." in card.text
    config = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(config) == yaml.safe_load((adapter / "config.yaml").read_text())
    assert f"transformers {transformers.__version__}" in card.text
    monkeypatch.chdir(tmp_path)
    exec(card.text.split("```python\n")[1].split("```")[0], {})  # the lines that show how to load it
    assert "Hello" in capsys.readouterr().out


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A run folder to change."""
    return shutil.copytree(adapter, tmp_path / "run")


def test_figures_of_other_weights_are_not_told(copied: Path) -> None:
    older = model_card(copied / "checkpoints/step-4", "x")
    state = json.loads((copied / "checkpoints/step-4/trainer.json").read_text())
    assert older.data.eval_results[0].metric_value == state["evaluation"]["success"]
    (copied / "summary.json").unlink()  # as if it were not done: step 5 was not evaluated yet
    newest = model_card(copied / "checkpoints/step-5", "x")
    assert newest.data.eval_results is None and "no evaluation of these weights" in newest.text
    assert "before training" not in newest.text and "Trained with" not in newest.text
    assert model_card(copied, "x") is model_card(copied / "trajectories", "x") is None


def test_evaluations_in_the_run_folder_are_told(copied: Path) -> None:
    rows = evaluate(
        tiny.SUITE, [str(copied), "random"], limit=4, split="test", out=copied / "on_test"
    )["policies"]  # fmt: skip
    newest = model_card(copied / "checkpoints/step-5", "x").data.eval_results
    mine = [one for one in newest if one.dataset_split == "test"]
    assert [(one.metric_type, one.metric_value) for one in mine[:2]] == [
        (key, rows[0][key]) for key in ("success", "success_greedy")
    ]
    assert len([one for one in newest if one.dataset_split == "validation"]) >= 2
    older = model_card(copied / "checkpoints/step-4", "x").data.eval_results
    assert {one.dataset_split for one in older} == {"validation"}  # other weights


def test_base_and_licence_are_those_that_are_known(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["student"] |= {"model": "somebody/some-model", "build": None}
    config["name"] = "```` fenced"
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    unknown = model_card(copied / "best", "x")
    assert (unknown.data.base_model, unknown.data.license) == ("somebody/some-model", None)
    assert "whose licence holds; it was not at hand here" in unknown.text
    assert unknown.text.count("`````") == 2  # around the config
    (copied / "cached.md").write_text("---\nlicense: mit\nlanguage: de\n---\nA model.")
    found = lambda model, name: str(copied / "cached.md") if name == "README.md" else None  # noqa: E731
    monkeypatch.setattr("opd_agents.model_card.try_to_load_from_cache", found)
    known = model_card(copied / "best", "x")
    assert (known.data.license, known.data.get("language")) == ("mit", None)
    assert "licence mit by its card" in known.text
    config["student"]["model"] = str(copied / "local")  # weights of unknown origin, with a card beside them
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    (copied / "local").mkdir()
    (copied / "local/README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\nA model.")
    local = model_card(copied / "best", "x")
    assert (local.data.base_model, local.data.license, local.data.license_name) == (None, "other", "ours")
    assert "from `local`" in local.text and str(copied) not in local.text.split("## Config")[0]


def test_what_is_exported_is_evaluated_and_trained_on(adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "model")
    pair = [str(adapter), str(tmp_path / "model")]
    rows = evaluate(tiny.SUITE, pair, limit=4, split="validation")["policies"]
    first, second = (row | {"policy": "", "spent": {}} for row in rows)  # an adapter costs more
    assert first == second
    student = {"model": str(tmp_path / "model"), "lora": LORA}
    more = train(tiny.mix(tmp_path / "more", tmp_path / "model", "trainer.steps=1", student=student, chat={}))
    assert len(tiny.metrics(more)) == 1


def test_the_command(adapter: Path, tmp_path: Path) -> None:
    result = command(
        "export", str(adapter), "--to", str(tmp_path / "new/model"), "--best", "--dtype", "bfloat16"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new/model/config.json").is_file()
    assert str(adapter / "best") in result.stdout
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_mistakes(adapter: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    assert "not empty" in refused("export", str(adapter), "--to", str(tmp_path / "used"))
    assert "not empty" in refused("export", str(adapter), "--to", str(tmp_path / "used/notes.txt"))
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    (tmp_path / "used/notes.txt").unlink()
    assert "no such folder" in refused("export", str(tmp_path / "nowhere"), "--to", str(tmp_path / "used"))
    message = refused("export", str(tiny_teacher), "--best", "--to", str(tmp_path / "used"))
    assert "best/" in message and "keep_best" in message  # it was trained without evaluations
    assert "float16" in refused("export", str(adapter), "--to", str(tmp_path / "used"), "--dtype", "float16")
    assert not list((tmp_path / "used").iterdir())
    export(adapter, tmp_path / "used")  # an empty folder will do
    with pytest.raises(CheckpointError, match="not empty"):
        export(adapter, tmp_path / "used")
