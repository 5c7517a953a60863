"""No markup: the whole text is environments' own ``{"name": ..., "arguments": {...}}`` or a list."""

from __future__ import annotations

from collections.abc import Sequence

from opd_agents.chat.syntaxes.base import Found, Syntax, bare_json
from opd_agents.envs.actions import format_calls
from opd_agents.types import ToolCall, ToolSpec


def _render(calls: Sequence[ToolCall]) -> str:
    return format_calls(calls) if calls else ""


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    return bare_json(text) or Found((), (), None)


PLAIN_JSON = Syntax("json", (), '{"name":...,"arguments":{...}}', _render, _read)
