"""The environment: search, open, answer."""

from __future__ import annotations

from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.retrieval.world import (
    MAX_HOPS,
    SPLIT_SIZES,
    Question,
    find_question,
    search_index,
)
from opd_agents.errors import UserError
from opd_agents.tools.search import SearchIndex
from opd_agents.types import Task, ToolCall


class Retrieval(AgentEnv):
    """Multi-hop question answering: the answer is ``hops`` relations away from what the question names, each
    in a document of its own, which has to be found by BM25 search and opened.

    Every split asks about worlds of its own, so that no answer can be known from training. Success is the
    right name, in upper or lower case and with or without a full stop.
    """

    has_expert: ClassVar[bool] = True
    split_sizes = SPLIT_SIZES
    system_prompt = (
        "Answer the question from the documents: search for them, open them, and give the name that is asked "
        "for with the tool answer."
    )

    def __init__(self, hops: int = 2, max_turns: int | None = None) -> None:
        """``hops`` in 1 to 4; ``max_turns`` defaults to twice what a perfect agent needs."""
        if not 1 <= hops <= MAX_HOPS:
            raise UserError(f"Retrieval: hops must lie in 1 to {MAX_HOPS}, got {hops}.")
        self.hops = hops
        self.max_turns = 2 * (2 * hops + 1) if max_turns is None else max_turns
        if self.max_turns < 1:
            raise UserError(f"Retrieval: max_turns must be at least 1, got {max_turns}.")
        self._seen: list[str] = []
        self._opened: list[str] = []
        self._answer: str | None = None
        super().__init__([self.search, self.open, self.answer])

    @property
    def question(self) -> Question:
        return find_question(self.task.split, int(self.task.id), self.hops)[1]

    @property
    def index(self) -> SearchIndex:
        return search_index(find_question(self.task.split, int(self.task.id), self.hops)[0])

    def begin(self, task: Task) -> str:
        self._seen, self._opened, self._answer = [], [], None
        return self.question.text

    def search(self, query: str) -> list[str]:
        """Search the documents by words; gives the titles of the best."""
        found = self.index.best(query)
        self._seen += [name for name in found if name not in self._seen]
        return found

    def open(self, title: str) -> str:
        """Read a document."""
        text = self.index.open(title)
        if title not in self._opened:
            self._opened.append(title)
        return text

    def answer(self, name: str) -> str:
        """Give the answer."""
        self._answer = name
        self.finish()
        return "Thank you."

    def on_text(self, text: str) -> str:
        return "Please give the answer with the tool answer."

    def success(self) -> bool:
        return _plain(self._answer or "") == _plain(self.question.answer)

    def expert_action(self) -> str:
        for name in self.question.path[:-1]:
            if name not in self._opened:
                found = name in self._seen
                call = ToolCall("open", {"title": name}) if found else ToolCall("search", {"query": name})
                return format_calls([call])
        return format_calls([ToolCall("answer", {"name": self.question.answer})])

    def get_state(self) -> Any:
        return {"seen": self._seen, "opened": self._opened, "answer": self._answer}

    def set_state(self, state: Any) -> None:
        self._seen, self._opened, self._answer = state["seen"], state["opened"], state["answer"]


def _plain(name: str) -> str:
    return " ".join(name.casefold().strip(" .").split())
