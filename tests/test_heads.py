"""What is trained is what the model itself says: tied, padded, biased, scaled and soft-capped heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rolling import desk_episodes, rolled, sampler
from test_sampler import history
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.errors import AlignmentError, CheckpointError
from opd_agents.frozen import check_behaviour, frozen_terms
from opd_agents.objectives import token_terms
from opd_agents.policies.models import (
    build_model,
    check_projection,
    fit_vocabulary,
    head,
    hidden_states,
    load_model,
    save_checkpoint,
)
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.teachers.local import LocalTeacher
from opd_agents.types import Actor

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "soft cap": ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "divided": ("granite", {"logits_scaling": 0.25}),
    "multiplied": ("cohere", {"logit_scale": 4.0}),
    "biased": ("phi", {}),
}


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest, desk_chat: Chat) -> PreTrainedModel:
    family, fields = HEADS[request.param]
    built = build_model(family, SMALL | fields, desk_chat.tokenizer, seed=5)
    if request.param == "biased":
        nn.init.normal_(built.get_output_embeddings().bias)
    return built


def test_fused_terms_and_their_gradients_are_those_of_the_models_logits(model: PreTrainedModel) -> None:
    ids = torch.arange(20, 60).reshape(2, 20)
    target = torch.arange(30, 70)
    hidden = hidden_states(model, ids).flatten(0, 1)
    fused = token_terms(hidden, head(model), target, temperature=0.7, chunk_elements=999)
    whole = (model(ids).logits.flatten(0, 1) / 0.7).log_softmax(-1)
    expected = whole.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(fused.logprob, expected, atol=1e-4, rtol=0)
    mine, theirs = (gradients(model, value.sum()) for value in (fused.logprob, expected))
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-3, rtol=1e-4)
    check_projection(model, "float32")


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def test_a_head_that_is_not_understood_is_refused(desk_chat: Chat) -> None:
    model = build_model("llama", SMALL, desk_chat.tokenizer, 0)
    forward = model.forward

    def scaled(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * 1.01
        return output

    model.forward = scaled
    with pytest.raises(AlignmentError, match=r"LlamaForCausalLM: the head .* differs by"):
        check_projection(model, "float32")


PADDED = {"student": 7, "teacher": 21}  # rows of the head beyond the tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, desk_chat: Chat) -> dict[str, Path]:
    """Two checkpoints of one tokenizer, their heads padded differently, as in Qwen2.5 0.5B and 7B; the rows
    of padding are likely, and would be sampled."""
    found = {}
    for name, rows in PADDED.items():
        model = build_model("llama", SMALL | {"tie_word_embeddings": False}, desk_chat.tokenizer, rows)
        size = len(desk_chat.tokenizer)
        model.resize_token_embeddings(size + rows, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[size:] = 3 * model.lm_head.weight[:rows]
        found[name] = tmp_path_factory.mktemp(name)
        save_checkpoint(found[name], model, desk_chat.tokenizer, {})
    return found


def loaded(folder: Path, chat: Chat) -> PreTrainedModel:
    model = load_model(str(folder), "float32")
    fit_vocabulary(model, chat.tokenizer, str(folder))
    return model


def test_padding_is_never_sampled(folders: dict[str, Path], desk_chat: Chat) -> None:
    size = len(desk_chat.tokenizer)
    histories = [history(range(20, 24 + e), uid=str(e), stream=(1, 1, e), max_tokens=40) for e in range(8)]
    never = frozenset({size + 99})

    def drawn(model: PreTrainedModel) -> set[int]:
        actions = TransformersSampler(model, never, actor=Actor.STUDENT, temperature=1.0).act(histories)
        return {token for action in actions for token in action.ids}

    assert max(drawn(load_model(str(folders["student"]), "float32"))) >= size
    assert max(drawn(loaded(folders["student"], desk_chat))) < size


def test_models_with_different_padding_are_compared_over_their_tokenizer(
    folders: dict[str, Path], desk_chat: Chat
) -> None:
    student, teacher = loaded(folders["student"], desk_chat), LocalTeacher(str(folders["teacher"]), desk_chat)
    check_projection(student, "float32")
    episodes = rolled(desk_episodes(4, max_turns=3), sampler(student, desk_chat), desk_chat)
    packed = pack(episodes)
    frozen = frozen_terms(student, packed, {"teacher": teacher.score(packed, 500)}, 1.0, 500)
    told = frozen.references["teacher"]
    assert told.kl is not None
    assert check_behaviour(packed, episodes, frozen, 0, 1e-4) < 1e-4

    size, row = len(desk_chat.tokenizer), packed.rows[0]
    with torch.no_grad():
        log_q, log_p = (
            AutoModelForCausalLM.from_pretrained(folders[name])(row[None]).logits[0, :, :size].log_softmax(-1)
            for name in ("student", "teacher")
        )
    mine = packed.row == 0
    places, target = packed.position[mine] - 1, packed.target[mine]
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)[places]
    torch.testing.assert_close(told.kl[mine], divergence, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(told.logprob[mine], log_p[places, target], atol=1e-4, rtol=1e-4)


def test_a_padded_checkpoint_keeps_its_shape(
    folders: dict[str, Path], desk_chat: Chat, tmp_path: Path
) -> None:
    """It must go on fitting its config, its LoRA adapters and its serving engine."""
    model = loaded(folders["student"], desk_chat)
    save_checkpoint(tmp_path, model, desk_chat.tokenizer, {})
    again, first = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, folders["student"]))
    assert len(again.lm_head.weight) == len(desk_chat.tokenizer) + PADDED["student"]
    for mine, theirs in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    model(torch.arange(20, 30)[None]).logits.logsumexp(-1).sum().backward()
    assert not model.lm_head.weight.grad[len(desk_chat.tokenizer) :].any()


def test_an_id_that_the_tokenizer_skips_is_text_without_meaning(desk_chat: Chat) -> None:
    """Between its ids a tokenizer may have gaps; such an id is sampled, trained and read as nothing."""
    known = desk_chat.tokenizer.encode("the")
    parsed = desk_chat.parse([*known, 99_999, *known], ended=False)
    assert parsed.error is None and not parsed.calls
    assert parsed.spans[-1].stop == 2 * len(known) + 1


def test_a_tokenizer_larger_than_the_model_is_refused(desk_chat: Chat, folders: dict[str, Path]) -> None:
    model = load_model(str(folders["student"]), "float32")
    model.resize_token_embeddings(100)
    with pytest.raises(
        CheckpointError, match=r"here: the tokenizer has \d+ tokens and the model only 100; use the"
    ):
        fit_vocabulary(model, desk_chat.tokenizer, "here")
