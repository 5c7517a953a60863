"""GLM-4.5: ``<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from opd_agents.chat.syntaxes.base import Found, Syntax, bare_json, expect, read_blocks, read_name, skip_space
from opd_agents.chat.syntaxes.values import parameter_types, read_value_text, write_value
from opd_agents.envs.strict_json import check_value
from opd_agents.types import ToolCall, ToolSpec

MARKERS = ("<tool_call>", "</tool_call>", "<arg_key>", "<arg_value>")
CLOSE_VALUE = "</arg_value>"
_KEY = re.compile(r"<arg_key>([^<>\n]+)</arg_key>\s*<arg_value>")


def _render(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(_render_call, calls))


def _render_call(call: ToolCall) -> str:
    values = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{write_value(value, (*MARKERS, CLOSE_VALUE))}{CLOSE_VALUE}\n"
        for key, value in call.arguments.items()
    )
    return f"<tool_call>{call.name}\n{values}</tool_call>"


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    return bare_json(text) or read_blocks(text, MARKERS, lambda text, start: _block(text, start, tools))


def _block(text: str, start: int, tools: Sequence[ToolSpec]) -> tuple[list[ToolCall], int]:
    name, cursor = read_name(text, skip_space(text, start), "<tool_call>")
    cursor = skip_space(text, cursor)
    types = parameter_types(tools, name)
    arguments: dict[str, Any] = {}
    while key := _KEY.match(text, cursor):
        stop = text.find(CLOSE_VALUE, key.end())
        if stop < 0:
            raise ValueError(f"no {CLOSE_VALUE} after the key {key[1]!r}")
        if key[1] in arguments:
            raise ValueError(f"duplicate key {key[1]!r}")
        value = text[key.end() : stop]
        arguments[key[1]] = read_value_text(value, types.get(key[1], ()), (*MARKERS, CLOSE_VALUE))
        cursor = skip_space(text, stop + len(CLOSE_VALUE))
    check_value(arguments)
    return [ToolCall(name, arguments)], expect(text, cursor, "</tool_call>", "name and arguments")


GLM = Syntax(
    "glm",
    MARKERS,
    "<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
    _render,
    _read,
)
