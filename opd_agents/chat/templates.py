"""A tokenizer's chat template as functions from messages to text.

An episode's text is ``prompt + action + rest + action + rest + ...``: the prompt ends with the generation
prompt, an action is what the template writes from there to the end of the assistant's turn, and the rest is
the end of that turn, the answers, and the next generation prompt. The rest is found by rendering a sentinel
in the assistant's place, so that it never depends on how the template would write the action itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from opd_agents.chat.reasoning import Thought, find_thought, read_leading
from opd_agents.errors import ConfigError
from opd_agents.types import Message, ToolCall, ToolSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL, MARK = "sentinel7f3a9c", "mark3d81b2"
FIRST = Message("user", "-")
SAYS = Message("assistant", SENTINEL)
CALLS = Message("assistant", "", (ToolCall("get_weather", {"city": SENTINEL, "days": 2}),))
ROLES = ("system", "user", "assistant", "tool")
RESERVED = {"add_generation_prompt", "chat_template", "continue_final_message", "tokenize", "tools"}
# The clock of a template stands still, unless chat.kwargs.today says another day: no run depends on its day.
TODAY = "2025-01-01"
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True, slots=True)
class Form:
    """What templates want differently of an assistant message with calls."""

    json_arguments: bool = False  # the arguments as JSON text, not as a mapping
    one_text: bool = False  # what is said and what is thought are one text


class Template:
    """A chat template (Jinja ``text``) of ``tokenizer`` with the variables ``kwargs``; texts only, no ids.

    Raises ConfigError for a template that cannot carry a conversation; so do all its methods for messages
    that it refuses, drops or cannot write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, kwargs: Mapping[str, Any]) -> None:
        if reserved := RESERVED & kwargs.keys():
            raise ConfigError(
                f"chat.kwargs: {min(reserved)!r} is set by opd-agents; remove it. chat.kwargs holds the"
                " template's own variables, such as enable_thinking."
            )
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs)
        self.text = _on_day(str(self.kwargs.get("today", TODAY)), text)
        self._carried: set[tuple[str, ...]] = set()
        self._form = Form()
        self.rest([FIRST])
        self._form = self._find_form()

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> str:
        """All ``messages`` and the generation prompt."""
        place = "tools" if tools else "no tools"
        self._check_carried(place, messages, lambda marked: self._render(marked, tools))
        return self._render(messages, tools)

    def rest(self, messages: Sequence[Message], calls: Sequence[ToolCall] = ()) -> str:
        """What follows an action: the end of its turn, ``messages``, the next generation prompt.

        ``calls`` are those of the action: some templates name the tool before its answer.
        """
        before = SAYS
        if (
            messages
            and messages[0].role == "tool"
            and (self.answers_name_call or self.close_call != self.close)
        ):
            if not calls:
                raise ConfigError(
                    "This chat template names the tool before its answer, or closes a call in a way of its"
                    " own, but no call is known."
                )
            before = Message("assistant", "", (ToolCall(calls[0].name, {"text": SENTINEL}),))
        self._check_carried("rest", messages, lambda marked: self._rest(before, marked))
        return self._rest(before, messages)

    def action(self, message: Message, after: str = "user") -> str:
        """What the template writes for an assistant ``message`` that ends a conversation, from the generation
        prompt, which stands after a message of the role ``after``, to where the turn is closed."""
        written = self._last(message)
        if message.reasoning and not written.startswith(self._start):
            # the generation prompt holds a closed, empty thought
            written = self._last(dataclasses.replace(message, reasoning=None))
        written = written.removesuffix(self.close_call if message.tool_calls else self.close)
        if written.startswith(self._start):
            return written[len(self._start) :]
        thought, header = self.thought, ""
        if thought and thought.opened:
            header = self._start.rstrip().removesuffix(thought.open)
        if thought and header and written.startswith(header):
            # The prompt opens a thought, and the turn is written without one, or with an empty one.
            opened = thought.opens(self.rest([Message(after, "-")], CALLS.tool_calls))
            closed = (message.reasoning or "") + thought.closing if opened else ""
            return closed + read_leading(written[len(header) :], thought, opened=False).rest
        raise ConfigError(
            "The chat template writes an assistant turn otherwise than its generation prompt begins one, so"
            " actions that were not sampled cannot be encoded; give another one as chat.template."
        )

    @cached_property
    def close(self) -> str:
        """What closes a conversation's last assistant turn; empty where only the next role's opening does."""
        return self._last(SAYS).partition(SENTINEL)[2]

    @cached_property
    def close_call(self) -> str:
        """The same for a turn with calls."""
        try:
            written = self._last(CALLS)
        except ConfigError:
            return self.close
        if written.endswith(self.close):
            return self.close
        after = written.rpartition(SENTINEL)[2]
        # not all_special_tokens: a tokenizer may name few of those that it has
        special = (t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)
        starts = [after.rfind(token) for token in special if token in after]
        return after[max(starts) :] if starts else self.close

    @cached_property
    def answers_name_call(self) -> bool:
        """Whether tool messages are refused unless they follow a call, whose name they repeat."""
        tool = Message("tool", "-")
        return not self._accepts([FIRST, SAYS, tool]) and self._accepts([FIRST, CALLS, tool])

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the template renders an assistant's calls at all."""
        return self._shows_call(self._form)

    @cached_property
    def thought(self) -> Thought | None:
        """How thoughts are marked; None where the template knows none."""
        return find_thought(lambda messages, generate: self._apply(messages, generate=generate))

    @cached_property
    def _start(self) -> str:
        return self._render([FIRST])

    def _last(self, message: Message) -> str:
        return self._render([FIRST, message], generate=False)

    def _rest(self, before: Message, messages: Sequence[Message]) -> str:
        _, found, rest = self._render([FIRST, before, *messages]).partition(SENTINEL)
        if not found:
            raise ConfigError(
                "The chat template drops or changes the content of an assistant turn, so histories cannot be"
                " token-exact; give another one as chat.template."
            )
        if not before.tool_calls:
            return rest
        # behind a sentinel in a call stands the end of its JSON, which belongs to the action
        start = rest.find(self.close_call)
        if start < 0:
            raise ConfigError(
                f"The chat template closes a call with {self.close_call!r}, but not where its answer follows;"
                " give another one as chat.template."
            )
        return rest[start:]

    def _check_carried(
        self, place: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]
    ) -> None:
        """Refuse, once for each sequence of roles, a template that leaves out what it is given."""
        key = (place, *(message.role for message in messages))
        if key in self._carried:
            return
        marks = [f"{MARK}-{number}-" for number in range(len(messages))]
        text = render(
            [
                message if message.role == "assistant" else dataclasses.replace(message, content=mark)
                for message, mark in zip(messages, marks, strict=True)
            ]
        )
        for message, mark in zip(messages, marks, strict=True):
            if message.role != "assistant" and mark not in text:
                raise ConfigError(
                    f"The chat template drops a {message.role} message of a conversation with the roles"
                    f" {', '.join(m.role for m in messages)}; give one that shows it as chat.template."
                )
        self._carried.add(key)

    def _find_form(self) -> Form:
        form = next(filter(self._shows_call, (Form(), Form(json_arguments=True))), Form())
        self._form = form
        both = dataclasses.replace(CALLS, content="-", reasoning="-")
        one_text = self._shows_call(form) and not self._accepts([FIRST, both])
        return dataclasses.replace(form, one_text=one_text)

    def _shows_call(self, form: Form) -> bool:
        self._form, kept = form, self._form
        try:
            text = self._last(CALLS)
        except ConfigError:
            return False
        finally:
            self._form = kept
        return CALLS.tool_calls[0].name in text and SENTINEL in text

    def _accepts(self, messages: Sequence[Message]) -> bool:
        try:
            self._render(messages)
        except ConfigError:
            return False
        return True

    def _render(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generate: bool = True
    ) -> str:
        roles = ", ".join(message.role for message in messages)
        if unknown := {message.role for message in messages} - set(ROLES):
            raise ConfigError(f"Unknown role {min(unknown)!r} among {roles}: roles are {', '.join(ROLES)}.")
        try:
            return self._apply([self._message(message) for message in messages], tools, generate=generate)
        # Templates refuse by an exception of their own, or trip over what they did not expect.
        except (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"The chat template cannot render messages with the roles {roles} ({error})."
                " Give one that can as chat.template."
            ) from error

    def _apply(
        self, messages: list[dict[str, Any]], tools: Sequence[ToolSpec] = (), *, generate: bool
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=[_tool(tool) for tool in tools] or None,
                chat_template=self.text,
                add_generation_prompt=generate,
                tokenize=False,
                **self.kwargs,
            )
        )

    def _message(self, message: Message) -> dict[str, Any]:
        content, reasoning, form = message.content, message.reasoning, self._form
        calls = None
        if message.tool_calls:
            if form.one_text and content and reasoning:
                content, reasoning = "", f"{reasoning}\n{content}"
            calls = [
                {"type": "function", "function": {"name": call.name, "arguments": self._arguments(call)}}
                for call in message.tool_calls
            ]
        data: dict[str, Any] = {"role": message.role, "content": content}
        if calls:  # some templates look only whether the key is there
            data["tool_calls"] = calls
        if reasoning is not None:
            data |= {"reasoning_content": reasoning, "thinking": reasoning}  # by Qwen and GLM; by gpt-oss
        if message.tool_call_id is not None:
            data["tool_call_id"] = message.tool_call_id
        return data

    def _arguments(self, call: ToolCall) -> Any:
        arguments = dict(call.arguments)
        return json.dumps(arguments, ensure_ascii=False) if self._form.json_arguments else arguments


def compact_template() -> str:
    """The project's own chat template (``compact.jinja``): ChatML in few tokens, Hermes-style tool calls."""
    return (resources.files("opd_agents.chat") / "compact.jinja").read_text(encoding="utf-8")


def template_text(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The Jinja text of ``template``: text, the path of a ``.jinja`` file, or the tokenizer's own (None)."""
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


def _tool(tool: ToolSpec) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
    }


def _on_day(day: str, template: str) -> str:
    """``template`` with the readings of its clock replaced by those of one day."""
    try:
        moment = datetime.datetime.fromisoformat(day)
    except ValueError:
        raise ConfigError(f"chat.kwargs.today: {day!r} is no date such as {TODAY}.") from None
    return _CLOCK.sub(lambda reading: json.dumps(moment.strftime(reading[2])), template)
