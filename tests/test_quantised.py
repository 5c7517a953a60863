"""Teachers of less memory: weights of 8 and 4 bits, layers that rest on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from away import AWAY, away
from rolling import desk_episodes, rolled
from test_architectures import SAMPLED, SMALL
from test_estimate import config as estimated
from test_estimate import model as outline
from test_stored import DISTILLED
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_agents.batch import Packed, pack
from opd_agents.chat import Chat
from opd_agents.config import Quantisation, load_config
from opd_agents.config.loading import find_experiment
from opd_agents.errors import ConfigError
from opd_agents.estimate import memory
from opd_agents.policies.models import (
    build_model,
    forward_flops,
    hidden_states,
    load_chat,
    load_tokenizer,
)
from opd_agents.policies.offload import Offloaded
from opd_agents.policies.quantised import BLOCK, Rounded, round_weights
from opd_agents.teachers.cache import StaleCache
from opd_agents.teachers.local import LocalTeacher, ModelTeacher
from opd_agents.trainer import train

TEACHER = str(find_experiment("orderdesk_opd").parent / "orderdesk_teacher")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat(TEACHER, load_tokenizer(TEACHER))


@pytest.fixture(scope="module")
def whole(chat: Chat) -> LocalTeacher:
    return LocalTeacher(TEACHER, chat)


@pytest.fixture(scope="module")
def packed(chat: Chat, whole: LocalTeacher) -> Packed:
    return pack(rolled(desk_episodes(8), whole, chat))


def log_distributions(teacher: ModelTeacher, packed: Packed) -> Tensor:
    signal = teacher.score(packed, 4096)
    with torch.no_grad():
        return signal.head(signal.hidden).log_softmax(-1)


def stored(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in model.parameters())


# ---- weights of 8 and 4 bits ----


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(96, 256), (3, 5), (2, 7, 9)])
def test_a_rounded_weight_is_within_half_a_step(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.rand(shape[-1])
    rounded = Rounded(weight.shape, bits)
    codes, scales = rounded.right_inverse(weight)
    assert codes.itemsize == 1 and codes.shape[-1] == BLOCK * bits // 8
    error = rounded(codes, scales) - weight
    matrices = error.flatten(-2).reshape(-1, shape[-2] * shape[-1])
    for matrix, steps in zip(matrices, scales.view(len(matrices), -1), strict=True):
        assert (matrix.abs() <= 0.501 * steps.repeat_interleave(BLOCK)[: len(matrix)]).all()
    assert error.abs().max() > 0
    assert not rounded(*rounded.right_inverse(torch.zeros(shape))).any()


@pytest.mark.parametrize(("to", "size", "nats"), [("int8", 0.31, 1e-6), ("int4", 0.19, 1e-4)])
def test_a_rounded_teacher_says_what_the_whole_one_says(
    to: Quantisation, size: float, nats: float, chat: Chat, whole: LocalTeacher, packed: Packed
) -> None:
    teacher = LocalTeacher(TEACHER, chat, quantise=to)
    ours, theirs = log_distributions(teacher, packed), log_distributions(whole, packed)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    assert ours.isfinite().all() and -1e-7 < divergence.mean() < nats
    assert (ours - theirs).abs().max() > 1e-6
    assert stored(teacher.model) < size * stored(whole.model)
    assert teacher.can == whole.can and teacher.model.dtype == torch.float32
    assert forward_flops(teacher.model, 10, 10) == forward_flops(whole.model, 10, 10)
    again = rolled(desk_episodes(2), teacher.greedy, chat)
    assert [one.turns for one in again] == [one.turns for one in rolled(desk_episodes(2), whole.greedy, chat)]


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_all_but_embeddings_and_head_is_rounded(family: str, to: Quantisation, desk_chat: Chat) -> None:
    """Transposed matrices and experts, too."""
    fields = SMALL | SAMPLED.get(family, {}) | {"tie_word_embeddings": False}
    model, rounded = (build_model(family, fields, desk_chat.tokenizer, 0).requires_grad_(False) for _ in "ab")
    round_weights(rounded, to)
    codes = torch.int8 if to == "int8" else torch.uint8  # where 4 bits stand in pairs
    tables = [module for module in rounded.modules() if isinstance(module, nn.Embedding)]
    whole = {id(weight) for module in (rounded.lm_head, *tables) for weight in module.parameters()}
    assert {weight.dtype for weight in rounded.parameters() if id(weight) in whole} == {torch.float32}
    inner = [weight for weight in rounded.parameters() if id(weight) not in whole]
    assert {weight.dtype for weight in inner if weight.ndim > 1} == {codes}
    assert forward_flops(rounded, 10, 10) == pytest.approx(forward_flops(model, 10, 10), rel=0.01)
    ids = torch.arange(40).view(2, 20)
    ours, theirs = (hidden_states(one, ids) for one in (rounded, model))
    assert 0 < (ours - theirs).norm() / theirs.norm() < (0.02 if to == "int8" else 0.3)


def test_a_run_with_a_rounded_teacher(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, tiny_episodes: Path
) -> None:
    """Its log-probs are its own: a cache of the whole teacher's is not of this one."""

    def run(name: str, teacher: dict[str, Any]) -> float:
        raw = {
            "name": "rounded", "output": str(tmp_path / name), "imports": ["tiny"],
            "student": {"model": str(tiny_student)}, "teacher": teacher, "loss": DISTILLED,
            "rollout": {"source": {"trajectories": str(tiny_episodes)}, "episodes_per_step": 6},
            "trainer": {"steps": 1, "learning_rate": 0.001, "tensorboard": False},
        }  # fmt: skip
        return float(tiny.metrics(train(load_config(raw)))[0]["loss"])

    teacher = {"model": str(tiny_teacher)}
    cached = {"kind": "cached", "cache": str(tmp_path / "cache"), "of": teacher | {"quantise": "int8"}}
    whole, rounded = run("whole", teacher), run("cached", cached)
    assert rounded != whole and rounded == pytest.approx(whole, rel=0.02)
    with pytest.raises(StaleCache, match="other weights"):
        run("stale", cached | {"of": teacher})


