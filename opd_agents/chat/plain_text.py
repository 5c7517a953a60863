"""What messages say stays text: no content ever becomes the tokens that a template's own markers are.

A template joins contents and markers to one text, in which a tokenizer cannot tell the ``<|im_end|>`` of a
web page from the template's. So a control token that a content spells is broken behind its first character,
by a mark, before the template is rendered, and the pieces between the marks are encoded one by one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from opd_agents.types import Message, ToolCall, ToolSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "break6d2f48"  # no end of it is a beginning of it, so that a content that holds it is broken, too

_HALF = re.compile("[\ud800-\udfff]")


class PlainText:
    """Breaks what must not become control tokens of ``tokenizer``.

    These are its special tokens, and those other added tokens that the ``template`` writes, except ``own``:
    the markers of an assistant's calls and thoughts. They begin no turn, are read in actions alone, and hints
    to a model spell them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, own: Iterable[str]) -> None:
        self._tokenizer, self._normalised = tokenizer, False  # whether one is found in normalised text only
        spared, firsts = frozenset(own), dict[str, list[str]]()
        for token in tokenizer.added_tokens_decoder.values():
            text = token.content
            written = text.strip() == text and text in template and text not in spared
            if (token.special or written) and len(text) > 1:
                self._normalised |= token.normalized
                firsts.setdefault(text[0], []).append(re.escape(text[1:]))
        firsts.setdefault(BREAK[0], []).append(BREAK[1:])
        # in two parts, because one token may begin inside another
        self._spelled = re.compile(
            "|".join(f"{re.escape(first)}(?=({'|'.join(rests)}))" for first, rests in firsts.items())
        )

    def broken(self, text: str) -> str:
        """``text`` with the mark in every control token that it spells.

        Half a character, of which models write the escapes and which no tokenizer takes, becomes U+FFFD.
        """
        text = _HALF.sub("\ufffd", text)
        if self._normalised and self._spelled.search(normal := self._normal(text)):
            text = normal  # of which the tokenizer would make a control token
        return self._spelled.sub(lambda first: first[0] + BREAK, text)

    def spelled(self, text: str) -> str | None:
        """The first control token that ``text`` spells, if it spells one."""
        found = self._spelled.search(text)
        return found and found[0] + str(found[found.lastindex or 0])

    def message(self, message: Message) -> Message:
        """The same in all that a message holds."""
        return dataclasses.replace(
            message,
            content=self.broken(message.content),
            reasoning=None if message.reasoning is None else self.broken(message.reasoning),
            tool_calls=tuple(map(self.call, message.tool_calls)),
        )

    def call(self, call: ToolCall) -> ToolCall:
        return ToolCall(self.broken(call.name), self._json(call.arguments))

    def tool(self, tool: ToolSpec) -> ToolSpec:
        return ToolSpec(self.broken(tool.name), self.broken(tool.description), self._json(tool.parameters))

    def _normal(self, text: str) -> str:
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def _json(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.broken(value)
        if isinstance(value, Mapping):
            return {self._json(key): self._json(item) for key, item in value.items()}
        return [self._json(item) for item in value] if isinstance(value, list | tuple) else value
