"""Reading an action: what of it is thought, what calls, what text, in characters and in tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from opd_agents.chat.reasoning import Range, Reading, Thought, read, read_leading, reasoning
from opd_agents.chat.syntaxes import Found, Syntax, bad
from opd_agents.envs.actions import refuse
from opd_agents.types import Span, SpanKind, ToolCall, ToolSpec

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """One action, read. ``spans`` partition its ids.

    ``text`` is what the policy wrote, without the end token; ``reasoning`` its thoughts without markers, None
    if there are none. ``action`` is what the environment gets, never a thought: JSON of one call or of a list
    of calls when they are valid, else the text to the user; what could not be read, every environment
    refuses. With an ``error`` there are no calls. ``content`` is what is neither thought nor a call that was
    read.
    """

    text: str
    action: str
    calls: tuple[ToolCall, ...]
    error: str | None
    spans: tuple[Span, ...]
    reasoning: str | None = None
    content: str = ""


def parse_ids(
    body: list[int],
    decode: Decode,
    syntax: Syntax,
    thought: Thought | None,
    tools: Sequence[ToolSpec] = (),
    *,
    opened: bool,
    ended: bool,
    text_only: bool = False,
) -> ParsedAction:
    """Read the ids of an action without its end token; never raises. ``opened``: it begins inside a thought.

    What was cut off (``ended`` false) is never a call, nor is anything of an action that ends inside a
    thought. With ``text_only`` nothing is: all that is no thought is the text, whatever it looks like.
    """
    text = decode(body)
    reading, found = _read(text, thought, syntax, tools, opened=opened)
    if text_only:
        found = Found((), (), None, content=reading.rest if found.content is None else found.content)
    calls = [reading.place(*block) for block in found.ranges]
    if any(b - a != d - c for (a, b), (c, d) in zip(found.ranges, calls, strict=True)):
        calls, found = [], bad("a thought stands inside it", *found.ranges)
    elif found.ranges and not ended:
        found = bad("cut off by the token limit", *found.ranges)
    marked = [(SpanKind.THINK, *place) for place in reading.thoughts]
    marked += [(SpanKind.CALL, *place) for place in calls]
    spans = tuple(_spans(body, len(text), decode, sorted(marked, key=lambda mark: mark[1:])))
    thoughts = reasoning(reading, thought)
    if not reading.closed:
        how = "ended" if ended else "cut off by the token limit"
        problem = f"Bad action: {how} inside a thought"
        action = "" if text_only else refuse("", problem)
        return ParsedAction(text, action, (), problem, spans, thoughts)
    content = found.content
    if content is None:
        content = "".join(_between(reading.rest, found.ranges if found.calls else ()))
        content = content.strip() if found.calls or thoughts is not None else content
    if text_only:
        action = content = content if thoughts is None else content.strip()
    else:
        action = syntax.action(reading.rest, found)
    return ParsedAction(text, action, found.calls, found.error, spans, thoughts, content)


def with_forced(spans: Sequence[Span], forced: Sequence[Range]) -> Iterator[Span]:
    """The ``spans`` with the token ranges ``forced`` cut out of them as spans of their own."""
    for span in spans:
        cursor = span.start
        for start, stop in forced:
            start, stop = max(start, cursor), min(stop, span.stop)
            if start < stop:
                if cursor < start:
                    yield Span(span.kind, cursor, start)
                yield Span(SpanKind.FORCED, start, stop)
                cursor = stop
        if cursor < span.stop:
            yield Span(span.kind, cursor, span.stop)


def _read(
    text: str, thought: Thought | None, syntax: Syntax, tools: Sequence[ToolSpec], *, opened: bool
) -> tuple[Reading, Found]:
    """The thoughts, and the calls of what is none. A marker that stands inside a valid call, after nothing
    but thoughts and text without markers, belongs to its arguments."""
    whole = read(text, thought, opened=opened)
    if thought is not None:
        leading = read_leading(text, thought, opened=opened)
        if leading.thoughts != whole.thoughts:
            found = syntax.parse(leading.rest, tools)
            beside = "\n".join(_between(leading.rest, found.ranges))
            if found.calls and not read(beside, thought, opened=False).thoughts:
                return leading, found
    return whole, syntax.parse(whole.rest, tools)


def _between(text: str, ranges: Sequence[Range]) -> Iterator[str]:
    cursor = 0
    for start, stop in ranges:
        yield text[cursor:start]
        cursor = stop
    yield text[cursor:]


def _spans(
    body: list[int], n_characters: int, decode: Decode, marked: Sequence[tuple[SpanKind, int, int]]
) -> Iterator[Span]:
    """Character ranges as token ranges, with all other tokens as text, in order."""

    def length(n_tokens: int) -> int:
        # Decoding whole prefixes is right for every decoder: one token may be part of a character.
        return len(decode(body[:n_tokens]))

    tokens, cursor = range(len(body) + 1), 0
    for kind, first, last in marked:
        start = bisect_right(tokens, first, key=length) - 1 if first else 0
        stop = bisect_left(tokens, last, key=length) if last < n_characters else len(body)
        start = max(start, cursor)  # two blocks may share a token
        if start < stop:
            if cursor < start:
                yield Span(SpanKind.TEXT, cursor, start)
            yield Span(kind, start, stop)
            cursor = stop
    if cursor < len(body):
        yield Span(SpanKind.TEXT, cursor, len(body))
