"""DeepSeek-V3 and R1; V3.1's shorter form, without ``function`` and the fence, is read too."""

from __future__ import annotations

import json
from collections.abc import Sequence

from opd_agents.chat.syntaxes.base import Found, Syntax, bare_json, expect, read_blocks, read_name, skip_space
from opd_agents.envs.strict_json import read_value
from opd_agents.types import ToolCall, ToolSpec

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001  # the family's own bar
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
MARKERS = (BEGIN, END, CALL, SEPARATOR, CALL_END)
FENCE = "```json"


def _render(calls: Sequence[ToolCall]) -> str:
    return BEGIN + "\n".join(map(_render_call, calls)) + END


def _render_call(call: ToolCall) -> str:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return f"{CALL}function{SEPARATOR}{call.name}\n{FENCE}\n{arguments}\n```{CALL_END}"


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    return bare_json(text) or read_blocks(text, MARKERS, _block)


def _block(text: str, start: int) -> tuple[list[ToolCall], int]:
    calls, cursor = [], skip_space(text, start)
    while text.startswith(CALL, cursor):
        call, cursor = _call(text, cursor + len(CALL))
        calls.append(call)
        cursor = skip_space(text, cursor)
    if not calls:
        raise ValueError(f"no {CALL} after {BEGIN}")
    return calls, expect(text, cursor, END, CALL_END)


def _call(text: str, start: int) -> tuple[ToolCall, int]:
    name, cursor = read_name(text, start, CALL)
    cursor = expect(text, cursor, SEPARATOR, "the name")
    fenced = name == "function" and not text.startswith("{", cursor)
    if fenced:
        name, cursor = read_name(text, cursor, SEPARATOR)
        cursor = expect(text, cursor, FENCE, "the name")
    arguments, cursor = read_value(text, skip_space(text, cursor))
    if not isinstance(arguments, dict):
        raise ValueError("the arguments must be a JSON object")
    if fenced:
        cursor = expect(text, cursor, "```", "the arguments")
    return ToolCall(name, arguments), expect(text, cursor, CALL_END, "the arguments")


DEEPSEEK = Syntax(
    "deepseek",
    MARKERS,
    f"{BEGIN}{CALL}function{SEPARATOR}NAME\n{FENCE}\n{{...}}\n```{CALL_END}{END}",
    _render,
    _read,
)
