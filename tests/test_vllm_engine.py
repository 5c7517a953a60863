"""A teacher in vLLM's engine within the training process."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from rolling import desk_episodes, rolled
from vllm_servers import HEAD, SETTINGS, TOKENS, vllm_python

from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.checking import check
from opd_agents.config import Vllm
from opd_agents.episode import Limits
from opd_agents.errors import ConfigError, MissingPart
from opd_agents.policies.models import build_model, load_model, save_checkpoint
from opd_agents.policies.vllm_engine import VllmEngine
from opd_agents.teachers import SampledLogprobs, TeacherTopK
from opd_agents.teachers.local import LocalTeacher
from opd_agents.teachers.vllm import VllmTeacher

HERE = Path(__file__).parent
TEACHER = {
    "num_hidden_layers": 2, "initializer_range": 0.3, "max_position_embeddings": 512, "hidden_size": 48,
    "intermediate_size": 64, "tie_word_embeddings": False,
}  # fmt: skip


LIMITS = Limits(max_tokens_per_turn=6, max_context_tokens=TOKENS, max_turns=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, desk_chat: Chat) -> Path:
    path = tmp_path_factory.mktemp("engine") / "teacher"
    model = build_model("llama", TEACHER | HEAD, desk_chat.tokenizer, 1)
    save_checkpoint(path, model, desk_chat.tokenizer, desk_chat.settings)
    return path


@pytest.mark.real("vllm")
@pytest.mark.timeout(240)
def test_an_engine_in_the_training_process_teaches(tmp_path: Path, folder: Path) -> None:
    """Scores, acts and trains, in an interpreter that has vLLM; see engine_teacher.py."""
    command = [str(vllm_python()), str(HERE / "engine_teacher.py"), str(folder), str(tmp_path)]
    environment = os.environ | SETTINGS | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run(
        [*command, sysconfig.get_paths()["purelib"]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- beside vLLM's interface alone ----


@dataclass
class SamplingParams:
    """The parameters that requests have, all of vLLM's names; there are no others."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    ignore_eos: bool
    skip_special_tokens: bool
    detokenize: bool
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class LLM:
    """Greedy on a model of transformers; its outputs have vLLM's form."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.model, self.settings = load_model(model, settings["dtype"]), settings

    def generate(
        self, prompts: Sequence[dict[str, Any]], parameters: Sequence[SamplingParams], *, use_tqdm: bool
    ) -> list[Any]:
        pairs = zip(prompts, parameters, strict=True)
        return [self.answer(prompt["prompt_token_ids"], asked) for prompt, asked in pairs]

    @torch.no_grad()
    def answer(self, ids: list[int], asked: SamplingParams) -> Any:
        assert len(ids) + asked.max_tokens <= self.settings["max_model_len"]
        read = None
        if (k := asked.prompt_logprobs) is not None:
            assert k <= self.settings["max_logprobs"]
            rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            read = [None, *(told(row, token, k) for row, token in zip(rows, ids[1:], strict=False))]
        written, given = list[int](), list[Any]()
        while len(written) < asked.max_tokens and not set(written[-1:]) & set(asked.stop_token_ids):
            row = self.model(torch.tensor([ids + written])).logits[0, -1].log_softmax(-1)
            written.append(int(row.argmax()))
            given.append(told(row, written[-1], 0))
        answer = SimpleNamespace(
            token_ids=written, logprobs=None if asked.logprobs is None else given, finish_reason="length"
        )
        return SimpleNamespace(outputs=[answer], prompt_logprobs=read)


def told(row: torch.Tensor, token: int, k: int) -> dict[int, Any]:
    """The token's log-prob and those of the top k, with their ranks."""
    ranks = row.argsort(descending=True).argsort() + 1
    ids = {token, *row.topk(k).indices.tolist()}
    return {i: SimpleNamespace(logprob=float(row[i]), rank=int(ranks[i])) for i in ids}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is as before when this is over


@pytest.mark.usefixtures("vllm")
def test_an_engine_is_asked_as_a_server_is(folder: Path, desk_chat: Chat) -> None:
    settings = Vllm.model_validate({"kind": "vllm", "model": str(folder), "engine": {}})
    local = LocalTeacher(str(folder), desk_chat)
    packed = pack(rolled(desk_episodes(3), local, desk_chat, limits=LIMITS))
    hidden = local.score(packed, 4096)
    with torch.no_grad():
        best, ids = hidden.head(hidden.hidden).log_softmax(-1).topk(5)
    for k, kind in ((0, SampledLogprobs), (5, TeacherTopK)):
        one = VllmTeacher(
            settings, "teacher", str(folder), desk_chat, temperature=1.0, scores=True, k=k, max_tokens=TOKENS
        )
        signal = one.score(packed, 4096)
        assert isinstance(signal, kind) and one.tokens == packed.n_tokens
        if isinstance(signal, TeacherTopK):
            assert torch.equal(signal.ids, ids)
            torch.testing.assert_close(signal.logprobs, best, atol=1e-4, rtol=0)
        acted = [rolled(desk_episodes(3), each.greedy, desk_chat, limits=LIMITS) for each in (local, one)]
        first, second = ([turn.action_ids for t in played for turn in t.turns] for played in acted)
        assert first == second
    with pytest.raises(ConfigError, match=r"teacher: vLLM gives .* at temperature 1 alone.*kind local"):
        VllmTeacher(
            settings, "teacher", str(folder), desk_chat, temperature=0.5, scores=True, max_tokens=TOKENS
        )
    with pytest.raises(ConfigError, match=r"teacher\.engine: vLLM cannot load .*nothing"):
        engine(path="nothing")


@pytest.mark.usefixtures("vllm")
def test_what_an_engine_may_fill_is_counted(tmp_path: Path, folder: Path) -> None:
    loss = {"components": {"distill": {"kind": "distill", "divergence": "reverse_kl", "signal": "sampled"}}}
    teacher = {"kind": "vllm", "model": str(folder), "engine": {"memory": 0.25}}
    config = tiny.mix(tmp_path / "run", folder, teacher=teacher, loss=loss, correction=None)
    (stage,) = check(config, episodes=4)
    assert stage.passed, stage.findings
    assert stage.memory["engines"] > 100 * stage.memory["student"]


def engine(**changes: Any) -> VllmEngine:
    settings = Vllm(kind="vllm", model="m", engine={}).engine
    given = {"path": "m", "dtype": "float32", "max_tokens": 9, "k": 2, "ranks": 1} | changes
    return VllmEngine(settings, "teacher", **given)


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingPart, match=r"teacher\.engine needs the package vllm.*opd-agents\[vllm\]"):
        engine()


def test_several_ranks_need_a_server() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.engine: vLLM in each of 2 processes.*`urls`"):
        engine(ranks=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"either `urls`, of servers, or `engine: \{\}`"),
        ({"urls": ["http://a"], "engine": {}}, r"either `urls`"),
        ({"engine": {}, "concurrency": 3}, r"`concurrency` is of servers"),
        ({"engine": {"memory": 1.5}}, r"teacher\.engine\.memory"),
    ],
)
def test_sections_that_cannot_work_are_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny.mix(tmp_path, tmp_path, teacher={"kind": "vllm", "model": "m"} | given)


def test_a_section_can_be_read_back() -> None:
    section = Vllm(kind="vllm", model="m", engine={"memory": 0.5})
    assert Vllm.model_validate(section.model_dump(mode="json")) == section
