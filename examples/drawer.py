"""An environment in one file: look into the drawer, then answer with the number that lies in it.

opd-agents --import examples/drawer.py rollout examples/Drawer-v0 --policy expert --watch
"""

import json
from typing import Any, ClassVar

import opd_agents as opd
from opd_agents.types import Task


class Drawer(opd.AgentEnv):
    system_prompt = "Look into the drawer, then answer with the number in it."
    split_sizes: ClassVar = {"train": 600, "validation": 100, "test": 200}
    max_turns = 4
    has_expert = True

    def __init__(self) -> None:
        super().__init__([self.open_drawer, self.answer])
        self.state: dict[str, Any] = {}

    def begin(self, task: Task) -> str:
        first = {"train": 0, "validation": 600, "test": 700}[task.split]  # no task is in two splits
        number = (first + int(task.id)) * 617 % 900 + 100  # 900 tasks, each of the three-digit numbers once
        self.state = {"number": number, "open": False, "answer": None}
        return "What is in the drawer?"

    def open_drawer(self) -> dict[str, int]:
        """Look into the drawer."""
        self.state["open"] = True
        return {"number": self.state["number"]}

    def answer(self, number: int) -> str:
        """Answer the user."""
        self.state["answer"] = number
        self.finish()
        return "Thank you."

    def success(self) -> bool:
        return bool(self.state["answer"] == self.state["number"])

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state

    def expert_action(self) -> str:
        if not self.state["open"]:
            return json.dumps({"name": "open_drawer", "arguments": {}})
        return json.dumps({"name": "answer", "arguments": {"number": self.state["number"]}})


opd.register("examples/Drawer-v0", "drawer:Drawer")
