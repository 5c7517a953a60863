"""A traveller's timetable: from town to town by trains that leave in the hour of one's arrival or later."""

import random
from typing import Any, ClassVar

import opd_agents as opd
from opd_agents.envs import format_calls
from opd_agents.errors import UserError
from opd_agents.tools import ToolError
from opd_agents.types import Task, ToolCall

TOWNS = ("Aal", "Bern", "Cuxhaven", "Delft", "Essen", "Fulda", "Gent", "Husum")


class Timetable(opd.AgentEnv):
    system_prompt = "Travel to the destination by the trains that leave after you have arrived."
    split_sizes: ClassVar = {"train": 10_000, "validation": 200, "test": 200}
    max_turns = 10
    has_expert = True

    def __init__(self, changes: int = 1) -> None:
        """``changes``: towns between start and destination, up to 5."""
        if not 0 <= changes <= 5:
            raise UserError(f"changes is {changes}, not a number from 0 to 5.")
        super().__init__([self.departures, self.board])
        self.changes = changes

    def begin(self, task: Task) -> str:
        world = random.Random(f"timetable/{self.task_number(task)}")  # the content is the task's alone
        way = world.sample(TOWNS, self.changes + 2)
        trains = [[way[i], way[i + 1], 6 + 2 * i] for i in range(len(way) - 1)]
        trains += [[*world.sample(TOWNS, 2), world.randrange(0, 6)] for _ in range(4)]  # gone already
        self.state = {"at": way[0], "hour": 6, "way": way, "trains": world.sample(trains, len(trains))}
        return f"It is 6. Travel from {way[0]} to {way[-1]}."

    def departures(self) -> list[dict[str, Any]]:
        """The trains from here, with the hour they leave."""
        return [{"to": to, "hour": hour} for at, to, hour in self.state["trains"] if at == self.state["at"]]

    def board(self, to: str, hour: int) -> dict[str, Any]:
        """Take a train from here; the journey takes an hour."""
        if [self.state["at"], to, hour] not in self.state["trains"] or hour < self.state["hour"]:
            raise ToolError("no such train any more")
        self.state |= {"at": to, "hour": hour + 1}
        if to == self.state["way"][-1]:
            self.finish()
        return {"at": to, "hour": hour + 1}

    def success(self) -> bool:
        return bool(self.state["at"] == self.state["way"][-1])

    def expert_action(self) -> str:
        here = self.state["way"].index(self.state["at"])
        arguments = {"to": self.state["way"][here + 1], "hour": 6 + 2 * here}
        return format_calls([ToolCall("board", arguments)])
