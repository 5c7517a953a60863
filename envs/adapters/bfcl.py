"""BFCL v4, multi-turn: the benchmark's simulators behind our contract, scored as its own checker scores."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.adapters.bfcl_data import bfcl, chosen, divided, rows, simulator_tools
from opd_agents.envs.adapters.bfcl_world import (
    World,
    execute,
    gold_calls,
    gold_outcome,
    opening,
    plain,
    too_large,
)
from opd_agents.envs.base import AgentEnv
from opd_agents.errors import UserError
from opd_agents.tools import ToolError
from opd_agents.types import Task, ToolCall, ToolSpec

CATEGORIES = ("base", "long_context", "miss_func", "miss_param")
STEPS = 20  # calling steps on one request; one more fails the task, as in the official run
NEW_TOOLS = "I have updated some more functions you can choose from. What about now?"  # the official words


class BfclMultiTurn(AgentEnv):
    """Requests of one user, in turn, over the simulated file system, car, broker, travel agency, ...

    A text ends the work on a request and brings the next one. The task succeeds if after every request the
    simulators are as the official calls leave them, and the results of those calls have been seen; a request
    that nothing can be done about (a function or a fact is missing) is passed over by a text.
    """

    has_expert: ClassVar[bool] = True
    extra: ClassVar[str | None] = "bfcl"

    def __init__(self, categories: Sequence[str] = (), divide: bool = False, max_turns: int = 176) -> None:
        """``categories``: of CATEGORIES, none for all. The benchmark is all "test"; ``divide`` makes splits
        of it for training, the four variants of one scenario together. Raises MissingPart."""
        super().__init__([])
        if max_turns < 1:
            raise UserError(f"BfclMultiTurn: max_turns must be at least 1, got {max_turns}.")
        self.max_turns = max_turns
        names = [f"multi_turn_{name}" for name in chosen(categories, CATEGORIES, "BfclMultiTurn")]
        tasks = [task for name in names for task in rows(name)]
        self._splits = divided(((task["id"].rpartition("_")[2], task) for task in tasks), divide)
        self.split_sizes = {split: len(found) for split, found in self._splits.items()}
        self._entry: dict[str, Any] = {}

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """Those of the task, as far as the user has given them; none before the first reset."""
        if not self._entry:
            return ()
        later = self._entry.get("missed_function", {})
        hidden = {name for turn, names in later.items() if int(turn) > self._request for name in names}
        simulators = self._entry["involved_classes"]
        return tuple(t for name in simulators for t in simulator_tools(name) if t.name not in hidden)

    def begin(self, task: Task) -> str:
        self._entry = self._splits[task.split][int(task.id)]
        self._world: World = opening(self._entry)
        self._results: list[str] = []
        self._request, self._since, self._acted, self._failed = 0, 0, False, False
        return self._said()

    def call(self, call: ToolCall) -> str:
        self._acted = True
        if self.turn - self._since >= STEPS:
            self._failed = True
            self.finish()
        before = pickle.dumps(self._world)
        result = execute(self._world, call)
        if too_large(self._world):
            self._world = pickle.loads(before)
            raise ToolError("refused: too many files, or folders too deep")
        self._results.append(result)
        return result

    def on_text(self, text: str) -> str:
        self._failed |= not self._handled()
        self._request += 1
        self._since, self._acted = self.turn + 1, False
        if self._request == len(self._entry["question"]):
            self.finish()
            return ""
        return self._said()

    def success(self) -> bool:
        return self._request == len(self._entry["question"]) and not self._failed

    def expert_action(self) -> str:
        """The official calls, all at once, from the state for which they are meant; else a text."""
        before, _ = gold_outcome(self._entry, self._request - 1)
        if self._handled() or plain(self._world) != plain(before):
            return "Done."
        return format_calls(gold_calls(self._entry, self._request))

    def get_state(self) -> Any:
        return self._world, self._results, self._request, self._since, self._acted, self._failed

    def set_state(self, state: Any) -> None:
        self._entry = self._splits[self.task.split][int(self.task.id)]
        self._world, self._results, self._request, self._since, self._acted, self._failed = state

    def digest_text(self) -> str:
        return json.dumps([plain(self._world), self._results, self._request, self._failed])

    def details(self) -> dict[str, Any]:
        return {"entry": self._entry["id"]}

    def _said(self) -> str:
        """The user's present request, with the descriptions of functions that were missing so far."""
        said = "\n".join(message["content"] for message in self._entry["question"][self._request])
        new = self._entry.get("missed_function", {}).get(str(self._request), [])
        docs = [tool for tool in self.tools if tool.name in new]
        shown = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in docs]
        return "\n".join(filter(None, [said, json.dumps(shown) + "\n" + NEW_TOOLS if new else ""]))

    def _handled(self) -> bool:
        """What the official checker says of one request."""
        if not self._entry["gold"][self._request]:
            return True
        checker = bfcl("eval_checker.multi_turn_eval.multi_turn_checker")
        world, results = gold_outcome(self._entry, self._request)
        state = checker.state_checker(self._world, world)
        return self._acted and state["valid"] and checker.response_checker(self._results, results, 0)["valid"]
