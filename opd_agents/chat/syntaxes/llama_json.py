"""Llama 3.x: the whole text is ``{"name": ..., "parameters": {...}}``, or it follows ``<|python_tag|>``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from opd_agents.chat.syntaxes.base import Found, Syntax, bad, bare_json, object_call, read_blocks, skip_space
from opd_agents.envs.strict_json import read_value
from opd_agents.types import ToolCall, ToolSpec

TAG = "<|python_tag|>"
MARKERS = (TAG,)


def _render(calls: Sequence[ToolCall]) -> str:
    items = [{"name": call.name, "parameters": dict(call.arguments)} for call in calls]
    return "; ".join(json.dumps(item, ensure_ascii=False) for item in items)


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    if text.lstrip()[:1] != "{":
        return bare_json(text) or read_blocks(text, MARKERS, _block)
    bare = bare_json(text)
    if bare and bare.calls:  # with "arguments", as environments read it
        return bare
    try:
        calls, _ = _block(text, 0)
    except ValueError as error:
        return bad(error, (0, len(text)))
    return Found(tuple(calls), ((0, len(text)),), None)


def _block(text: str, start: int) -> tuple[list[ToolCall], int]:
    """One call, or several with ``;`` between them, to the end of the text."""
    calls: list[ToolCall] = []
    while True:
        value, stop = read_value(text, skip_space(text, start))
        # The documentation's example carries the type, and models repeat it.
        if isinstance(value, dict) and value.get("type", "function") != "function":
            raise ValueError("'type' can only be 'function'")
        calls.append(object_call(value, "parameters", optional=("type",)))
        start = skip_space(text, stop)
        if start == len(text):
            return calls, start
        if text[start] != ";":
            raise ValueError(f"text after the call at character {start}; only ; and another call may follow")
        start += 1


LLAMA_JSON = Syntax("llama_json", MARKERS, '{"name": ..., "parameters": {...}}', _render, _read)
