"""What every tool-call syntax has in common.

Reading is strict: what is not exactly a call is an error, never a guess, because a call acts on the world.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd_agents.envs.actions import BadAction, format_calls, parse_action, refuse
from opd_agents.types import ToolCall, ToolSpec

NAME = re.compile(r"[\w./:-]+")  # of a tool, where the markup around it is no JSON
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Found:
    """The calls of a text. ``ranges`` are the character ranges of all blocks, valid or not, in order.

    With an ``error`` there are no calls. ``bare``: the whole text is JSON outside the markers, which an
    environment reads as calls too; it is read here exactly as there. ``content``: what is said to the user,
    where the syntax marks it; None if that is the text itself.
    """

    calls: tuple[ToolCall, ...]
    ranges: tuple[tuple[int, int], ...]
    error: str | None
    bare: bool = False
    content: str | None = None


@dataclass(frozen=True, slots=True)
class Syntax:
    """How a family of models writes calls.

    ``markers`` betray a call, read or not. ``form`` shows a model how to write one. ``render`` gives the
    canonical text of calls, without the token that ends the turn. ``read`` is ``parse`` without a default.
    ``native``: environments' own error messages show this form, so they may answer by themselves.
    """

    name: str
    markers: tuple[str, ...]
    form: str
    render: Callable[[Sequence[ToolCall]], str]
    read: Callable[[str, Sequence[ToolSpec]], Found]
    native: bool = False

    def parse(self, text: str, tools: Sequence[ToolSpec] = ()) -> Found:
        """Find the calls of a text; never raises.

        ``tools`` give the types of values that the syntax writes without quotes (``7``: text or number?);
        without them such a value is JSON if it reads as JSON, else text.
        """
        return self.read(text, tools)

    def action(self, text: str, found: Found) -> str:
        """What an environment gets for ``text``: JSON calls, or the words to the user.

        For what could not be read it is text that every environment refuses, with what was wrong and how to
        write a call: a call's remains must not pass for an answer.
        """
        if found.calls:
            return text if found.bare else format_calls(found.calls)
        said = text if found.content is None or found.error else found.content
        refusal = _refusal(said)
        if refusal is None and found.error is None:
            return said
        if refusal is not None and found.bare:
            return text
        if self.native:  # the opening marker keeps bare JSON that was cut off from being a whole call
            return self.markers[0] + text if text.lstrip()[:1] in ("{", "[") else text
        if found.error is None and not said.strip():
            return refuse(text, f"empty action; send {self.form} or a text to the user")
        return refuse(text, f"{found.error or f'Bad tool call: not {self.name}'}; send {self.form}, complete")


def _refusal(text: str) -> str | None:
    try:
        parse_action(text)
    except BadAction as error:
        return str(error)
    return None


def bad(problem: object, *ranges: tuple[int, int], bare: bool = False) -> Found:
    """No call was found where one was meant."""
    return Found((), ranges, f"Bad tool call: {problem}", bare)


def bare_json(text: str) -> Found | None:
    """What an environment itself would read as calls, whatever the syntax; None for any other text."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    whole = (0, len(text))
    try:
        return Found(parse_action(text), (whole,), None, bare=True)
    except BadAction as error:
        return bad(error, whole, bare=True)


def read_blocks(
    text: str,
    markers: Sequence[str],
    block: Callable[[str, int], tuple[Sequence[ToolCall], int]],
) -> Found:
    """The calls of all blocks; text around them is allowed.

    A block opens with the first of ``markers``; a bad one is taken to go on to the second, if there is one,
    else to the end. ``block(text, i)`` reads on behind the opening one: calls and where the block ends, or
    ValueError. None of the markers may stand outside.
    """
    opener, closer = markers[0], markers[1] if len(markers) > 1 else None
    calls: list[ToolCall] = []
    ranges: list[tuple[int, int]] = []
    problems: list[str] = []
    cursor = 0
    while (start := text.find(opener, cursor)) >= 0:
        problems += _strays(text[cursor:start], markers)
        try:
            read, cursor = block(text, start + len(opener))
            calls += read
        except ValueError as error:
            problems.append(str(error))
            close = text.find(closer, start) if closer else -1
            cursor = len(text) if closer is None or close < 0 else close + len(closer)
        ranges.append((start, cursor))
    problems += _strays(text[cursor:], markers)
    if problems:
        return bad(problems[0], *ranges)
    return Found(tuple(calls), tuple(ranges), None)


def _strays(text: str, markers: Sequence[str]) -> list[str]:
    return [f"{marker} without {markers[0]}" for marker in markers[1:] if marker in text]


def skip_space(text: str, start: int) -> int:
    """Where what follows the space at ``start`` begins."""
    match = _SPACE.match(text, start)
    return match.end() if match else start


def expect(text: str, start: int, literal: str, after: str) -> int:
    """Where ``literal``, which must stand at ``start`` but for space, ends. Raises ValueError."""
    start = skip_space(text, start)
    if not text.startswith(literal, start):
        raise ValueError(f"no {literal} after {after}")
    return start + len(literal)


def read_name(text: str, start: int, after: str) -> tuple[str, int]:
    """A tool's name, and where it ends. Raises ValueError."""
    match = NAME.match(text, start)
    if match is None:
        raise ValueError(f"no name of a tool after {after}")
    return match[0], match.end()


def object_call(value: Any, key: str = "arguments", optional: Sequence[str] = ()) -> ToolCall:
    """The call of a JSON object with the members ``name`` and ``key``. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f'a tool call must be a JSON object {{"name": ..., "{key}": {{...}}}}')
    if unknown := value.keys() - {"name", key, *optional}:
        raise ValueError(f"unknown key {min(unknown)!r}; a tool call has only 'name' and {key!r}")
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("'name' must be the name of a tool")
    if not isinstance(value.get(key), dict):
        raise ValueError(f"{key!r} must be a JSON object")
    return ToolCall(value["name"], value[key])
