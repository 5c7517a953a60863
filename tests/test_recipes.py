"""The recipes for Qwen3, as they are but for folders, addresses and sizes: a training step with a tiny model
of that architecture, template and special tokens. Servers are of this process: a model behind vLLM's API that
writes a tool call in Qwen3's syntax, and the scripted expert behind an OpenAI-compatible one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
from api_server import ApiServer, Expert
from served_models import ServedModel

from opd_agents.chat import Chat
from opd_agents.config import load_config
from opd_agents.policies.models import build_model, save_checkpoint
from opd_agents.trainer import train
from opd_agents.types import Actor, SpanKind

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 8200, "tie_word_embeddings": True,
}  # fmt: skip
SIZES = ("trainer.steps=1", "trainer.tensorboard=false", "rollout.episodes_per_step=4", "rollout.max_turns=2")
CALL = '{"name":"list_orders","arguments":{"customer_id":"a"}}'


@pytest.fixture(scope="module")
def chat() -> Chat:
    return families.chat("qwen3", kwargs={"enable_thinking": False})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, chat: Chat) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("qwen3")
    for seed, name in enumerate(("student", "teacher")):
        model = build_model("qwen3", SMALL, chat.tokenizer, seed)
        save_checkpoint(folder / name, model, chat.tokenizer, {})
    return {name: str(folder / name) for name in ("student", "teacher")}


def turns_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "trajectories" / "step-000001.jsonl").read_text().splitlines()
    return [turn for line in lines for turn in json.loads(line)["trajectory"]["turns"]]


@pytest.mark.parametrize("name", ["qwen3_1gpu", "qwen3_8gpu"])
def test_a_step_of_a_recipe_with_student_and_teacher_on_servers(
    name: str, models: dict[str, str], chat: Chat, tmp_path: Path
) -> None:
    call = list(chat.encode_action(CALL))

    def writes(prompt: Sequence[int]) -> list[int]:
        return call

    with (
        ServedModel(models["student"], "bfloat16", writes) as student,
        ServedModel(models["teacher"], "bfloat16") as teacher,
    ):
        config = load_config(
            name, *SIZES, f"output={tmp_path / 'run'}", f"student.model={models['student']}",
            f"teacher.model={models['teacher']}", f"teacher.urls=[{teacher.url}]",
            f"sampler.urls=[{student.url}]", "evaluation=null",
        )  # fmt: skip
        run = train(config)
    (row,) = tiny.metrics(run)
    assert row["grad_norm"] > 0 and row["distill/log_ratio"] != 0 and row["total/teacher_tokens"] > 0
    assert student.reloads == 2  # at the start, and after the update
    turns = turns_of(run)
    assert len(turns) == 8 and all(turn["action"] == CALL and not turn["parse_error"] for turn in turns)
    assert all(chat.tokenizer.decode(turn["action_ids"]).startswith("<tool_call>\n{") for turn in turns)
    assert {span["kind"] for turn in turns for span in turn["spans"]} >= {SpanKind.CALL, SpanKind.SPECIAL}


def test_a_step_of_each_stage_of_the_recipe_with_a_teacher_behind_an_api(
    models: dict[str, str], chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    with ApiServer(Expert("opd_agents/OrderDesk-v0", {}, tasks=20), key="sk-any") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        sized = [f"stages.{stage}.{size}" for stage in ("cold_start", "act") for size in SIZES]
        config = load_config(
            "qwen3_api", *sized, f"output={tmp_path / 'run'}", f"student.model={models['student']}",
            "teacher.model=expert", "rollout.max_tokens_per_turn=8",
            "environments=[{id: opd_agents/OrderDesk-v0, limit: 20}]",
            f"teacher.endpoint.cache={tmp_path / 'answers.sqlite'}", "stages.cold_start.rollout.max_turns=12",
            "stages.cold_start.evaluation=null", "stages.act.evaluation=null",
        )  # fmt: skip
        run = train(config)
    for stage in ("cold_start", "act"):
        (row,) = tiny.metrics(run / stage)
        assert row["grad_norm"] > 0 and row["api/requests"] > 0
        taught = [turn for turn in turns_of(run / stage) if turn["actor"] == Actor.TEACHER]
        assert taught and not any(turn["parse_error"] for turn in taught)
        calls = [turn for turn in taught if turn["action"].startswith("{")]
        assert calls and all("<tool_call>\n{" in chat.tokenizer.decode(turn["action_ids"]) for turn in calls)
    assert {turn["actor"] for turn in turns_of(run / "act")} == {Actor.STUDENT, Actor.TEACHER}
