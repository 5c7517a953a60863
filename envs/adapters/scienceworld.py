"""ScienceWorld: elementary-school science in a simulated house, 30 tasks in 7,207 variations."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.adapters.scienceworld_java import MAX_LIVE, Simulator, give_back, require, take
from opd_agents.envs.adapters.scienceworld_tasks import SPLITS, VARIATIONS, variations
from opd_agents.envs.base import AgentEnv
from opd_agents.errors import EnvironmentCrashed, UnknownName, UserError
from opd_agents.tools import ToolError, to_json
from opd_agents.types import Task, ToolCall

SIMPLIFICATIONS = (
    "easy",  # all of the others
    *("noElectricalAction", "openContainers", "openDoors", "selfWateringFlowerPots", "teleportAction"),
)
COMMAND = re.compile(r"[ -~]{1,200}")  # printable ASCII
SYSTEM = (
    "You are in a house with a workshop, a foundry, a greenhouse and more, and do a science task. Act with "
    "do(command). Commands, OBJ being a thing that you see: look around, inventory, task, look at OBJ, look "
    "in OBJ, open OBJ, close OBJ, go OBJ, pick up OBJ, put down OBJ, move OBJ to OBJ, pour OBJ in OBJ, dunk "
    "OBJ in OBJ, mix OBJ, use OBJ on OBJ, activate OBJ, deactivate OBJ, connect OBJ to OBJ, disconnect OBJ, "
    "read OBJ, eat OBJ, flush OBJ, focus on OBJ, wait (10 moments), wait1 (one)."
)
_gold: dict[tuple[str, int, str], list[str]] = {}  # the simulator's solutions, found once: it takes seconds


class ScienceWorld(AgentEnv):
    """ScienceWorld by its text commands; the reward is its score, 0 to 100, as 0 to 1. A wrong ``focus on``
    may end the episode. The expert plays the simulator's gold path, from as far as it was followed."""

    fork_mode: ClassVar[Any] = "replay"
    has_expert: ClassVar[bool] = True
    family: ClassVar[str] = "worlds"
    extra: ClassVar[str | None] = "scienceworld"
    licence: ClassVar[str] = "Apache-2.0 (scienceworld)"
    runs_in: ClassVar[Any] = "thread"  # the simulator is a process of its own
    max_live: ClassVar[int | None] = MAX_LIVE
    system_prompt = SYSTEM

    def __init__(self, task: str | None = None, simplifications: str = "", max_turns: int = 100) -> None:
        """``task``: one of the 30, None: all in turn. ``simplifications``: ScienceWorld's own, as ``easy`` or
        ``teleportAction,openDoors``. Raises UnknownName, and MissingPart without scienceworld or Java."""
        command = "opd-agents envs opd_agents/ScienceWorld-v0"
        if task is not None and task not in VARIATIONS:
            raise UnknownName("ScienceWorld task", task, VARIATIONS, command)
        for name in filter(None, simplifications.split(",")):
            if name not in SIMPLIFICATIONS:
                raise UnknownName("simplification of ScienceWorld", name, SIMPLIFICATIONS, command)
        if max_turns < 1:
            raise UserError(f"ScienceWorld: max_turns must be at least 1, got {max_turns}.")
        require()
        self._tasks = (task,) if task else tuple(VARIATIONS)
        self.simplifications, self.max_turns = simplifications, max_turns
        self.split_sizes = {split: len(variations(self._tasks, split)) for split in SPLITS}
        self._simulator: Simulator | None = None
        self._commands: list[str] = []
        self._score = 0.0
        self._state: list[Any] = []
        super().__init__([self.do])

    def begin(self, task: Task) -> str:
        if self._simulator is None or not self._simulator.alive:
            self._simulator = take()
        self._commands = []
        try:
            self._load()
            self._observe()
            return f"{self._ask('getTaskDescription')}\n{self._state[1]}"
        except ToolError as error:
            raise EnvironmentCrashed(f"ScienceWorld: {error}.") from error

    def do(self, command: str) -> str:
        """Do one thing in the world."""
        if not COMMAND.fullmatch(command):
            raise ToolError("a command is one line of at most 200 plain characters")
        if command.strip().lower().startswith("reset"):
            raise ToolError("the task cannot be reset")
        self._commands.append(command)
        text = str(self._ask("step", command))
        self._observe()
        if text.startswith("No known action"):
            raise ToolError(text)
        return text

    def on_text(self, text: str) -> str:
        return "Act with do(command)."

    def success(self) -> float:
        return max(self._score, 0.0)

    def digest_text(self) -> str:
        return to_json(self._state)

    def expert_action(self) -> str:
        path = self._gold_path()
        place = 0
        for command in self._commands:
            place += path[place : place + 1] == [command]
        return format_calls([ToolCall("do", {"command": path[place] if place < len(path) else "wait1"})])

    def close(self) -> None:
        if self._simulator is not None:
            give_back(self._simulator)
            self._simulator = None

    @property
    def _variation(self) -> tuple[str, int]:
        return variations(self._tasks, self.task.split)[int(self.task.id)]

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._simulator is None:
            raise ToolError("the environment is closed")
        return self._simulator.ask(method, *arguments)

    def _load(self) -> None:
        self._ask("load", *self._variation, self.simplifications, False)
        self._ask("reset")
        self._ask("step", "look around")  # before it, score and goals are the last episode's

    def _observe(self) -> None:
        looks = [str(self._ask(f"freeAction{sense}")).strip() for sense in ("Look", "Inventory")]
        self._score = round(float(self._ask("getScore")), 2)
        self._state = [self._variation, *looks, str(self._ask("getGoalProgressStr")), self._score]
        if self._ask("getCompleted") or self._score < 0:
            self.finish()

    def _gold_path(self) -> list[str]:
        key = (*self._variation, self.simplifications)
        if key not in _gold and self._simulator is not None:
            path = self._simulator.gold_path(*key)
            self._load()
            for command in self._commands:  # back to where the episode is
                self._ask("step", command)
            _gold[key] = path
        return _gold.get(key, [])
