"""Whose thought stands before a corrected action, in the chat of a model that thinks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from rolling import desk_episodes, rolled
from thinking import chat_of

from opd_agents import envs
from opd_agents.correction.states import Acted, act_at
from opd_agents.correction.thought import with_reasoning
from opd_agents.episode import Limits
from opd_agents.policies import Action, History
from opd_agents.types import Actor, SpanKind, StopReason

LIMIT = Limits(max_tokens_per_turn=400, max_context_tokens=20_000, max_turns=2)
CLOSE, LOOK_UP = (
    {"name": "close_ticket", "arguments": {}},
    {"name": "get_policy", "arguments": {"topic": "orders"}},
)


class Thinks:
    """Says a call after a thought."""

    def __init__(self, chat: Any, thought: str, call: dict[str, Any], actor: Actor = Actor.STUDENT) -> None:
        think = f"<think>\n{thought}\n</think>\n\n" if thought else ""
        text = f"{think}<tool_call>\n{json.dumps(call)}\n</tool_call>"
        self.ids = (*chat.tokenizer(text, add_special_tokens=False)["input_ids"], *sorted(chat.end_ids)[:1])
        self.actor = actor

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [Action(self.actor, StopReason.END, self.ids, (0.0,) * len(self.ids)) for _ in histories]


@pytest.mark.parametrize("thought", ["the teacher's", ""])
@pytest.mark.parametrize(("reasoning", "kept"), [("replace", None), ("keep", "the student's"), ("drop", "")])
def test_the_thought_is_the_students_the_proposers_or_none(thought: str, reasoning: Any, kept: str) -> None:
    chat = chat_of("qwen3")
    student = Thinks(chat, "the student's", CLOSE)
    (failed,) = rolled(desk_episodes(1, timeout_rate=0.0), student, chat, limits=LIMIT)
    teacher = Thinks(chat, thought, LOOK_UP, Actor.TEACHER)

    def rewritten(acted: Acted) -> tuple[Action | None, str]:
        return with_reasoning(acted, chat, reasoning), acted.said.to_env

    at = [(failed, 0)]
    (found,) = act_at(at, teacher, rewritten, make=envs.make, chat=chat, limits=LIMIT, streams=[(1, 2, 3)])
    assert found is not None and found[0] is not None
    action, to_env = found
    read = chat.parse(action.ids, ended=True, context_ids=failed.turns[0].context_ids)
    assert read.action == to_env and action.actor is Actor.TEACHER
    expected = thought if kept is None else kept
    assert (read.reasoning or "").strip() == expected
    assert any(span.kind is SpanKind.THINK for span in read.spans) >= bool(expected)
    assert (action.logprobs is None) is (reasoning != "replace")  # nobody sampled it so
