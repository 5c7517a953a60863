"""Run by the interpreter that has vLLM: its engine in this process as the teacher, beside transformers.

The arguments are a checkpoint, a folder for runs, and where packages are that vLLM's environment lacks.
"""

import sys
from typing import Any

sys.path.append(sys.argv[3])

import tiny
import torch
from rolling import desk_episodes, rolled
from vllm_servers import TOKENS

from opd_agents.batch import pack
from opd_agents.config import Vllm, load_config
from opd_agents.episode import Limits
from opd_agents.policies.models import load_chat, load_tokenizer
from opd_agents.teachers import SampledLogprobs, TeacherTopK
from opd_agents.teachers.local import LocalTeacher
from opd_agents.teachers.vllm import VllmTeacher
from opd_agents.trainer import train

MODEL, RUNS = sys.argv[1:3]
ENGINE = {"kind": "vllm", "model": MODEL, "engine": {"memory": 0.05}}
LIMITS = Limits(max_tokens_per_turn=8, max_context_tokens=TOKENS, max_turns=4)
chat = load_chat(MODEL, load_tokenizer(MODEL))


def teacher(k: int = 0) -> VllmTeacher:
    settings = Vllm.model_validate(ENGINE)
    return VllmTeacher(settings, "teacher", MODEL, chat, temperature=1.0, scores=True, k=k, max_tokens=TOKENS)


def it_says_what_transformers_says() -> None:
    local, engine, top = LocalTeacher(MODEL, chat), teacher(), teacher(k=6)
    packed = pack(rolled(desk_episodes(8), local, chat, limits=LIMITS))
    hidden = local.score(packed, 4096)
    with torch.no_grad():
        expected = hidden.head(hidden.hidden).log_softmax(-1)
    own = expected.gather(1, packed.target[:, None]).squeeze(1)
    sampled, ranked = engine.score(packed, 4096), top.score(packed, 4096)
    assert isinstance(sampled, SampledLogprobs) and isinstance(ranked, TeacherTopK)
    best, ids = expected.topk(6)
    torch.testing.assert_close(sampled.logprobs, own, atol=1e-3, rtol=0)
    torch.testing.assert_close(ranked.logprobs, best, atol=1e-3, rtol=0)
    assert torch.equal(ranked.ids, ids) and engine.tokens == local.scored_tokens == packed.n_tokens
    print("largest gap", float((sampled.logprobs - own).abs().max()))


def it_acts_as_transformers_does() -> None:
    local, engine = LocalTeacher(MODEL, chat), teacher()
    played = [rolled(desk_episodes(4), one.greedy, chat, limits=LIMITS) for one in (local, engine)]
    first, second = ([turn.action_ids for one in all_ for turn in one.turns] for all_ in played)
    assert first == second
    sampled = pack(rolled(desk_episodes(4), engine, chat, limits=LIMITS))
    own = local.score(sampled, 4096)
    with torch.no_grad():
        expected = own.head(own.hidden).log_softmax(-1).gather(1, sampled.target[:, None]).squeeze(1)
    torch.testing.assert_close(sampled.behaviour, expected, atol=1e-3, rtol=0)


def a_run_learns_the_same_from_both() -> None:
    def losses(name: str, section: dict[str, Any]) -> list[float]:
        raw = {
            "name": name, "output": f"{RUNS}/{name}", "method": "thinking_machines",
            "student": {"build": tiny.BUILD | {"tokenizer": MODEL}}, "teacher": section,
            "chat": chat.settings, "environments": [tiny.DESK],
            "rollout": {
                "episodes_per_step": 4, "group_size": 2, "max_turns": 2, "max_tokens_per_turn": 8,
                "max_context_tokens": TOKENS,
            },
            "trainer": {"steps": 2, "learning_rate": 0.01, "tensorboard": False},
        }  # fmt: skip
        return [row["loss"] for row in tiny.metrics(train(load_config(raw)))]

    local, engine = losses("local", {"model": MODEL}), losses("engine", ENGINE)
    torch.testing.assert_close(torch.tensor(engine), torch.tensor(local), atol=1e-3, rtol=0)
    assert abs(local[0]) > 0.1


if __name__ == "__main__":
    it_says_what_transformers_says()
    it_acts_as_transformers_does()
    a_run_learns_the_same_from_both()
