"""An environment for ``test_distributed``: tokens and log-probs part on one rank."""

import os
from typing import ClassVar

from tiny import Parity

import opd_agents as opd
from opd_agents.errors import AlignmentError
from opd_agents.types import Task


class OnOneRank(Parity):
    has_expert: ClassVar = True

    def begin(self, task: Task) -> str:
        if os.environ.get("RANK") == "1":
            raise AlignmentError("only rank 1 sees this")
        return super().begin(task)


opd.register("failing/OnOneRank-v0", "failing:OnOneRank")
