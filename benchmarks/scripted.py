"""A queue of orders that can be worked off by TRL's trainers and by this project with the same tokens.

The student is an ordinary Llama whose weights are set so that every sampled token is certain: it always calls
the one tool, in an action of fixed length. Episodes therefore have a known number of turns, and two trainers
that sample from it must produce the same ids.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
from collections.abc import Sequence
from statistics import median_low
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from opd_agents import envs
from opd_agents.chat import build_word_tokenizer
from opd_agents.episode import Episode, Limits
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.models import build_model
from opd_agents.rollout import rollout
from opd_agents.tools import Tool
from opd_agents.types import Task, ToolSpec

SYSTEM = "You work at the order desk."
# No two tokens of an action are equal, so that each can have one certain successor.
ACTION = '<tool_call>\n{"name": "next_order", "arguments": {"note": "acegikmoqsu"}}\n</tool_call>'
START, END = "<|im_start|>assistant\n", "<|im_end|>"
CERTAINTY = 10.0  # the logit of the successor is this times the norm of a hidden state


class Texts:
    """What the queue says, taken from OrderDesk's expert episodes, and a tokenizer with Qwen2.5's template.

    All prompts have one length in tokens, and all observations: the number of turns alone decides how many
    tokens there are.
    """

    def __init__(self, filler: int = 0) -> None:
        """``filler`` further entries make the vocabulary larger; no text has them."""
        desk = episodes("opd_agents/OrderDesk-v0", 64, level="hard")
        expert = rollout(desk, ExpertPolicy(), make=envs.make, chat=None, limits=Limits(), temperature=1.0)
        prompts = [t.messages[-1].content for t in expert]
        observations = [turn.observation for t in expert for turn in t.turns[:-1]]
        action = ACTION.replace("acegikmoqsu", "1")  # a note that is spelt, and no word of the vocabulary
        actions = [
            f"{SYSTEM} {TrlQueue.next_order.__doc__}",
            action,
            *(t.action for e in expert for t in e.turns),
        ]
        self.tokenizer = build_word_tokenizer([*prompts, *observations, *actions])
        templates = importlib.resources.files("trl") / "chat_templates"
        self.tokenizer.chat_template = (templates / "qwen2_5.jinja").read_text(encoding="utf-8")
        self.tokenizer.add_tokens([f"<filler {i}>" for i in range(filler)])
        self.prompts, self.observations = self._of_one_length(prompts), self._of_one_length(observations)

    def _of_one_length(self, texts: Sequence[str]) -> list[str]:
        typical = median_low(lengths := [len(self.tokenizer.encode(text)) for text in texts])
        return [text for text, length in zip(texts, lengths, strict=True) if length == typical]

    def prompt(self, task: int) -> str:
        return self.prompts[task % len(self.prompts)]

    def observation(self, task: int, turn: int) -> str:
        return self.observations[(7 * task + turn) % len(self.observations)]


@functools.cache
def recited(filler: int = 0) -> Texts:
    """The same texts for all environments of a process."""
    return Texts(filler)


class TrlQueue:
    """The queue for TRL's ``environment_factory``: its public methods are the tools."""

    def __init__(self, texts: Texts) -> None:
        self._texts, self._task, self._turn = texts, 0, 0

    def reset(self, task: int, **row: Any) -> None:
        self._task, self._turn = task, 0

    def next_order(self, note: str):  # type: ignore[no-untyped-def]  # TRL would write its type into the prompt
        """Read the next order of the queue.

        Args:
            note: What to remember of this one.
        """
        self._turn += 1
        return self._texts.observation(self._task, self._turn - 1)

    def get_reward(self) -> float:
        return 0.0


class Queue(envs.AgentEnv):
    """The same as an environment of this project; it ends after ``turns`` actions."""

    fork_mode: ClassVar = "none"
    system_prompt = SYSTEM

    def __init__(self, texts: Texts, turns: int) -> None:
        schema = get_json_schema(TrlQueue(texts).next_order)["function"]
        spec = ToolSpec(schema["name"], schema["description"], schema["parameters"])
        super().__init__([Tool(spec, self._next_order)])
        self.texts, self.split_sizes, self.max_turns = texts, {"train": 1_000_000}, turns

    def begin(self, task: Task) -> str:
        return self.texts.prompt(int(task.id))

    def _next_order(self, note: str) -> str:
        return self.texts.observation(int(self.task.id), self.turn)

    def success(self) -> bool:
        return False

    def digest_text(self) -> str:
        return str(self.turn)


def rows(texts: Texts, n: int) -> list[dict[str, Any]]:
    """Tasks 0 to n-1 as rows of a dataset for TRL."""
    system = {"role": "system", "content": SYSTEM}
    return [{"task": i, "prompt": [system, {"role": "user", "content": texts.prompt(i)}]} for i in range(n)]


def scripted_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A Llama of any shape that writes ACTION and ends its turn, with certainty at temperature 1."""
    model = build_model("llama", fields | {"tie_word_embeddings": False}, tokenizer, seed)
    script = tokenizer.encode(f"{START}{ACTION}{END}", add_special_tokens=False)
    assert len(set(script)) == len(script), "a token of the action has two successors"
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embed.normal_()
        head.zero_()
        for layer in model.base_model.layers:  # full computation, small effect
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
        for token, successor in itertools.pairwise(script):
            head[successor] = CERTAINTY * embed[token] / embed[token].norm()
    return model


def action_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of an action, its end included."""
    return len(tokenizer.encode(ACTION + END, add_special_tokens=False))


def episodes(env_id: str, n: int, **options: Any) -> list[Episode]:
    tasks = [Task(str(i), "train") for i in range(n)]
    return [Episode(task.id, env_id, i, task, (0, 0, i), options) for i, task in enumerate(tasks)]
