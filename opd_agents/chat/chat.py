"""Messages <-> token ids, token-exact: what was sampled is kept as ids and never re-made from text.

An episode's history is ``prompt_ids + action_ids + suffix_ids + action_ids + ...``. The suffix is what the
chat template renders between one assistant turn and the next, tokenised alone (``templates.py``). With
``history: template`` the whole conversation is rendered anew instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from opd_agents.chat.parsing import ParsedAction, parse_ids, with_forced
from opd_agents.chat.plain_text import BREAK, PlainText
from opd_agents.chat.reasoning import Thought
from opd_agents.chat.syntaxes import SYNTAXES, Syntax, detect_syntax, find_syntax
from opd_agents.chat.templates import CALLS, SAYS, Template, template_text
from opd_agents.chat.thinking_budget import ThinkingBudget
from opd_agents.envs.actions import BadAction, parse_action
from opd_agents.errors import ConfigError
from opd_agents.types import Message, Span, SpanKind, ToolCall, ToolSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat:
    """A tokenizer with its chat template, used the same way by student, teacher and trainer.

    ``template`` (Jinja text, or the path of a ``.jinja`` file) replaces the tokenizer's, ``kwargs`` are the
    template's variables (``today``, a date, stops its clock on that day), ``system`` replaces every
    environment's system prompt ("" removes it). ``history`` says how a rollout carries past turns on,
    ``syntax`` how calls are written: "auto" is what the template writes, ``thinking_budget`` after how many
    tokens a thought is closed. ``end_ids`` are the ids that end an
    action. Raises ConfigError for a tokenizer without a template and for a template that cannot carry a
    conversation, and for an unknown syntax.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
        history: Literal["append", "template"] = "append",
        syntax: str = "auto",
        thinking_budget: int | None = None,
        ends: Sequence[int | None] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template, self.template_given = template_text(tokenizer, template), template is not None
        self.kwargs = dict(kwargs or {})
        self.system, self.history = system, history
        self._template = Template(tokenizer, self.template, self.kwargs)
        self._unreadable = False  # calls as the template writes them
        self.syntax = self._find_syntax(syntax)
        if syntax == "auto":
            self._check_words()
        self._closing = self._first_special(self._template.close)
        self._call_closing = self._first_special(self._template.close_call)
        self._following = {role: self._first_special(rest) for role, rest in self._rests()}
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        written = {tokenizer.eos_token_id, self._closing, self._call_closing}
        # gpt-oss closes each message of an action as it closes a past turn: that ends no action
        written |= set(self._following.values()) - set(self._thoughtful_call())
        if written <= {None}:
            raise ConfigError(
                "The chat template closes an assistant turn with no special token and the tokenizer has no"
                " eos_token, so no action could end; set tokenizer.eos_token."
            )
        self.end_ids: frozenset[int] = frozenset(written - {None} | special.intersection(ends))
        self.thinking_budget = thinking_budget
        if thinking_budget is not None and self.thought is None:
            raise ConfigError(
                "chat.thinking_budget is given, but the chat template marks no thought; remove it, or give"
                " the template of a model that thinks as chat.template."
            )

    @property
    def thought(self) -> Thought | None:
        """How thoughts are marked; None where the template knows none."""
        return self._template.thought

    @cached_property
    def thinking(self) -> ThinkingBudget | None:
        """What closes the thoughts of samplers; None without a budget."""
        if self.thought is None or self.thinking_budget is None:
            return None
        close, vocabulary = self._encode(self.thought.closing), self.tokenizer.get_vocab()
        return ThinkingBudget(self.thought, self.thinking_budget, close, self._decode, vocabulary)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of template, kwargs, system, vocabulary: equal means same texts and ids of same meaning.

        Not of the tokenizer's eos_token, in which base and instruct models of one family differ: a teacher
        ends its actions, and reads the student's, by the student's ``end_ids``.
        """
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        data = [self.template, self.kwargs, self.system, vocabulary]
        return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the same chat again from the same tokenizer and template."""
        return {
            "kwargs": self.kwargs,
            "system": self.system,
            "history": self.history,
            "syntax": self.syntax.name,
            "thinking_budget": self.thinking_budget,
        }

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], system: str
    ) -> tuple[int, ...]:
        """All up to where the next action begins. ``messages``, which may hold past turns, hold no system
        message. Raises ConfigError where the template refuses or drops a message, and for ``tools`` whose
        calls the chat could not read."""
        return self.written_ids(self.opening(messages, system), tools)

    def opening(self, messages: Sequence[Message], system: str) -> list[Message]:
        """``messages`` behind the system prompt: the environment's ``system``, or the chat's own."""
        system = system if self.system is None else self.system
        return [*([Message("system", system)] if system else []), *messages]

    def written_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[int, ...]:
        """All ``messages`` as they are and the generation prompt; raises as :meth:`prompt_ids`."""
        self._check_readable(tools)
        plain = [self._plain.message(message) for message in messages]
        return self._encode(self._template.prompt(plain, [self._plain.tool(tool) for tool in tools]))

    def suffix_ids(
        self,
        messages: Sequence[Message],
        *,
        ended: bool,
        calls: Sequence[ToolCall] = (),
        end: int | None = None,
    ) -> tuple[int, ...]:
        """What follows an action: the rest of its turn, ``messages``, the next generation prompt.

        An action that ``ended`` holds its end token ``end`` already (default: the one that the template
        writes there); otherwise the suffix begins with the missing one, as context that the policy did not
        choose. ``calls`` are those of the action; a template that names the tool before its answer raises
        ConfigError without them, and every template for messages that it refuses or drops.
        """
        plain = [self._plain.message(message) for message in messages]
        ids = self._encode(self._template.rest(plain, [self._plain.call(call) for call in calls]))
        closes = bool(ids) and ids[0] in self._following.values()
        if not ended:
            return ids if closes else (self.end_of(calls), *ids)
        # Where turns are closed by the next role's opening, another end token does not stand for it.
        known = not self._roles_close or end is None or end == ids[0]
        return ids[1:] if closes and known else ids

    def parse(
        self,
        ids: Sequence[int],
        *,
        ended: bool,
        context_ids: Sequence[int] | None = None,
        tools: Sequence[ToolSpec] = (),
        forced: Sequence[tuple[int, int]] = (),
        text_only: bool = False,
    ) -> ParsedAction:
        """Read an action; never raises. What was cut off (``ended`` false) is never a call, nor what is
        thought; with ``text_only`` nothing is.

        ``context_ids`` are those before the action, whose end may open a thought (without them: as a
        generation prompt after a user's message does). ``tools`` help to read values; ``forced`` are ranges
        of ids that the policy did not choose.
        """
        body = list(ids[:-1] if ended and ids and ids[-1] in self.end_ids else ids)
        thought = self.thought
        opened = thought is not None and thought.opened
        if thought is not None and context_ids is not None:
            opened = thought.opens(self._decode(list(context_ids[-2 * len(thought.open) :])))
        parsed = parse_ids(
            body, self._decode, self.syntax, thought, tools, opened=opened, ended=ended, text_only=text_only
        )
        end = [Span(SpanKind.SPECIAL, len(body), len(ids))] if len(body) < len(ids) else []
        spans = with_forced((*parsed.spans, *end), forced)
        return dataclasses.replace(parsed, spans=tuple(spans))

    def encode_action(
        self, action: str, *, after: str = "user", tools: Sequence[ToolSpec] = (), text_only: bool = False
    ) -> tuple[int, ...]:
        """Canonical ids, with the end token, of an action: JSON call(s), else text. See encode_message."""
        try:
            calls = () if text_only else parse_action(action)
        except BadAction:
            calls = ()
        message = Message("assistant", "" if calls else action, calls)
        return self.encode_message(message, after=after, tools=tools)

    def encode_message(
        self, message: Message, *, after: str = "user", tools: Sequence[ToolSpec] = ()
    ) -> tuple[int, ...]:
        """Canonical ids of an assistant message, as the template writes it behind a generation prompt, with
        the end token.

        Calls that the template does not write so that they are read back stand there in the chat's syntax.
        ``after`` is the role of the message before, ``tools`` help to read values. Raises ConfigError where
        the template cannot write the turn.
        """
        calls, plain = message.tool_calls, self._plain.message(message)
        if not self._writes(message, tools):
            self._check_readable(calls)
            written = plain.content + self.syntax.render(plain.tool_calls)
            plain = dataclasses.replace(plain, content=written, tool_calls=())
        ids = self._encode(self._template.action(plain, after))
        if ends := self.end_ids.intersection(ids):
            raise ConfigError(
                f"An assistant turn holds {self._decode([min(ends)])!r}, which ends an action, before its"
                f" end, so it cannot be one action: {self._decode(list(ids))[:200]!r}."
            )
        return (*ids, self.end_of(calls))

    def read_message(
        self,
        ids: Sequence[int],
        *,
        ended: bool,
        context_ids: Sequence[int] | None = None,
        tools: Sequence[ToolSpec] = (),
        text_only: bool = False,
    ) -> Message:
        """An action as the message that a template renders: what was said, called and thought, apart.

        Calls that could not be read, and calls that the template cannot write, stay in the content as they
        are. No content holds special tokens, which would end turns or begin them when it is rendered.
        """
        parsed = self.parse(ids, ended=ended, context_ids=context_ids, tools=tools, text_only=text_only)
        message = Message("assistant", parsed.content, parsed.calls, reasoning=parsed.reasoning)
        if not self._writes(message, tools):
            message = dataclasses.replace(message, content=parsed.text, tool_calls=(), reasoning=None)
        return dataclasses.replace(message, content=self._special.sub("", message.content))

    def token_id(self, text: str) -> int:
        """The token whose text this is. Raises ConfigError where it is none, or several."""
        ids = self._encode(text)
        if len(ids) != 1 or (ids[0] == self.tokenizer.unk_token_id and text != self.tokenizer.unk_token):
            pieces = " ".join(repr(self.tokenizer.decode([token])) for token in ids)
            raise ConfigError(
                f"{text!r} is no single token of the student's tokenizer, which reads it as {pieces}: name"
                " one that is."
            )
        return ids[0]

    def spells_control(self, text: str) -> str | None:
        """The first control token, such as an end of turn, that ``text`` spells; None if it spells none."""
        return self._plain.spelled(text)

    def check_tools_shown(self, prompt_ids: Sequence[int], tools: Sequence[ToolSpec]) -> None:
        """Raise ConfigError if neither the template nor a text of the prompt tells the model of its tools."""
        if not tools or self._template.writes_calls:
            return
        prompt = self._decode(list(prompt_ids))
        if not any(tool.name in prompt for tool in tools):
            raise ConfigError(
                "The chat template knows no tools: it shows none to the model and writes no calls. Describe"
                f" {', '.join(tool.name for tool in tools)} and the syntax of a call ({self.syntax.form}) in"
                " chat.system, or give a template with tools as chat.template."
            )

    def cut(self, messages: Sequence[Message], max_tokens: int) -> tuple[Message, ...]:
        """``messages`` with at most ``max_tokens`` tokens of content, a mark for what is cut out counted.

        The middle of the longest goes first; of what is short enough nothing is changed.
        """
        if sum(len(message.content.encode(errors="surrogatepass")) for message in messages) <= max_tokens:
            return tuple(messages)  # no token is less than a byte
        ids = [self._encode(self._plain.broken(message.content)) for message in messages]
        left, contents = max_tokens, [message.content for message in messages]
        by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for place, index in enumerate(by_length):
            room = left // (len(ids) - place)
            if len(ids[index]) > room:
                contents[index] = self._cut_middle(ids[index], room)
            left -= min(room, len(ids[index]))
        return tuple(
            dataclasses.replace(message, content=content)
            for message, content in zip(messages, contents, strict=True)
        )

    def _find_syntax(self, name: str) -> Syntax:
        if name != "auto":
            return find_syntax(name)
        try:
            found = detect_syntax(self._template.action(CALLS), CALLS.tool_calls)
        except ConfigError:
            found = None
        # R1's template speaks of calls, but writes none; of LFM2's syntax only the tokenizer knows
        known = self.template + "\n".join(map(str, self.tokenizer.added_tokens_decoder.values()))
        named = (s for s in SYNTAXES.values() if s.markers and all(m in known for m in s.markers))
        found = found or next(named, None)
        self._unreadable = found is None and self._template.writes_calls
        return found or SYNTAXES["hermes"]

    def _check_words(self) -> None:
        """Refuse a template that writes more around an answer's words than can be read."""
        try:
            written = self._template.action(SAYS)
        except ConfigError:  # it writes no whole turn, so words are sampled only
            return
        thought = self.thought
        read = parse_ids(
            [*map(ord, written)], lambda ids: "".join(map(chr, ids)), self.syntax, thought,
            opened=thought is not None and thought.opened, ended=True,
        )  # fmt: skip
        if read.content.strip() != SAYS.content:
            raise ConfigError(
                f"Behind its generation prompt the chat template writes the answer {SAYS.content!r} as"
                f" {written!r}, whose frame would be taken for a part of the answer. Give a template that"
                " heeds add_generation_prompt and writes answers in a known way as chat.template."
            )

    def _check_readable(self, used: Sequence[ToolSpec | ToolCall]) -> None:
        if used and self._unreadable:
            raise ConfigError(
                "The chat template writes tool calls in a way that is not known here, so a model's calls"
                " would be taken for text. Give the model another syntax as chat.syntax, such as hermes, and"
                " describe it in chat.system; or give another template as chat.template."
            )

    def _writes(self, message: Message, tools: Sequence[ToolSpec]) -> bool:
        """Whether the template writes the calls of ``message`` so that they are read back."""
        if not message.tool_calls:
            return True
        try:
            written = self._template.action(message)
        except ConfigError:
            return False
        return self.syntax.parse(written, tools).calls == message.tool_calls

    def _rests(self) -> Iterator[tuple[str, str]]:
        """What follows an action where a user and where a tool answers, if the template takes that."""
        for role in ("user", "tool"):
            try:
                yield role, self._template.rest([Message(role, "-")], CALLS.tool_calls)
            except ConfigError:
                continue

    @cached_property
    def _roles_close(self) -> bool:
        """Whether what closes a turn is the opening of the next role."""
        following = set(self._following.values())
        return self._closing is None or (self._closing in following and len(following) > 1)

    def _thoughtful_call(self) -> tuple[int, ...]:
        try:
            return self._encode(self._template.action(dataclasses.replace(CALLS, reasoning="-")))
        except ConfigError:
            return ()

    @cached_property
    def _plain(self) -> PlainText:
        marked = (self.thought.open, self.thought.close) if self.thought else ()
        return PlainText(self.tokenizer, self.template, (*self.syntax.markers, *marked))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        tokens = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def _first_special(self, text: str) -> int | None:
        ids, added = self._encode(text), self.tokenizer.added_tokens_decoder
        if ids and (ids[0] == self.tokenizer.eos_token_id or (ids[0] in added and added[ids[0]].special)):
            return ids[0]
        return None

    def end_of(self, calls: Sequence[ToolCall]) -> int:
        """The token with which the template ends an action."""
        following = self._following.get("tool" if calls else "user")
        written = self._call_closing if calls else self._closing
        return next(i for i in (written, following, self.tokenizer.eos_token_id) if i is not None)

    def _cut_middle(self, ids: Sequence[int], room: int) -> str:
        def mark(n_cut: int) -> str:
            return f"\n[... {n_cut} tokens cut ...]\n"

        keep = max(0, room - len(self._encode(mark(len(ids)))))
        head, tail = list(ids[: (keep + 1) // 2]), list(ids[len(ids) - keep // 2 :])
        # a character may have been cut in two
        start, end = self._decode(head).rstrip("\ufffd"), self._decode(tail).lstrip("\ufffd")
        return start + mark(len(ids) - keep) + end

    def _encode(self, text: str) -> tuple[int, ...]:
        # The template writes BOS itself where the model wants one; the tokenizer must not add a second.
        pieces = (self.tokenizer.encode(piece, add_special_tokens=False) for piece in text.split(BREAK))
        return tuple(chain.from_iterable(pieces))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
