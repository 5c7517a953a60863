"""Adapters: what they train, what they leave alone, and their life from a base to checkpoints and stages."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from rolling import desk_episodes, rolled, sampler
from transformers import AutoModelForCausalLM

from opd_agents import trainer
from opd_agents.batch import pack
from opd_agents.config import Lora, RunConfig, Self, load_config
from opd_agents.errors import CheckpointError, ConfigError
from opd_agents.evaluation import evaluate
from opd_agents.frozen import frozen_terms
from opd_agents.policies.adapters import adapter_off, add_adapter
from opd_agents.policies.models import backward_flops, forward_flops, load_merged, load_model, save_checkpoint
from opd_agents.runs import latest_checkpoint
from opd_agents.starting import load_session
from opd_agents.teachers.self_teacher import self_teacher
from opd_agents.trainer import train
from opd_agents.types import Actor

LORA = {"rank": 4, "alpha": 8.0}
BASE = {"kind": "self"}
IDS = torch.arange(20, 44)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, student: Any, desk_chat: Any) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_checkpoint(folder, student, desk_chat.tokenizer, {})
    return folder


@pytest.fixture
def adapted(base: Path) -> Any:
    """The base with an adapter that changes it."""
    model = load_model(str(base), "float32")
    add_adapter(model, Lora(**LORA), seed=3)
    disturb(model)
    return model


def disturb(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# ---- the adapter ----


def test_a_new_adapter_changes_nothing_and_alone_is_trained(base: Path) -> None:
    plain, model = load_model(str(base), "float32"), load_model(str(base), "float32")
    add_adapter(model, Lora(**LORA), seed=3)
    assert torch.equal(logits(model), logits(plain))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    layers = sum(p.numel() and p.ndim == 2 for name, p in plain.named_parameters() if "layers." in name)
    assert len(trained) == 2 * layers  # every linear layer, and not the tied head
    assert not any(module.training for module in model.modules())


def test_the_seed_gives_the_adapter(base: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        model = load_model(str(base), "float32")
        torch.rand(seed)  # the global generator does not count
        add_adapter(model, Lora(**LORA), seed=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(["q_proj", "v_proj"], 4), (["mlp.down_proj"], 2), (["model.layers.1.self_attn.k_proj"], 1)],
)
def test_targets_choose_layers(base: Path, targets: list[str], layers: int) -> None:
    model = load_model(str(base), "float32")
    add_adapter(model, Lora(targets=targets), seed=0)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == layers


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (["q_proj", "query", "c_attn"], ["query or c_attn", "q_proj", "model.layers.0", "LlamaForCausalLM"]),
        (["lm_head"], ["lm_head", "below the head"]),
        (["embed_tokens"], ["embed_tokens"]),
        (["proj"], ["called proj"]),
        ([], ["empty"]),
    ],
)
def test_targets_that_match_nothing_are_refused_with_real_names(
    base: Path, targets: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"student\.lora\.targets") as caught:
        add_adapter(load_model(str(base), "float32"), Lora(targets=targets), seed=0)
    assert all(part in str(caught.value) for part in parts)


def test_off_is_the_base_also_after_an_error(base: Path, adapted: Any) -> None:
    plain, changed = logits(load_model(str(base), "float32")), logits(adapted)
    assert float((changed - plain).abs().max()) > 0.01
    with pytest.raises(KeyError), adapter_off(adapted):
        assert torch.equal(logits(adapted), plain)
        raise KeyError
    assert torch.equal(logits(adapted), changed)
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == [
        name for name, _ in adapted.named_parameters() if "lora_" in name
    ]


def test_flops_count_the_adapter_while_it_is_on_and_no_gradient_of_frozen_weights(
    base: Path, adapted: Any
) -> None:
    plain = load_model(str(base), "float32")
    extra = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    whole = forward_flops(plain, 10, 4.0)
    assert forward_flops(adapted, 10, 4.0) == whole + 10 * 2 * extra
    with adapter_off(adapted):
        assert forward_flops(adapted, 10, 4.0) == whole
    assert backward_flops(plain, 10, 4.0) == 2 * whole
    attention = whole - forward_flops(plain, 10, 0.0)
    weights = (whole - attention) // 10 // 2
    gradients = 10 * 2 * (weights + extra) + 10 * 2 * extra  # of the activations, of the adapter's weights
    assert backward_flops(adapted, 10, 4.0) == gradients + 2 * attention


# ---- checkpoints ----


def test_a_checkpoint_is_an_adapter_that_plain_libraries_load(
    base: Path, adapted: Any, desk_chat: Any, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, adapted, desk_chat.tokenizer, {"system": ""})
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "tokenizer.json").is_file()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
    expected = logits(adapted)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    assert torch.equal(logits(by_peft), expected)
    torch.testing.assert_close(logits(load_merged(str(tmp_path), "float32")), expected, atol=1e-4, rtol=0)


def test_a_base_is_named_by_its_absolute_path(
    base: Path, desk_chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    model = load_model(base.name, "float32")
    add_adapter(model, Lora(**LORA), seed=0)
    save_checkpoint(tmp_path, model, desk_chat.tokenizer, {})
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path), "float32")), logits(model))


@pytest.mark.parametrize("place", ["/no/such/base", "no/such/base", "gone"])
def test_a_base_that_is_gone_is_told_with_the_remedy(
    base: Path, adapted: Any, desk_chat: Any, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, adapted, desk_chat.tokenizer, {})
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace(str(base), place))
    for load in (load_model, load_merged):
        with pytest.raises(CheckpointError, match=f"adapter, and its base model '{place}'") as caught:
            load(str(tmp_path), "float32")
        assert "base_model_name_or_path" in str(caught.value)


# ---- the base as teacher ----


def frozen(model: Any, chat: Any) -> Any:
    return self_teacher(Self.model_validate(BASE), model, chat, 1.0, fresh_adapter=True)


def test_the_base_as_teacher_is_the_student_until_it_learns(base: Path, desk_chat: Any) -> None:
    model = load_model(str(base), "float32")
    add_adapter(model, Lora(**LORA), seed=3)
    size = sum(p.numel() for p in model.parameters())
    itself = frozen(model, desk_chat)
    assert itself.model is model and itself.sampler.model is model and itself.best.model is model
    assert sum(p.numel() for p in itself.model.parameters()) == size
    rolls = rolled(desk_episodes(4, max_turns=3), sampler(model, desk_chat), desk_chat)
    packed = pack(rolls)
    same = frozen_terms(model, packed, {"teacher": itself.score(packed, 400)}, 1.0, 400)
    said = same.references["teacher"]
    assert said.kl is not None and not said.kl.any()
    assert torch.equal(same.logprob, said.logprob)
    disturb(model)
    apart = frozen_terms(model, packed, {"teacher": itself.score(packed, 400)}, 1.0, 400)
    later = apart.references["teacher"]
    assert later.kl is not None and float(later.kl.mean()) > 1e-3
    assert torch.equal(later.logprob, said.logprob)


def test_it_acts_and_counts_as_the_base(base: Path, adapted: Any, desk_chat: Any) -> None:
    itself, plain = frozen(adapted, desk_chat), load_model(str(base), "float32")
    theirs = sampler(plain, desk_chat, actor=Actor.TEACHER)
    episodes = desk_episodes(4, max_turns=3)
    assert rolled(episodes, itself, desk_chat) == rolled(episodes, theirs, desk_chat)
    assert (itself.tokens, itself.flops) == (theirs.generated_tokens, theirs.flops)
    greedy = sampler(plain, desk_chat, actor=Actor.TEACHER, temperature=0.0)
    assert rolled(episodes, itself.greedy, desk_chat) == rolled(episodes, greedy, desk_chat)


# ---- runs ----


def config(output: Path, base: Path, *overrides: str, **changes: Any) -> RunConfig:
    """The tiny run with every part, on an adapter."""
    student = {"model": str(base), "lora": LORA}
    return tiny.mix(output, base, *overrides, **{"student": student} | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A reverse KL to the base itself and the verifier's reward, on an adapter."""
    evaluation = {"suite": tiny.SUITE, "limit": 4, "every": 2}
    output = tmp_path_factory.mktemp("lora") / "run"
    return train(config(output, tiny_teacher, teacher=BASE, evaluation=evaluation))


