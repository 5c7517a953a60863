"""BFCL v4, single-turn: one request, one answer, which the official checker compares and nobody runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.adapters.bfcl_data import chosen, divided, rows
from opd_agents.envs.adapters.bfcl_verdict import judge, offered, solution
from opd_agents.envs.base import AgentEnv
from opd_agents.tools import ToolError
from opd_agents.types import Task, ToolCall, ToolSpec

CATEGORIES = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple"),
    *("irrelevance", "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
    *("live_irrelevance", "live_relevance"),
)


class BfclSingle(AgentEnv):
    """One request and the functions on offer: call what it asks for, in one action; where no function fits
    (``irrelevance``), answer with a text. The calls are judged, not run."""

    has_expert: ClassVar[bool] = True
    extra: ClassVar[str | None] = "bfcl"
    max_turns = 1

    def __init__(self, categories: Sequence[str] = (), divide: bool = False) -> None:
        """``categories``: of CATEGORIES, none for all. The benchmark is all "test"; ``divide`` makes splits
        of it for training, tasks with one wording together. Raises MissingPart."""
        super().__init__([])
        self._splits = _splits(chosen(categories, CATEGORIES, "BfclSingle"), divide)
        self.split_sizes = {split: len(found) for split, found in self._splits.items()}
        self._entry: dict[str, Any] = {}
        self._calls: list[ToolCall] = []

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """Those of the task; none before the first reset."""
        return offered(self._entry) if self._entry else ()

    def begin(self, task: Task) -> str:
        self._entry = self._splits[task.split][int(task.id)]
        self._calls = []
        said = self._entry["question"][0]
        self.system_prompt = "\n".join(m["content"] for m in said if m["role"] == "system")
        others = [m for m in said if m["role"] != "system"]
        if len(others) == 1:
            return str(others[0]["content"])
        return "\n".join(f"{m['role']}: {m['content']}" for m in others)  # a conversation that went before

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """The one action is the answer: calls, which may be several, or a text; a bad one is the end too, as
        a turn limit is."""
        observation, reward, terminated, truncated, info = super().step(action)
        answered = not (info["parse_error"] or info["tool_error"])
        return observation, reward, terminated or answered, truncated and not answered, info

    def call(self, call: ToolCall) -> str:
        self._calls.append(call)
        spec = {tool.name: tool for tool in self.tools}.get(call.name)
        if spec is None:
            raise ToolError(f"unknown tool {call.name!r}")
        known, needed = spec.parameters["properties"], spec.parameters.get("required", ())
        if wrong := [name for name in call.arguments if name not in known]:
            raise ToolError(f"{call.name} takes no argument {wrong[0]!r}")
        if missing := [name for name in needed if name not in call.arguments]:
            raise ToolError(f"{call.name} needs the argument {missing[0]!r}")
        return "noted"

    def success(self) -> bool:
        return judge(self._entry, self._calls)

    def expert_action(self) -> str:
        """The first of the official answers."""
        calls = solution(self._entry)
        return format_calls(calls) if calls else "None of the functions can do that."

    def get_state(self) -> Any:
        return self._calls

    def set_state(self, state: Any) -> None:
        self._entry = self._splits[self.task.split][int(self.task.id)]
        self._calls = state

    def digest_text(self) -> str:
        return str(self._entry["id"])  # there is no world that a call could change

    def details(self) -> dict[str, Any]:
        return {"entry": self._entry["id"]}


@cache  # thousands of rows, and an environment is made for every episode
def _splits(categories: Sequence[str], divide: bool) -> dict[str, list[dict[str, Any]]]:
    tasks = [task for name in categories for task in rows(name)]
    return divided(((str(task["question"]), task) for task in tasks), divide)
