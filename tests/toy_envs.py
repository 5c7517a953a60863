"""Small environments that tests share."""

import json
import os
import sys
import time
from typing import Any, ClassVar

from opd_agents.envs import AgentEnv
from opd_agents.tools import Tool, ToolError
from opd_agents.types import Task


class Counter(AgentEnv):
    """Reach the task's target by adding; ``roll`` adds noise, ``stop`` ends the episode."""

    system_prompt = "Reach the target."
    split_sizes: ClassVar = {"train": 40, "test": 20}
    max_turns = 6

    def __init__(self, offset: int = 3) -> None:
        super().__init__([self.add, self.roll, self.stop])
        self.offset = offset
        self.value = self.target = 0

    def begin(self, task: Task) -> str:
        self.value = 0
        self.target = int(task.id) + self.offset + (1000 if task.split == "test" else 0)
        return f"Reach {self.target}."

    def add(self, number: int) -> dict[str, int]:
        """Add a number to the counter."""
        if number < 0:
            raise ToolError("number must not be negative")
        self.value += number
        return {"value": self.value}

    def roll(self) -> dict[str, int]:
        """Add a random number."""
        return self.add(int(self.np_random.integers(1_000_000)))

    def stop(self) -> str:
        """End the episode."""
        self.finish()
        return "stopped"

    def success(self) -> float | bool:
        return self.value == self.target

    def get_state(self) -> Any:
        return {"value": self.value, "target": self.target}

    def set_state(self, state: Any) -> None:
        self.value, self.target = state["value"], state["target"]


class ReplayedCounter(Counter):
    """The same without copies of its state: forks replay."""

    fork_mode: ClassVar = "replay"

    def get_state(self) -> Any:
        raise AssertionError("a replayed environment's state is never read")

    set_state = get_state

    def digest_text(self) -> str:
        return f"{self.value}/{self.target}"


class ProcessCounter(Counter):
    """The same in a process of its own, which its tools may end or block."""

    runs_in: ClassVar = "process"
    has_expert: ClassVar = True

    def __init__(self, offset: int = 3, slow: float = 0.0) -> None:
        super().__init__(offset)
        self.slow = slow  # seconds that the expert thinks in its second turn
        self._tools |= {tool.spec.name: tool for tool in map(Tool.from_function, [self.die, self.hang])}

    def die(self) -> str:
        """End the process, as a fault of a library in C does."""
        os._exit(9)

    def hang(self) -> str:
        """Never answer."""
        time.sleep(3600)
        return ""

    def step(self, action: str) -> Any:
        if action == "raise":
            raise Unpicklable(lambda: None)
        if action == "leave a child":
            if os.fork():
                os._exit(9)
            time.sleep(60)
        if action == "exit":
            sys.exit(3)
        return super().step(action)

    def success(self) -> float | bool:
        return self.value == self.target

    def expert_action(self) -> str:
        if self.turn == 1:
            time.sleep(self.slow)
        if self.value == self.target:
            return '{"name":"stop","arguments":{}}'
        return json.dumps({"name": "add", "arguments": {"number": self.target - self.value}})


class Unpicklable(Exception):
    pass
