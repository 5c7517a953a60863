"""What an agent sees of a page: one line a node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from opd_agents.tools.base import ToolError

MOST_OPTIONS = 20  # of a list of choices are shown
MOST_CHARS = 300  # of a name or a value are shown
CHOOSE = "choose one of its options with select"  # what clicking on a list of options is answered with


@dataclass(frozen=True, slots=True)
class Node:
    """One thing on a page. Only what can be acted on has an ``id``, counted from 1 in document order."""

    role: str  # of ARIA, or "text"
    name: str = ""
    id: int | None = None
    value: str | None = None  # of a field: "" is an empty one
    depth: int = 0
    states: tuple[str, ...] = ()  # of: checked, selected, expanded, pressed, disabled, readonly, invalid
    options: tuple[str, ...] = ()  # what a field lets choose from


def find(nodes: Sequence[Node], id: int) -> Node:
    """The node with this id. Raises ToolError for one that is not there or is disabled."""
    for node in nodes:
        if node.id is not None and node.id == id:
            if "disabled" in node.states:
                raise ToolError("it is disabled")
            return node
    count = max((node.id or 0 for node in nodes), default=0)
    raise ToolError("no such element; the page has " + (f"[1] to [{count}]" if count else "none"))


def render(nodes: Sequence[Node], max_chars: int = 8000) -> str:
    """The page as text, at most ``max_chars`` characters in whole lines; the last says what was left out."""
    lines = [_line(node) for node in nodes]
    if sum(map(len, lines)) + len(lines) - 1 <= max_chars:
        return "\n".join(lines)
    room, kept = max_chars - len(_left_out(len(lines))), 0
    while kept < len(lines) and room > len(lines[kept]):
        room -= len(lines[kept]) + 1
        kept += 1
    return "\n".join([*lines[:kept], _left_out(len(lines) - kept)])


def _left_out(count: int) -> str:
    return f"... {count} more lines"


def _line(node: Node) -> str:
    parts = [f"[{node.id}]"] if node.id is not None else []
    if node.role != "text":
        parts.append(node.role)
    if node.name:
        parts.append(_quoted(node.name))
    if node.value is not None:
        parts.append(f"= {_quoted(node.value)}")
    if node.options:
        shown = [_quoted(option) for option in node.options[:MOST_OPTIONS]]
        more = len(node.options) - len(shown)
        parts.append(f"of {', '.join(shown)}" + (f", ... {more} more" if more else ""))
    parts += node.states
    return "  " * node.depth + " ".join(parts)


def _quoted(text: str) -> str:
    """As a JSON string: nothing that a page says can look like a line of ours."""
    return json.dumps(text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + "...", ensure_ascii=False)
