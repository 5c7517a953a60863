"""GLM-4.5: ``<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opd_agents.chat.syntaxes.base import Found, Syntax, bare_json, expect, read_blocks, read_name, skip_space
from opd_agents.chat.syntaxes.values import parameter_types, read_arguments, write_value
from opd_agents.types import ToolCall, ToolSpec

MARKERS = ("<tool_call>", "</tool_call>", "<arg_key>", "<arg_value>")
CLOSE_VALUE = "</arg_value>"
MARKUP = (*MARKERS, CLOSE_VALUE)
_KEY = re.compile(r"<arg_key>(?P<key>[^<>\n]+)</arg_key>\s*<arg_value>")


def _render(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(_render_call, calls))


def _render_call(call: ToolCall) -> str:
    values = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{write_value(value, MARKUP)}{CLOSE_VALUE}\n"
        for key, value in call.arguments.items()
    )
    return f"<tool_call>{call.name}\n{values}</tool_call>"


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    return bare_json(text) or read_blocks(text, MARKERS, lambda text, start: _block(text, start, tools))


def _block(text: str, start: int, tools: Sequence[ToolSpec]) -> tuple[list[ToolCall], int]:
    name, cursor = read_name(text, skip_space(text, start), "<tool_call>")
    types = parameter_types(tools, name)
    arguments, cursor = read_arguments(text, skip_space(text, cursor), types, _KEY, CLOSE_VALUE, MARKUP)
    return [ToolCall(name, arguments)], expect(text, cursor, "</tool_call>", "name and arguments")


GLM = Syntax(
    "glm",
    MARKERS,
    "<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
    _render,
    _read,
)
