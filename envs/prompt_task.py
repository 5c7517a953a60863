"""One prompt, one answer, one verdict: tasks of the user's with a verifier of the user's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from opd_agents.envs.base import AgentEnv
from opd_agents.envs.tasks import TaskRow
from opd_agents.errors import DataError, EnvironmentContractError
from opd_agents.plugins import load_object
from opd_agents.types import Task

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(answer: str, row: TaskRow) -> bool:
    """Whether the answer is the row's, space around it aside."""
    return answer.strip() == str(row.answer).strip()


def number(answer: str, row: TaskRow) -> bool:
    """Whether the last number of the answer, of its last ``\\boxed{}`` if it has one, is the row's last."""
    found, wanted = _last_number(answer), _last_number(str(row.answer))
    return found is not None and found == wanted


def _last_number(text: str) -> float | None:
    boxed = BOXED.findall(text)
    numbers = NUMBER.findall(boxed[-1] if boxed else text)
    return float(numbers[-1].replace(",", "")) if numbers else None


VERIFIERS: dict[str, Callable[[str, TaskRow], Any]] = {"exact": exact, "number": number}


def load_verifier(verifier: str, owner: str) -> Callable[[str, TaskRow], float]:
    """``exact``, ``number``, or the user's ``module:name``, a function (answer text, TaskRow) -> bool or
    number in [0, 1]. Raises UserError; what it returns raises EnvironmentContractError for another value."""
    what = f"{owner}: verifier (or one of {', '.join(VERIFIERS)})"
    verify = VERIFIERS.get(verifier) or load_object(verifier, what)

    def verified(answer: str, row: TaskRow) -> float:
        verdict = verify(answer, row)
        try:
            value = float(verdict)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise EnvironmentContractError(
                f"The verifier {verifier} gave {verdict!r:.60} for row {row.id!r}: it must give a "
                "bool or a number in [0, 1]."
            )
        return value

    return verified


def check_answer(verifier: str, row: TaskRow) -> None:
    """Raises DataError if ``row`` lacks the answer that ``exact`` and ``number`` compare with."""
    if verifier not in VERIFIERS:
        return
    if not isinstance(row.answer, str | int | float) or str(row.answer).strip() == "":
        raise DataError(f"the field `answer` must be a text or a number for verifier {verifier!r}.")
    if verifier == "number" and _last_number(str(row.answer)) is None:
        raise DataError(f"there is no number in the field `answer`, {row.answer!r:.60}.")


class AnswerEnv(AgentEnv):
    """Tasks of a file of the user's, each ended by a text: the answer, which a verifier judges by the row."""

    row_fields: ClassVar[tuple[str, ...]] = ("prompt",)
    split_sizes: Mapping[str, int] = {}  # those of the task file

    _answer: str | None = None

    def judge_by(self, verifier: str) -> None:
        """To be called by ``__init__``; ``verifier``: see ``load_verifier``."""
        self.verifier, self._verify = verifier, load_verifier(verifier, type(self).__name__)

    def check_row(self, row: TaskRow) -> None:
        super().check_row(row)
        check_answer(self.verifier, row)

    def question(self) -> str:
        """The row's prompt, not answered yet."""
        self._answer = None
        return str(self.row.prompt)

    def on_text(self, text: str) -> str:
        self._answer = text
        self.finish()
        return ""

    def success(self) -> float:
        return self._verify(self._answer or "", self.row)


class PromptTask(AnswerEnv):
    """One-turn prompts from a task file; the reward is the verifier's word on the text that is answered."""

    family: ClassVar[str] = "prompts"
    text_only: ClassVar[bool] = True
    max_turns = 1

    def __init__(self, verifier: str = "exact", system: str = "") -> None:
        """``verifier``: see ``load_verifier``; the scripted expert gives the row's ``answer``."""
        super().__init__([])
        self.judge_by(verifier)
        self.system_prompt = system
        self.has_expert = verifier in VERIFIERS  # type: ignore[misc]  # a matter of the instance here

    def begin(self, task: Task) -> str:
        return self.question()

    def expert_action(self) -> str:
        if not self.has_expert:
            return super().expert_action()
        return str(self.row.answer)

    def get_state(self) -> Any:
        return self._answer

    def set_state(self, state: Any) -> None:
        self._answer = state
