"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes; with newlines Qwen2.5 and Qwen3."""

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
    skip_space,
)
from opd_agents.envs.actions import format_calls
from opd_agents.envs.strict_json import read_value
from opd_agents.types import ToolCall, ToolSpec

OPEN, CLOSE = MARKERS = ("<tool_call>", "</tool_call>")


def _render(calls: Sequence[ToolCall]) -> str:
    return "".join(f"{OPEN}{format_calls((call,))}{CLOSE}" for call in calls)


def _render_qwen(calls: Sequence[ToolCall]) -> str:
    items = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return "\n".join(f"{OPEN}\n{json.dumps(item, ensure_ascii=False)}\n{CLOSE}" for item in items)


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    return bare_json(text) or read_blocks(text, MARKERS, _block)


def _block(text: str, start: int) -> tuple[list[ToolCall], int]:
    # The JSON says where it ends, not the next marker: a string argument may hold the marker's text.
    value, stop = read_value(text, skip_space(text, start))
    stop = expect(text, stop, CLOSE, "the JSON object")
    return [object_call(value)], stop


HERMES = Syntax(
    "hermes", MARKERS, '<tool_call>{"name":...,"arguments":{...}}</tool_call>', _render, _read, native=True
)
QWEN = Syntax(
    "qwen",
    MARKERS,
    '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>',
    _render_qwen,
    _read,
    native=True,
)
