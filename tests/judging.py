"""Judges for tests: answers by a function, and an oracle that compares with the scripted expert."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from api_server import Expert

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


class Oracle:
    """Judges by what the scripted expert does in each state: as a server's ``judge``, for any schema that the
    package asks for. An oracle, no model: it knows the task."""

    def __init__(self, env_id: str, options: Mapping[str, Any], tasks: int = 300) -> None:
        self.expert = Expert(env_id, options, tasks)

    def __call__(self, body: Mapping[str, Any]) -> Any:
        episode, names = episode_in(body["messages"]), schema_of(body)
        expected = self.expected(episode)
        right = [
            same(action["action"], other) for action, other in zip(episode["actions"], expected, strict=False)
        ]
        if "replacement" in names:
            wrong = right.index(False) if False in right else -1
            action = expected[wrong] if wrong >= 0 else ""
            return {"number": wrong + 1, "reason": "the expert does otherwise", "replacement": action}
        if "actions" not in names:
            return self.judgement(names, all(right))
        judged = [action["number"] for action in episode["actions"] if action.get("judge")]
        item = body["response_format"]["json_schema"]["schema"]["properties"]["actions"]["items"]
        answers = [{"number": n} | self.judgement(item["properties"], right[n - 1]) for n in judged]
        return {"actions": [{k: v for k, v in one.items() if k in item["properties"]} for one in answers]}

    def judgement(self, names: Mapping[str, Any], right: bool) -> dict[str, Any]:
        said = {"reason": "", "score": 9 * right, "verdict": "skip" if right else "strong"}
        return {name: said[name] for name in names if name in said}

    def expected(self, episode: Episode) -> list[str]:
        """What the expert would have done at each action."""
        messages, found = list(episode["task"]), []
        for action in episode["actions"]:
            found.append(self.expert({"messages": messages}))
            said = {"role": "assistant", "content": action["action"]}
            messages += [said, {"role": "tool", "content": action["answer"]}]
        return found


def same(action: str, other: str) -> bool:
    try:
        return bool(json.loads(action) == json.loads(other))
    except ValueError:
        return action.strip() == other.strip()


def schema_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    names: Mapping[str, Any] = body["response_format"]["json_schema"]["schema"]["properties"]
    return names
