"""Qwen3-Coder, Qwen3.5, Nemotron 3: ``<tool_call><function=name><parameter=key>value</parameter>...``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opd_agents.chat.syntaxes.base import Found, Syntax, bare_json, expect, read_blocks, read_name, skip_space
from opd_agents.chat.syntaxes.values import parameter_types, read_arguments, write_value
from opd_agents.types import ToolCall, ToolSpec

MARKERS = ("<tool_call>", "</tool_call>", "<function=", "<parameter=")
CLOSE_VALUE = "</parameter>"
MARKUP = (*MARKERS, CLOSE_VALUE)
_KEY = re.compile(r"<parameter=(?P<parameter>[^<>\n]+)>")


def _render(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(_render_call, calls))


def _render_call(call: ToolCall) -> str:
    values = "".join(
        f"<parameter={key}>\n{write_value(value, MARKUP)}\n{CLOSE_VALUE}\n"
        for key, value in call.arguments.items()
    )
    return f"<tool_call>\n<function={call.name}>\n{values}</function>\n</tool_call>"


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    return bare_json(text) or read_blocks(text, MARKERS, lambda text, start: _block(text, start, tools))


def _block(text: str, start: int, tools: Sequence[ToolSpec]) -> tuple[list[ToolCall], int]:
    cursor = expect(text, start, "<function=", "<tool_call>")
    name, cursor = read_name(text, cursor, "<function=")
    cursor = skip_space(text, expect(text, cursor, ">", "the name of the function"))
    types = parameter_types(tools, name)
    arguments, cursor = read_arguments(text, cursor, types, _KEY, CLOSE_VALUE, MARKUP, space="\n")
    cursor = expect(text, cursor, "</function>", "the parameters")
    return [ToolCall(name, arguments)], expect(text, cursor, "</tool_call>", "</function>")


QWEN_XML = Syntax(
    "qwen_xml",
    MARKERS,
    "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>",
    _render,
    _read,
)
