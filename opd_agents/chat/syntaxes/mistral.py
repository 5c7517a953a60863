"""Mistral: ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}]``, later ``[TOOL_CALLS]name[ARGS]{...}``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from opd_agents.chat.syntaxes.base import (
    Found,
    Syntax,
    bare_json,
    expect,
    object_call,
    read_blocks,
    read_name,
    skip_space,
)
from opd_agents.envs.strict_json import read_value
from opd_agents.types import ToolCall, ToolSpec

OPEN, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
MARKERS = (OPEN,)  # [ARGS] alone is how manuals write a command's arguments


def _render(calls: Sequence[ToolCall]) -> str:
    items = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return f"{OPEN} {json.dumps(items, ensure_ascii=False)}" if items else ""


def _render_args(calls: Sequence[ToolCall]) -> str:
    return "".join(
        f"{OPEN}{call.name}{ARGUMENTS}{json.dumps(dict(call.arguments), ensure_ascii=False)}"
        for call in calls
    )


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    bare = None if text.lstrip().startswith(OPEN) else bare_json(text)
    return bare or read_blocks(text, MARKERS, _block)


def _block(text: str, start: int) -> tuple[list[ToolCall], int]:
    start = skip_space(text, start)
    calls, stop = _list(text, start) if text.startswith("[", start) else _named(text, start)
    rest = skip_space(text, stop)
    if rest < len(text) and not text.startswith(OPEN, rest):
        raise ValueError(f"text after the call at character {rest}; calls come last")
    return calls, stop


def _list(text: str, start: int) -> tuple[list[ToolCall], int]:
    items, stop = read_value(text, start)
    if not items:
        raise ValueError(f"no call in the list after {OPEN}")
    # Histories carry the calls' ids, and models repeat them.
    return [object_call(item, optional=("id",)) for item in items], stop


def _named(text: str, start: int) -> tuple[list[ToolCall], int]:
    name, stop = read_name(text, start, OPEN)
    stop = expect(text, stop, ARGUMENTS, "the name of the tool")
    arguments, stop = read_value(text, skip_space(text, stop))
    if not isinstance(arguments, dict):
        raise ValueError("the arguments must be a JSON object")
    return [ToolCall(name, arguments)], stop


MISTRAL = Syntax("mistral", MARKERS, '[TOOL_CALLS] [{"name": ..., "arguments": {...}}]', _render, _read)
MISTRAL_ARGS = Syntax("mistral_args", MARKERS, "[TOOL_CALLS]NAME[ARGS]{...}", _render_args, _read)
