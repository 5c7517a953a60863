"""Thought: how a chat marks it, and where it stands in an action.

A form is a pair of markers. That a template speaks it is found by rendering, never from a model's name: the
template writes a message's reasoning between the markers, or opens a thought in its generation prompt, or
takes one out of an earlier turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from opd_agents.chat.syntaxes.base import skip_space
from opd_agents.messages import REASONING

FORMS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek R1, GLM-4.5, Nemotron, LFM2
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    (" to=self<|message|>", "<|eom|>"),  # Muse
)
REASON, ANSWER = "reason5b1e0d", "answer5b1e0d"
USER = {"role": "user", "content": "-"}
CALL = {"type": "function", "function": {"name": "probe", "arguments": {}}}
FIELDS = dict.fromkeys(REASONING, REASON)

# (messages, whether with a generation prompt) -> text, as the chat's template renders them
Render = Callable[[list[dict[str, Any]], bool], str]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Thought:
    """How one chat marks thought: between ``open`` and ``close``.

    ``closing`` is what the template writes from the end of a thought to where the model goes on. ``opened``:
    the generation prompt after a user's message ends inside a thought. ``only``: ``close`` ends nothing else.
    """

    open: str
    close: str
    closing: str
    opened: bool
    only: bool

    def opens(self, context: str) -> bool:
        """Whether what is written after ``context`` begins inside a thought."""
        return context.rstrip().endswith(self.open)


@dataclass(frozen=True, slots=True)
class Reading:
    """The thoughts of an action's text, as character ranges with their markers, and the rest as the ranges
    that are ``kept``. ``closed`` is false if the text ends inside a thought."""

    text: str
    thoughts: tuple[Range, ...]
    kept: tuple[Range, ...]
    closed: bool

    @property
    def rest(self) -> str:
        """What is no thought."""
        return "".join(self.text[start:stop] for start, stop in self.kept)

    def place(self, start: int, stop: int) -> Range:
        """A range of the ``rest`` as one of the text; it is longer there where a thought cuts it in two."""
        begin = end = passed = 0
        for first, last in self.kept:
            shift, passed = first - passed, passed + last - first
            if first <= start + shift < last:
                begin = start + shift
            if first < stop + shift <= last:
                end = stop + shift
        return begin, end


def find_thought(render: Render) -> Thought | None:
    """The form that the template behind ``render`` speaks; None for one that does not think."""
    plain, prompt = _tried(render, [USER]), _tried(render, [USER], True)
    generation = prompt.removeprefix(plain)
    for opening, close in FORMS:
        written = _written(render, opening, close)
        if written is None and opening not in generation and not _strips(render, opening, close):
            continue
        if written is None:  # history without thoughts: nothing shows how one ends
            written = f"\n{close}\n\n" if generation.endswith(f"{opening}\n") else close
        closing = _through(written, close)
        if generation and written.startswith(generation, len(closing)):
            closing += generation
        return Thought(
            opening, close, closing, prompt.rstrip().endswith(opening),
            _ends_thought_only(render, opening, close),
        )  # fmt: skip
    return None


def read(text: str, thought: Thought | None, *, opened: bool) -> Reading:
    """Where an action's text is thought. With ``opened`` it begins inside one.

    A closing marker without its opening one ends a thought that began where the last one ended: what may be
    thought is never taken for an action.
    """
    if thought is None:
        return Reading(text, (), ((0, len(text)),), True)
    thoughts: list[Range] = []
    cursor, inside, closed = 0, opened, True
    while closed:
        opening, closing = text.find(thought.open, cursor), text.find(thought.close, cursor)
        lone = thought.only and closing >= 0 and (opening < 0 or closing < opening)
        start = cursor if inside or lone else opening
        if start < 0:
            break
        stop = text.find(thought.close, start)
        inside, closed = False, stop >= 0
        cursor = stop + len(thought.close) if closed else len(text)
        thoughts.append((start, cursor))
    return Reading(text, tuple(thoughts), _kept(text, thoughts, thought), closed)


def read_leading(text: str, thought: Thought, *, opened: bool) -> Reading:
    """As :func:`read`, but only the whole thoughts before anything else; other markers are text."""
    whole = read(text, thought, opened=opened)
    leading: list[Range] = []
    for start, stop in whole.thoughts:
        whole_thought = text.startswith(thought.open, start) or (opened and start == 0)
        if not whole_thought or text[leading[-1][1] if leading else 0 : start].strip():
            break
        leading.append((start, stop))
    closed = whole.closed or len(leading) < len(whole.thoughts)
    return Reading(text, tuple(leading), _kept(text, leading, thought), closed)


def reasoning(reading: Reading, thought: Thought | None) -> str | None:
    """The thoughts' text without markers; None where there is no thought."""
    if thought is None or not reading.thoughts:
        return None
    texts = (reading.text[start:stop] for start, stop in reading.thoughts)
    inner = (text.removeprefix(thought.open).removesuffix(thought.close).strip() for text in texts)
    return "\n\n".join(filter(None, inner))


def _kept(text: str, thoughts: Sequence[Range], thought: Thought) -> tuple[Range, ...]:
    """What is no thought, nor the space and the header after one."""
    header = thought.closing.partition(thought.close)[2].strip()
    kept: list[Range] = []
    cursor = 0
    for start, stop in (*thoughts, (len(text), len(text))):
        kept.append((cursor, start))
        cursor = skip_space(text, stop)
        if header and text.startswith(header, cursor):
            cursor += len(header)
    return tuple((start, stop) for start, stop in kept if start < stop)


def _written(render: Render, opening: str, close: str) -> str | None:
    """What follows the reasoning of a message that the template writes in this form, up to the answer."""
    text = {"type": "text", "text": ANSWER}
    inner = [{"type": "text", "text": REASON}]
    for message in (
        {"content": ANSWER, **FIELDS},
        {"content": "", "tool_calls": [CALL], **FIELDS},
        {"content": [{"type": "thinking", "thinking": REASON}, text]},
        {"content": [{"type": "thinking", "thinking": inner}, text]},
    ):
        before, found, after = _tried(render, [USER, {"role": "assistant", **message}]).partition(REASON)
        if found and before.rstrip().endswith(opening) and after.lstrip().startswith(close):
            return after.partition(ANSWER)[0] if ANSWER in after else _through(after, close)
    return None


def _through(after: str, close: str) -> str:
    """Of what a template writes after a thought, all up to the closing marker and the space behind it."""
    return after[: skip_space(after, after.index(close) + len(close))]


def _strips(render: Render, opening: str, close: str) -> bool:
    """Whether the template takes a thought out of an earlier turn's content."""
    answer = {"role": "assistant", "content": f"{opening}\n{REASON}\n{close}\n{ANSWER}"}
    text = _tried(render, [USER, answer, USER])
    return ANSWER in text and REASON not in text


def _ends_thought_only(render: Render, opening: str, close: str) -> bool:
    """Whether turns without thought, of text or of two calls, are written without the closing marker."""
    turns = ({"content": ANSWER}, {"content": "", "tool_calls": [CALL, CALL]})
    texts = [_tried(render, [USER, {"role": "assistant", **turn}, USER]) for turn in turns]
    return all(text.count(close) <= text.count(opening) for text in texts)


def _tried(render: Render, messages: list[dict[str, Any]], generation: bool = False) -> str:
    try:
        return render(messages, generation)
    # A template may refuse what it does not know, or trip over it.
    except (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError):
        return ""
