"""Actions as text: one JSON call, a JSON list of calls, or a text to the user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from opd_agents.envs.strict_json import loads
from opd_agents.errors import OpdError
from opd_agents.types import ToolCall

# A call in a model's own syntax that could not be read arrives here unchanged: never take it for an answer.
# Only what no prose holds: the markup of every syntax in opd_agents.chat.syntaxes, which a test compares.
CALL_MARKERS = (
    *("<tool_call>", "</tool_call>", "<function=", "<parameter=", "<arg_key>", "<arg_value>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # noqa: RUF001  # DeepSeek's own bar
    *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),  # noqa: RUF001
    *("<|python_tag|>", "[TOOL_CALLS]", "<|tool_call_start|>", "<|tool_call_end|>"),
    *("<|channel|>", "<|constrain|>", "<|message|>", "<|call|>", "to=functions."),
)
_REFUSED = "\x15"  # ASCII's "negative acknowledge", which no prose holds


class BadAction(OpdError):
    """The action can be read neither as tool calls nor as a text; the agent reads the message."""


def parse_action(action: str) -> tuple[ToolCall, ...]:
    """The calls that ``action`` asks for, in order; none if it is a text to the user.

    What begins with ``{`` or ``[`` is meant as JSON. Raises BadAction for JSON that is broken or no call, for
    an empty action, and for the markup of a tool call that the chat could not read.
    """
    try:
        action.encode()
    except UnicodeEncodeError:
        raise BadAction("the action holds a lone surrogate, which is no character") from None
    text = action.strip()
    if not text:
        raise BadAction('empty action; send {"name":...,"arguments":{...}} or a text to the user')
    if text[0] == _REFUSED:
        raise BadAction(text.split(_REFUSED)[1])
    if text[0] not in "{[":
        if any(marker in text for marker in CALL_MARKERS):
            hint = 'send <tool_call>{"name":...,"arguments":{...}}</tool_call>, complete'
            raise BadAction(f"malformed tool call; {hint}")
        return ()
    try:
        value = loads(text)
    except ValueError as error:
        raise BadAction(f"invalid JSON: {error}") from error
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise BadAction("empty list of calls")
    return tuple(_call(item) for item in calls)


def format_calls(calls: Sequence[ToolCall]) -> str:
    """The canonical action of ``calls``: compact JSON, one object for one call, otherwise a list."""
    items = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return json.dumps(items[0] if len(items) == 1 else items, separators=(",", ":"), ensure_ascii=False)


def same_action(one: str, other: str) -> bool:
    """Whether two actions ask for the same: equal calls, in whatever order their arguments stand, or equal
    texts. What cannot be read is the same as itself alone."""
    try:
        calls = parse_action(one), parse_action(other)
    except BadAction:
        return one == other
    return calls[0] == calls[1] if any(calls) else one.strip() == other.strip()


def refuse(text: str, problem: str) -> str:
    """An action that every environment answers with ``problem``: ``text``, which a chat could not read."""
    return f"{_REFUSED}{problem}{_REFUSED}{text}"


def _call(item: Any) -> ToolCall:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise BadAction('a call must be a JSON object {"name":"...","arguments":{...}}')
    if unknown := item.keys() - {"name", "arguments"}:  # such as "parameters": never a call without arguments
        raise BadAction(f"unknown key {min(unknown)!r}; a call has only 'name' and 'arguments'")
    arguments = item.get("arguments", {})
    if not isinstance(arguments, dict):
        raise BadAction(f'the "arguments" of {item["name"]!r} must be a JSON object')
    return ToolCall(item["name"], arguments)
