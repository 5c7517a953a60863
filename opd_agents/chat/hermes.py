"""Hermes-style tool calls: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` <-> ToolCall.

Reading is strict: what is not exactly a call is an error, never a guess, because a call acts on the world.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_agents.envs.actions import BadAction, format_calls, parse_action
from opd_agents.types import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_NESTING = 32  # of a call's JSON; deeper values would exhaust the stack of whoever walks or logs them


@dataclass(frozen=True, slots=True)
class Found:
    """The calls of a text. ``ranges`` are the character ranges of all blocks, valid or not, in order.

    With an ``error`` there are no calls. ``bare``: the whole text is JSON outside the markers, which an
    environment reads as calls too; it is read here exactly as there.
    """

    calls: tuple[ToolCall, ...]
    ranges: tuple[tuple[int, int], ...]
    error: str | None
    bare: bool = False


def render(calls: Sequence[ToolCall]) -> str:
    """The canonical text of calls: compact JSON, one block after the other."""
    return "".join(f"{OPEN}{format_calls((call,))}{CLOSE}" for call in calls)


def parse(text: str) -> Found:
    """Find the calls of a text; never raises. Text around the blocks is allowed."""
    if text.lstrip()[:1] in ("{", "["):
        whole = ((0, len(text)),)
        try:
            return Found(parse_action(text), whole, None, bare=True)
        except BadAction as error:
            return Found((), whole, f"Bad tool call: {error}", bare=True)
    calls: list[ToolCall] = []
    ranges: list[tuple[int, int]] = []
    problems: list[str] = []
    cursor = 0
    while (start := text.find(OPEN, cursor)) >= 0:
        if CLOSE in text[cursor:start]:
            problems.append(f"{CLOSE} without {OPEN}")
        try:
            call, cursor = _block(text, start)
            calls.append(call)
        except ValueError as error:
            problems.append(str(error))
            close = text.find(CLOSE, start)
            cursor = len(text) if close < 0 else close + len(CLOSE)
        ranges.append((start, cursor))
    if CLOSE in text[cursor:]:
        problems.append(f"{CLOSE} without {OPEN}")
    if problems:
        return Found((), tuple(ranges), f"Bad tool call: {problems[0]}")
    return Found(tuple(calls), tuple(ranges), None)


def _block(text: str, start: int) -> tuple[ToolCall, int]:
    """The call of the block that opens at ``start``, and where the block ends."""
    # The JSON says where it ends, not the next marker: a string argument may hold the marker's text.
    value, stop = _decode(text, _skip_space(text, start + len(OPEN)))
    stop = _skip_space(text, stop)
    if not text.startswith(CLOSE, stop):
        raise ValueError(f"no {CLOSE} after the JSON object")
    return _call(value), stop + len(CLOSE)


def _skip_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict):
        raise ValueError('a tool call must be a JSON object {"name": ..., "arguments": {...}}')
    if unknown := value.keys() - {"name", "arguments"}:
        raise ValueError(f"unknown key {min(unknown)!r}; a tool call has only 'name' and 'arguments'")
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("'name' must be the name of a tool")
    if not isinstance(value.get("arguments"), dict):
        raise ValueError("'arguments' must be a JSON object")
    return ToolCall(value["name"], value["arguments"])


def _decode(text: str, start: int) -> tuple[Any, int]:
    """One strict JSON value from ``start``, and where it ends."""
    try:
        value, stop = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(f"JSON nested deeper than {MAX_NESTING} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at character {error.pos}: {error.msg}") from None
    if _deeper(value, MAX_NESTING):
        raise ValueError(f"JSON nested deeper than {MAX_NESTING} levels")
    # UnicodeEncodeError, a ValueError, for a lone surrogate: nothing could write it to a file
    json.dumps(value, ensure_ascii=False).encode()
    return value, stop


def _deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return items is not None and (levels == 0 or any(_deeper(item, levels - 1) for item in items))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
