"""What a proposed action says that its agent could not know: a correction that carries the answer in from
elsewhere would teach the student to guess it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from opd_agents.envs.actions import BadAction, parse_action
from opd_agents.types import ToolSpec, Trajectory, to_dict

PIECE = re.compile(r"\S+")
EDGES = ".,;:!?()[]{}<>\"'`"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)")


def leaks(action: str, trajectory: Trajectory, turn: int, tools: Sequence[ToolSpec]) -> list[str]:
    """The literals of ``action`` that stand neither in what the agent had seen and done before ``turn`` nor
    in the schemas of ``tools``: names of tools and arguments, numbers by value, and texts piece by piece
    between spaces. An action that is words to the user is a text like any other; one that cannot be read
    leaks all.

    True, false and null say nothing. What can be computed (a sum) but is not written down counts as a leak.
    """
    try:
        calls = parse_action(action)
    except BadAction:
        return [action]
    seen = "\n".join(_seen(trajectory, turn, tools))
    numbers = {Decimal(found) for found in NUMBER.findall(seen)}
    literals: list[Any] = [action] if not calls else []
    for call in calls:
        literals += [call.name, *_literals(call.arguments)]
    return [piece for literal in literals for piece in _unseen(literal, seen, numbers)]


def _seen(trajectory: Trajectory, turn: int, tools: Sequence[ToolSpec]) -> Iterator[str]:
    yield json.dumps(to_dict(tools), ensure_ascii=False)
    yield from (message.content for message in trajectory.messages)
    for before in trajectory.turns[:turn]:
        yield from (before.action, before.text, before.observation)


def _literals(value: Any) -> Iterator[Any]:
    match value:
        case dict():
            for key, item in value.items():
                yield key
                yield from _literals(item)
        case list():
            for item in value:
                yield from _literals(item)
        case bool() | None:
            return
        case _:
            yield value


def _unseen(literal: Any, seen: str, numbers: set[Decimal]) -> Iterator[str]:
    if not isinstance(literal, str):
        if Decimal(str(literal)) not in numbers:
            yield str(literal)
        return
    for found in PIECE.findall(literal):
        piece = found.strip(EDGES)
        if piece and not re.search(rf"(?<!\w){re.escape(piece)}(?!\w)", seen, re.IGNORECASE):
            yield piece