def test_a_run_leaves_the_base_as_it_is_and_the_teacher_stays_where_it_was(
    run: Path, tiny_teacher: Path
) -> None:
    kl = [row["distill/kl"] for row in tiny.metrics(run)]
    assert kl[0] == 0
    assert all(later > 0 for later in kl[1:])
    trained = load_model(str(latest_checkpoint(run)), "float32")
    base = load_model(str(latest_checkpoint(tiny_teacher)), "float32")
    assert float((logits(trained) - logits(base)).abs().max()) > 1e-3
    with adapter_off(trained):
        assert torch.equal(logits(trained), logits(base))


def test_its_session_holds_the_weights_once(run: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    from opd_agents.runs import RunFolder

    settings = config(tmp_path / "again", tiny_teacher, teacher=BASE)
    session = load_session(settings, RunFolder(settings.folder, {}, resume=False))
    held = {id(p): p.numel() for model in (session.model, session.teacher.model) for p in model.parameters()}
    base = load_model(str(latest_checkpoint(tiny_teacher)), "float32")
    trained = sum(p.numel() for p in session.optimizer.weights)
    assert sum(held.values()) == sum(p.numel() for p in base.parameters()) + trained
    assert trained < sum(held.values()) / 2


def test_a_run_and_its_best_are_evaluated(run: Path) -> None:
    rows = evaluate(tiny.SUITE, [str(run), str(run / "best")], limit=2, split="validation")["policies"]
    assert [row["episodes"] for row in rows] == [2, 2]


@pytest.mark.parametrize("dies_before", [1, 3])
def test_a_killed_run_goes_on_as_if_it_had_not(
    run: Path, tiny_teacher: Path, tmp_path: Path, dies_after: Any, dies_before: int
) -> None:
    evaluation = {"suite": tiny.SUITE, "limit": 4, "every": 2}
    again = config(tmp_path / "run", tiny_teacher, teacher=BASE, evaluation=evaluation)
    with dies_after(dies_before):
        train(again)
    assert tiny.final_state(train(again, resume=True)) == tiny.final_state(run)


def staged(output: Path, base: Path, students: dict[str, Any]) -> RunConfig:
    """A stage for each of the students, all on the expert's episodes."""
    student = {"model": str(base)}
    stages = {name: {"student": student | changes} for name, changes in students.items()}
    return load_config(tiny.sft(output, student=student, stages=stages), "trainer.steps=2")


def test_stages_may_adapt_what_a_stage_trained_and_train_what_a_stage_adapted(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: dict[str, tuple[bool, torch.Tensor]] = {}

    def spy(settings: RunConfig, *others: Any) -> Any:
        session = load_session(settings, *others)
        whole = all(p.requires_grad for p in session.model.parameters())
        starts[settings.folder.name] = whole, logits(session.model)
        return session

    monkeypatch.setattr(trainer, "load_session", spy)
    students = {
        "full": {"lora": None},
        "adapt": {"lora": LORA},
        "more": {"lora": LORA},
        "merge": {"lora": None},
    }
    run = train(staged(tmp_path / "run", tiny_teacher, students))
    assert [whole for whole, _ in starts.values()] == [True, False, False, True]
    for before, after in (("full", "adapt"), ("adapt", "more"), ("more", "merge")):
        left = load_model(str(latest_checkpoint(run / before)), "float32")
        torch.testing.assert_close(starts[after][1], logits(left), atol=1e-4, rtol=1e-4)
    assert (latest_checkpoint(run / "merge") / "model.safetensors").is_file()
    base = json.loads((latest_checkpoint(run / "more") / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(latest_checkpoint(run / "full").resolve())


def test_another_adapter_on_an_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    for lora in ({"rank": 8, "alpha": 8}, {"rank": 4, "alpha": 4}, LORA | {"targets": ["q_proj"]}):
        changed = config(
            tmp_path / "run",
            latest_checkpoint(run),
            teacher=BASE,
            student={"model": str(run), "lora": lora},
        )
        with pytest.raises(ConfigError, match="opd-agents export"):
            train(changed)


def test_mistakes_are_told_before_training(tiny_teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"student.lora.targets.*c_attn.*q_proj"):
        train(config(output, tiny_teacher, "student.lora.targets=[c_attn]"))
    with pytest.raises(ConfigError, match=r"student\.build"):
        train(load_config(tiny.sft(output, student={"build": tiny.BUILD, "lora": LORA})))
    with pytest.raises(ConfigError, match=r"unknown key `teacher.model`"):
        config(output, tiny_teacher, teacher=BASE | {"model": str(tiny_teacher)})
    assert not os.path.exists(output / "metrics.jsonl")
    train(config(output, tiny_teacher, "trainer.steps=1"))  # the corrected run is not told that there is one


def test_a_run_whose_base_was_moved_says_so(tiny_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(latest_checkpoint(tiny_teacher), tmp_path / "base")
    run = train(config(tmp_path / "run", tmp_path / "base", "trainer.steps=1"))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="its base model"):
        evaluate(tiny.SUITE, [str(run)], limit=1, split="validation")
