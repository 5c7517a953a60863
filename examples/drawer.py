"""An environment in one file: a cabinet of coloured drawers, where each note says which one to open next.

opd-agents --import examples/drawer.py rollout examples/Drawer-v0 --policy expert --watch
"""

import itertools
import json
import random
from typing import ClassVar

import opd_agents as opd
from opd_agents.types import Task

COLOURS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
THINGS = ("key", "coin", "ring", "pen", "map", "watch")
CHAINS = list(itertools.product(itertools.permutations(COLOURS, 3), THINGS))  # 2016 tasks, each once
random.Random(0).shuffle(CHAINS)


class Drawer(opd.AgentEnv):
    system_prompt = "Open the drawers one after the other, as the notes in them say, then say what you found."
    split_sizes: ClassVar = {"train": 1500, "validation": 200, "test": 300}
    max_turns = 6
    has_expert = True

    def __init__(self) -> None:
        super().__init__([self.open_drawer, self.answer])

    def begin(self, task: Task) -> str:
        colours, thing = CHAINS[self.task_number(task)]  # no task is in two splits
        self.state = {"colours": list(colours), "thing": thing, "opened": 0, "answer": None}
        return f'Begin with "{colours[0]}".'

    def open_drawer(self, colour: str) -> dict[str, str]:
        """Open a drawer and read what is in it. A drawer that no note named locks the cabinet."""
        left = self.state["colours"][self.state["opened"] :]
        if colour not in left[:1]:
            self.finish()
            return {"error": "the cabinet is locked"}
        self.state["opened"] += 1
        return {"next": left[1]} if len(left) > 1 else {"thing": self.state["thing"]}

    def answer(self, thing: str) -> str:
        """Say what you found in the last drawer."""
        self.state["answer"] = thing
        self.finish()
        return "Thank you."

    def success(self) -> bool:  # the verifier looks at the final state: a lucky guess is none
        return self.state["opened"] == 3 and bool(self.state["answer"] == self.state["thing"])

    def expert_action(self) -> str:
        opened = self.state["opened"]
        if opened < 3:
            return json.dumps({"name": "open_drawer", "arguments": {"colour": self.state["colours"][opened]}})
        return json.dumps({"name": "answer", "arguments": {"thing": self.state["thing"]}})


opd.register("examples/Drawer-v0", "drawer:Drawer")
