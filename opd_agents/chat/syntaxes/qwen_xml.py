"""Qwen3-Coder, Qwen3.5, Nemotron 3: ``<tool_call><function=name><parameter=key>value</parameter>...``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from opd_agents.chat.syntaxes.base import Found, Syntax, bare_json, expect, read_blocks, read_name, skip_space
from opd_agents.chat.syntaxes.values import parameter_types, read_value_text, write_value
from opd_agents.envs.strict_json import check_value
from opd_agents.types import ToolCall, ToolSpec

MARKERS = ("<tool_call>", "</tool_call>", "<function=", "<parameter=")
CLOSE_VALUE = "</parameter>"
_KEY = re.compile(r"<parameter=([^<>\n]+)>")


def _render(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(_render_call, calls))


def _render_call(call: ToolCall) -> str:
    values = "".join(
        f"<parameter={key}>\n{write_value(value, (*MARKERS, CLOSE_VALUE))}\n{CLOSE_VALUE}\n"
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
    arguments: dict[str, Any] = {}
    while key := _KEY.match(text, cursor):
        stop = text.find(CLOSE_VALUE, key.end())
        if stop < 0:
            raise ValueError(f"no {CLOSE_VALUE} after {key[0]}")
        if key[1] in arguments:
            raise ValueError(f"duplicate parameter {key[1]!r}")
        value = text[key.end() : stop].removeprefix("\n").removesuffix("\n")
        arguments[key[1]] = read_value_text(value, types.get(key[1], ()), (*MARKERS, CLOSE_VALUE))
        cursor = skip_space(text, stop + len(CLOSE_VALUE))
    check_value(arguments)
    cursor = expect(text, cursor, "</function>", "the parameters")
    return [ToolCall(name, arguments)], expect(text, cursor, "</tool_call>", "</function>")


QWEN_XML = Syntax(
    "qwen_xml",
    MARKERS,
    "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>",
    _render,
    _read,
)
