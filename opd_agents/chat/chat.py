"""Messages <-> token ids, token-exact: what was sampled is kept as ids and never re-made from text.

An episode's history is ``prompt_ids + action_ids + suffix_ids + action_ids + ...``. The suffix is what the
chat template renders between one assistant turn and the next: the template is run once around a sentinel, and
the text after the sentinel is tokenised alone.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from opd_agents.chat import hermes
from opd_agents.envs.actions import BadAction, format_calls, parse_action
from opd_agents.errors import ConfigError
from opd_agents.types import Message, Span, SpanKind, ToolCall, ToolSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "sentinel7f3a9c"
# What a template may transform in a message's content: outer space, JSON, markers, markup.
PROBE = ' \n{"k": "v\\n\'<&>"}</think><tool_response> é\n '
RESERVED = {"add_generation_prompt", "chat_template", "continue_final_message", "tokenize", "tools"}

# (role, tool call id) of each message: all that a frame depends on besides the contents
Shape = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """One action, read. ``spans`` partition its ids.

    ``text`` is what the policy wrote, without the end token. ``action`` is what the environment gets: JSON of
    one call or of a list of calls when they are valid, else the text as it is. With an ``error`` there are no
    calls.
    """

    text: str
    action: str
    calls: tuple[ToolCall, ...]
    error: str | None
    spans: tuple[Span, ...]


class Chat:
    """A tokenizer with its chat template, used the same way by student, teacher and trainer.

    ``template`` (Jinja text, or the path of a ``.jinja`` file) replaces the tokenizer's, ``kwargs`` are the
    template's variables, ``system`` replaces every environment's system prompt ("" removes it). ``end_ids``
    are the ids that end an action. Raises ConfigError for a tokenizer without a template and for a template
    that cannot carry a conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = _template_text(tokenizer, template)
        self.kwargs = dict(kwargs or {})
        self.system = system
        if reserved := RESERVED & self.kwargs.keys():
            raise ConfigError(
                f"chat.kwargs: {min(reserved)!r} is set by opd-agents; remove it. chat.kwargs holds the"
                " template's own variables, such as enable_thinking."
            )
        self._frame = lru_cache(maxsize=256)(self._make_frame)
        self._template_end = self._find_end()
        ends = {self._template_end, tokenizer.eos_token_id} - {None}
        if not ends:
            raise ConfigError(
                "The chat template closes an assistant turn with no special token and the tokenizer has no"
                " eos_token, so no action could end; set tokenizer.eos_token."
            )
        self.end_ids: frozenset[int] = frozenset(ends)
        self._end: int = tokenizer.eos_token_id if self._template_end is None else self._template_end

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of template, kwargs, system, vocabulary: equal means same texts and ids of same meaning."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        data = [self.template, self.kwargs, self.system, vocabulary, sorted(self.end_ids)]
        return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], system: str
    ) -> tuple[int, ...]:
        """The start, up to where the first action begins. ``messages`` hold no system message."""
        system = system if self.system is None else self.system
        opening = [Message("system", system)] if system else []
        return self._encode(self._render([*opening, *messages], tools))

    def suffix_ids(self, messages: Sequence[Message], *, ended: bool) -> tuple[int, ...]:
        """What follows an action: the rest of its turn, ``messages``, the next generation prompt.

        An action that ``ended`` holds its end token already; otherwise the suffix begins with the missing
        one, as context that the policy did not choose.
        """
        frame = self._frame(tuple((message.role, message.tool_call_id) for message in messages))
        if frame is None:
            text = self._suffix_text(messages)
        else:
            text = frame[0] + "".join(m.content + after for m, after in zip(messages, frame[1:], strict=True))
        ids = self._encode(text)
        rest = ids[1:] if ids[:1] == (self._template_end,) else ids
        return rest if ended else (self._end, *rest)

    def parse(self, ids: Sequence[int], *, ended: bool) -> ParsedAction:
        """Read an action; never raises. What was cut off (``ended`` false) is never a call."""
        body = list(ids[:-1] if ended and ids and ids[-1] in self.end_ids else ids)
        text = self._decode(body)
        found = hermes.parse(text)
        spans = tuple(self._spans(body, text, found.ranges, len(ids)))
        if found.ranges and not ended:
            # Bare JSON would run in the environment; the opening marker keeps it from being a whole call.
            action = hermes.OPEN + text if found.bare else text
            return ParsedAction(text, action, (), "Bad tool call: cut off by the token limit", spans)
        action = format_calls(found.calls) if found.calls and not found.bare else text
        return ParsedAction(text, action, found.calls, found.error, spans)

    def encode_action(self, action: str) -> tuple[int, ...]:
        """Canonical ids, with the end token, of an action: JSON call(s), else text."""
        try:
            text = hermes.render(parse_action(action)) or action
        except BadAction:
            text = action
        return (*self._encode(text), self._end)

    def _spans(
        self, body: list[int], text: str, ranges: Sequence[tuple[int, int]], n_ids: int
    ) -> Iterator[Span]:
        """Character ranges of calls as token ranges, with all other tokens, in order."""

        def length(n_tokens: int) -> int:
            # Decoding whole prefixes is right for every decoder: one token may be part of a character.
            return len(self._decode(body[:n_tokens]))

        tokens, cursor = range(len(body) + 1), 0
        for first, last in ranges:
            start = bisect_right(tokens, first, key=length) - 1 if first else 0
            stop = bisect_left(tokens, last, key=length) if last < len(text) else len(body)
            start = max(start, cursor)  # two blocks may share a token
            if start < stop:
                if cursor < start:
                    yield Span(SpanKind.TEXT, cursor, start)
                yield Span(SpanKind.CALL, start, stop)
                cursor = stop
        if cursor < len(body):
            yield Span(SpanKind.TEXT, cursor, len(body))
        if len(body) < n_ids:
            yield Span(SpanKind.SPECIAL, len(body), n_ids)

    def _find_end(self) -> int | None:
        """The special token that closes an assistant turn; None where the template writes none."""
        ids = self._encode(self._suffix_text([Message("user", "-")]))
        added = self.tokenizer.added_tokens_decoder
        if ids and (ids[0] == self.tokenizer.eos_token_id or (ids[0] in added and added[ids[0]].special)):
            return ids[0]
        return None

    def _make_frame(self, shape: Shape) -> tuple[str, ...] | None:
        """The suffix text around the messages' contents; None if the template changes contents."""

        def suffix(contents: Sequence[str]) -> str:
            pairs = zip(shape, contents, strict=True)
            return self._suffix_text([Message(role, text, tool_call_id=call) for (role, call), text in pairs])

        names = [f"{SENTINEL}-{i}-" for i in range(len(shape))]
        frame, rest = [], suffix(names)
        for name in names:
            before, _, rest = rest.partition(name)
            frame.append(before)
        frame.append(rest)
        probed = frame[0] + "".join(PROBE + after for after in frame[1:])
        return tuple(frame) if suffix([PROBE] * len(shape)) == probed else None

    def _suffix_text(self, messages: Sequence[Message]) -> str:
        text = self._render([Message("user", "-"), Message("assistant", SENTINEL), *messages], ())
        _, found, suffix = text.partition(SENTINEL)
        if not found:
            raise ConfigError(
                "The chat template drops or changes the content of an assistant turn, so histories cannot be"
                " token-exact; give another one as chat.template."
            )
        return suffix

    def _render(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [_message_dict(message) for message in messages],
                tools=[_tool_dict(tool) for tool in tools] or None,
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
                **self.kwargs,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise ConfigError(
                f"The chat template cannot render messages with the roles {roles} ({error})."
                " Give one that can as chat.template."
            ) from error
        return str(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        # The template writes BOS itself where the model wants one; the tokenizer must not add a second.
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def compact_template() -> str:
    """The project's own chat template (``compact.jinja``): ChatML in few tokens, Hermes-style tool calls."""
    return (resources.files("opd_agents.chat") / "compact.jinja").read_text(encoding="utf-8")


def _template_text(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    if template is not None and template.endswith(".jinja"):
        if not Path(template).is_file():
            raise ConfigError(f"chat.template: there is no file {template!r}.")
        return Path(template).read_text(encoding="utf-8")
    if template is None and not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template. Use the model's instruct"
            " version, or give a template (Jinja text or a .jinja file) as chat.template."
        )
    return str(tokenizer.get_chat_template(template))


def _message_dict(message: Message) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        data["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        data["tool_call_id"] = message.tool_call_id
    return data


def _tool_dict(tool: ToolSpec) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
    }
