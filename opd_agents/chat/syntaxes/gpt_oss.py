"""gpt-oss's harmony: messages on channels, a call is one to ``functions.NAME`` whose body is JSON.

The text goes on from the prompt's ``<|start|>assistant``. What is on the ``final`` channel is said to the
user, without one what is on ``commentary``; ``analysis`` is thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_agents.chat.syntaxes.base import NAME, Found, Syntax, bad, bare_json, skip_space
from opd_agents.envs.strict_json import read_value
from opd_agents.types import ToolCall, ToolSpec

MARKERS = ("to=functions.", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>")
NEXT = "<|start|>assistant"
_HEADER = re.compile(
    r"(?:\s*+<\|start\|>assistant)?"
    r"(?:\s*+to=(?P<first>[^\s<]++))?"
    r"(?:\s*+<\|channel\|>(?P<channel>analysis|commentary|final)\b(?:\s*+to=(?P<second>[^\s<]++))?)?"
    r"(?:\s*+(?:<\|constrain\|>\s*+)?(?P<type>\w++))?\s*+<\|message\|>"
)
_END = re.compile(r"<\|(?:end|call|return)\|>")
_MARKUP = re.compile(r"<\|(?:start|channel|constrain|message|call|end|return)\|>")


@dataclass(slots=True)
class _Said:
    """What was read so far."""

    calls: list[ToolCall] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    channels: dict[str, list[str]] = field(default_factory=dict)


def _render(calls: Sequence[ToolCall]) -> str:
    messages = (
        f" to=functions.{call.name}<|channel|>commentary json<|message|>"
        + json.dumps(dict(call.arguments), ensure_ascii=False)
        for call in calls
    )
    return f"<|call|>{NEXT}".join(messages)


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    if not any(marker in text for marker in (*MARKERS, "<|start|>", "<|end|>", "<|return|>")):
        return bare_json(text) or Found((), (), None)
    said, cursor = _Said(), 0
    while cursor < len(text):
        try:
            cursor = _message(text, cursor, said)
        except ValueError as error:
            return bad(error, *(pair for pair in said.ranges if pair[1] <= cursor), (cursor, len(text)))
    if said.calls:
        preamble = "\n".join(said.channels.get("commentary", ())) or None
        return Found(tuple(said.calls), tuple(said.ranges), None, content=preamble)
    content = "\n".join(said.channels.get("final") or said.channels.get("commentary") or ())
    if bare_json(content):  # an environment would run it
        return bad("JSON in words to the user; calls go to functions.NAME", (0, len(text)))
    return Found((), (), None, content=content)


def _message(text: str, start: int, said: _Said) -> int:
    """Read one message; returns where it ends. Raises ValueError."""
    header = _HEADER.match(text, start)
    if header is None:
        raise ValueError(f"no message header at character {start}")
    if header["first"] and header["second"]:
        raise ValueError("two recipients of one message")
    recipient = header["first"] or header["second"]
    if recipient is None:
        return _words(text, header, said)
    name = recipient.removeprefix("functions.")
    if name == recipient or NAME.fullmatch(name) is None:
        raise ValueError(f"unknown recipient {recipient!r}; tools are functions.NAME")
    if header["channel"] == "final" or header["type"] not in (None, "json"):
        raise ValueError("a call is JSON on the commentary channel")
    arguments, stop = read_value(text, skip_space(text, header.end()))
    if not isinstance(arguments, dict):
        raise ValueError("the arguments must be a JSON object")
    stop = skip_space(text, stop)
    if stop < len(text):
        if not text.startswith("<|call|>", stop):
            raise ValueError("no <|call|> after the arguments")
        stop += len("<|call|>")
    said.calls.append(ToolCall(name, arguments))
    said.ranges.append((skip_space(text, start), stop))
    return _next(text, stop)


def _words(text: str, header: re.Match[str], said: _Said) -> int:
    if header["channel"] is None:
        raise ValueError("a message without a channel")
    end = _END.search(text, header.end())
    body = text[header.end() : end.start() if end else len(text)]
    if marker := _MARKUP.search(body):
        raise ValueError(f"{marker[0]} inside a message")
    if end and end[0] == "<|call|>":
        raise ValueError("<|call|> after a message to no tool")
    said.channels.setdefault(header["channel"], []).append(body)
    return _next(text, end.end()) if end else len(text)


def _next(text: str, stop: int) -> int:
    """Behind a message only another one may stand."""
    rest = skip_space(text, stop)
    if rest < len(text) and not text.startswith(NEXT, rest):
        raise ValueError(f"no {NEXT} at character {rest}")
    return rest


GPT_OSS = Syntax(
    "gpt_oss",
    MARKERS,
    "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>",
    _render,
    _read,
)