# ---- layers that rest on the CPU ----


def test_layers_come_to_the_device_while_they_compute(
    tiny_llama: Any, desk_chat: Chat, sampled: list[Any]
) -> None:
    packed = pack(sampled[:4])
    model = tiny_llama(seed=2, tie_word_embeddings=False).requires_grad_(False)
    model.set_attn_implementation("eager")
    plain = ModelTeacher(model, desk_chat, 1.0)
    said = log_distributions(plain, packed)
    acted = rolled(desk_episodes(3, max_turns=2), plain, desk_chat)
    resting = [weight.data_ptr() for weight in model.model.layers.parameters()]
    with away():
        weights = Offloaded(model, AWAY)
        teacher = ModelTeacher(model, desk_chat, 1.0, weights=weights)
        signal = teacher.score(packed, 4096)
        with torch.no_grad():
            there = signal.head(signal.hidden.to(AWAY)).log_softmax(-1).cpu()
        torch.testing.assert_close(there, said, atol=1e-5, rtol=0)
        again = rolled(desk_episodes(3, max_turns=2), teacher, desk_chat)
        assert [[t.action_ids for t in one.turns] for one in again] == [
            [t.action_ids for t in one.turns] for one in acted
        ]
        with pytest.raises(ZeroDivisionError), weights():
            with weights():
                assert {weight.device for weight in model.parameters()} == {AWAY}
            assert {weight.device for weight in model.parameters()} == {AWAY}
            _ = 1 / 0
        assert model.device == AWAY == model.lm_head.weight.device
        assert [weight.data_ptr() for weight in model.model.layers.parameters()] == resting
        assert weights.nbytes == sum(weight.nbytes for weight in model.model.layers.parameters()) + 32 * 4


def test_what_comes_and_goes_takes_the_room_of_activations() -> None:
    student, teacher = outline(), outline(hidden_size=128)
    settings = estimated()
    least, most = memory(settings, student, []), memory(settings, student, [teacher])
    for comes in (1, least["activations"] + 7):
        parts = memory(settings, student, [teacher], resting=[comes, 1])
        expected = most["teachers"] - comes - 1 + max(0, comes - least["activations"])
        assert parts == most | {"teachers": expected}


def test_without_a_gpu_and_with_every_token_it_is_refused(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no GPU here.*quantise: int8"):
        LocalTeacher(TEACHER, chat, offload=True)
    with pytest.raises(ConfigError, match=r"teacher\.offload: for rollout\.teacher_share"):
        estimated("teacher.offload=true", "rollout.teacher_share=0.1")


@pytest.mark.real("cuda")
@pytest.mark.parametrize("to", [None, "int4"])
def test_an_offloaded_teacher_on_cuda(to: Quantisation | None, chat: Chat, packed: Packed) -> None:
    here, gone = (LocalTeacher(TEACHER, chat, quantise=to, offload=offload) for offload in (False, True))
    for teacher in (here, gone):
        rolled(desk_episodes(2), teacher, chat)
    one, other = (teacher.score(packed, 4096) for teacher in (here, gone))
    torch.testing.assert_close(one.hidden, other.hidden)
    assert {weight.device.type for weight in gone.model.model.layers.parameters()} == {"cpu"}
