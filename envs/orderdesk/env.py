"""The environment: noise, verifier and snapshots around the desk."""

from __future__ import annotations

from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.orderdesk.case import Case
from opd_agents.envs.orderdesk.database import Database
from opd_agents.envs.orderdesk.desk import Desk
from opd_agents.envs.orderdesk.expert import call_key, next_call, solution
from opd_agents.envs.orderdesk.levels import LEVELS, draw_case
from opd_agents.envs.splits import SPLIT_SIZES
from opd_agents.errors import UnknownName, UserError
from opd_agents.tools import ToolError
from opd_agents.types import Task, ToolCall

TIMEOUT = "timeout"


class OrderDesk(AgentEnv):
    """A customer-service desk: find what a customer asks about, do what policy says, close the ticket.

    The task fixes the records and the request; the seed decides only which calls time out. An episode
    succeeds if the final database is, table by table, the one that policy leads to: a wrong or superfluous
    change fails it and cannot be undone. A text to the user costs a turn; ``close_ticket`` ends the episode.
    """

    has_expert: ClassVar[bool] = True
    split_sizes = SPLIT_SIZES

    def __init__(
        self, level: str = "easy", timeout_rate: float | None = None, max_turns: int | None = None
    ) -> None:
        """``timeout_rate`` (in [0, 1]) and ``max_turns`` default to the level's."""
        if level not in LEVELS:
            raise UnknownName("OrderDesk level", level, LEVELS, "opd-agents envs opd_agents/OrderDesk-v0")
        self.level = LEVELS[level]
        self.timeout_rate = self.level.timeout_rate if timeout_rate is None else timeout_rate
        if not 0 <= self.timeout_rate <= 1:
            raise UserError(f"OrderDesk: timeout_rate must lie in [0, 1], got {timeout_rate}.")
        self.max_turns = self.level.max_turns if max_turns is None else max_turns
        if self.max_turns < 1:
            raise UserError(f"OrderDesk: max_turns must be at least 1, got {max_turns}.")
        self.system_prompt = self.level.system_prompt
        self.database = Database()
        self.desk = Desk(self.database, self.level.linked)
        self._timeouts_left = 0
        self._answered: set[str] = set()
        super().__init__([getattr(self.desk, name) for name in self.level.tools])

    @property
    def case(self) -> Case:
        """The content of the present task."""
        return draw_case(self.level.name, self.task.split, self.task.id)

    def begin(self, task: Task) -> str:
        self.database.fill(self.case)
        self._timeouts_left = self.level.max_timeouts
        self._answered = set()
        return self.case.prompt

    def call(self, call: ToolCall) -> str:
        if self.np_random.random() < self.timeout_rate and self._timeouts_left:
            self._timeouts_left -= 1
            raise ToolError(TIMEOUT)
        self._answered.add(call_key(call))  # refused calls too: asking again would not help
        result = super().call(call)
        if call.name == "close_ticket":
            self.finish()
        return result

    def on_text(self, text: str) -> str:
        return "Please close the case with close_ticket when it is done."

    def success(self) -> bool:
        """Whether the database is in every row what policy leads to."""
        goal = Database()
        goal.fill(self.case)
        desk = Desk(goal, self.level.linked)
        for call in solution(self.case):
            getattr(desk, call.name)(**call.arguments)
        reached = goal.dump() == self.database.dump()
        goal.close()
        return reached

    def expert_action(self) -> str:
        return format_calls([next_call(self.case, self.database, self._answered)])

    def get_state(self) -> Any:
        return self.database.image(), self._answered, self._timeouts_left

    def set_state(self, state: Any) -> None:
        image, self._answered, self._timeouts_left = state
        self.database.load(image)

    def digest_text(self) -> str:
        return str(self.database.dump())

    def close(self) -> None:
        self.database.close()
