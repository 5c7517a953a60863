"""Code as action: every fenced block of Python is one call of one tool, ``{"code": ...}``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opd_agents.chat.syntaxes.base import Found, Syntax, bad, bare_json
from opd_agents.envs.actions import format_calls
from opd_agents.envs.strict_json import check_value
from opd_agents.types import ToolCall, ToolSpec

_FENCE = re.compile(r"^([ \t]*)(`{3,})([^`\n]*)$", re.MULTILINE)
_RUN = re.compile(r"`{3,}")


def code_syntax(tool: str = "python", argument: str = "code", name: str = "code") -> Syntax:
    """Blocks call ``tool`` with their text as ``argument``; any other call is bare JSON.

    Fences are Markdown's: a block ends at a line of at least as many backticks, so code that holds fences is
    written between longer ones.
    """

    def render(calls: Sequence[ToolCall]) -> str:
        codes = [call.arguments.get(argument) for call in calls if call.name == tool]
        if len(codes) == len(calls) and all(
            isinstance(code, str) and code.strip() and len(call.arguments) == 1
            for call, code in zip(calls, codes, strict=True)
        ):
            return "\n".join(map(_fenced, map(str, codes)))
        return format_calls(calls)

    def read(text: str, tools: Sequence[ToolSpec]) -> Found:
        if bare := bare_json(text):
            return bare
        blocks, problem = _blocks(text)
        ranges = tuple((start, stop) for start, stop, _ in blocks)
        if problem:
            return bad(problem, *ranges)
        return Found(tuple(ToolCall(tool, {argument: code}) for _, _, code in blocks), ranges, None)

    return Syntax(name, (), "```python\n...\n```", render, read)


def _fenced(code: str) -> str:
    longest = max((len(run) for run in _RUN.findall(code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}python\n{code}\n{fence}"


def _blocks(text: str) -> tuple[list[tuple[int, int, str]], str | None]:
    """The blocks of Python, as (start, stop, code), and what is wrong with the first bad one."""
    blocks: list[tuple[int, int, str]] = []
    problem, cursor = None, 0
    while fence := _FENCE.search(text, cursor):
        python = fence[3].strip() in ("python", "py")
        close = re.compile(rf"^[ \t]*`{{{len(fence[2])},}}[ \t\r]*$", re.MULTILINE).search(text, fence.end())
        body = text[fence.end() + 1 : close.start() - 1 if close else len(text)]
        cursor = close.end() if close else len(text)
        if python:
            problem = problem or _wrong(fence, body, closed=close is not None)
            blocks.append((fence.start(), cursor, body))
        elif any(inner[3].strip() in ("python", "py") for inner in _FENCE.finditer(body)):
            problem = problem or "```python inside another block"
            blocks.append((fence.start(), cursor, body))
    return blocks, problem


def _wrong(fence: re.Match[str], body: str, closed: bool) -> str | None:
    if fence[1]:
        return "a block of code must begin at the start of a line"
    if not closed:
        return f"no closing {fence[2]} after the code"
    if not body.strip():
        return "no code in the block"
    try:
        check_value(body)
    except ValueError as error:
        return str(error)
    return None


CODE = code_syntax()
