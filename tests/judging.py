"""Judges for tests: answers by a function."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_agents.api import Reply, Request

Episode = dict[str, Any]


def episode_in(messages: Sequence[Mapping[str, Any]]) -> Episode:
    """The transcript that a request holds."""
    read: Episode = json.loads(messages[-1]["content"])
    return read


class Answers:
    """Answers every request with what ``function`` makes of its episode: data, or a whole reply."""

    def __init__(self, function: Callable[[Episode], Any]) -> None:
        self.function, self.asked = function, list[Request]()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        self.asked += requests
        answers = [self.function(episode_in(request.messages)) for request in requests]
        return [answer if isinstance(answer, Reply) else Reply(data=answer) for answer in answers]


def scores(*given: int | None) -> Callable[[Episode], Any]:
    """One score an action, in order; None leaves it out."""

    def answer(episode: Episode) -> Any:
        judged = [action["number"] for action in episode["actions"] if action.get("judge")]
        pairs = zip(judged, given, strict=False)
        return {"actions": [{"number": n, "score": s, "reason": f"r{n}"} for n, s in pairs if s is not None]}

    return answer
