"""Chat messages as people store them (OpenAI's and TRL's formats) -> conversations, strictly read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opd_agents.errors import DataError
from opd_agents.rows import shown
from opd_agents.types import Message, ToolCall, ToolSpec, to_dict

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
REASONING = ("reasoning_content", "reasoning", "thinking")  # one name per family of models
Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One recorded episode. ``messages`` begin with the user's and hold no system message; ``trained`` says
    of each whether it is an assistant's that is learned from."""

    system: str
    tools: tuple[ToolSpec, ...]
    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    success: bool = True
    reward: float = 1.0
    id: str | None = None

    def actions(self) -> list[int]:
        """The places of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message.role == "assistant"]


def read_conversation(row: Row, where: str) -> Conversation:
    """The conversation of one row.

    Fields: ``messages``, or ``prompt`` and ``completion`` (lists of messages; the completion alone is
    learned from); optionally ``tools`` (a list, or its JSON), ``success`` (true, false or 0 to 1),
    ``reward``, ``id``. A row without ``success`` and ``reward`` counts as a success. An assistant's
    ``weight: 0`` takes it out of the loss. Raises DataError, which names file and row (``where``) and field.
    """
    if row.get("chat_template_kwargs"):
        raise DataError(f"{where}: `chat_template_kwargs` cannot differ by row; set chat.kwargs for the run.")
    given, first_trained, name = _given(row, where)
    places = [f"{where}, {name(i)}" for i in range(len(given))]
    read = [_message(item, place) for item, place in zip(given, places, strict=True)]
    _check_order(given, read, places)
    opening = int(read[0].role == "system")
    trained = tuple(
        i >= first_trained and message.role == "assistant" and _weight(given[i], places[i])
        for i, message in enumerate(read)
    )
    if not any(trained):
        raise DataError(f"{where}: no assistant message to learn from; add one, or leave the row out.")
    success, reward = _verdict(row, where)
    return Conversation(
        system=read[0].content if opening else "",
        tools=_tools(row.get("tools"), f"{where}, tools"),
        messages=tuple(read[opening:]),
        trained=trained[opening:],
        success=success,
        reward=reward,
        id=None if row.get("id") is None else str(row["id"]),
    )


def to_row(conversation: Conversation) -> dict[str, Any]:
    """The conversation in OpenAI's format; reading it gives an equal conversation, but for ids of calls."""
    opening = [{"role": "system", "content": conversation.system}] if conversation.system else []
    rows: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for place, (message, trained) in enumerate(zip(conversation.messages, conversation.trained, strict=True)):
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            row["tool_call_id"] = open_calls.pop(0)
        if message.reasoning is not None:
            row["reasoning_content"] = message.reasoning
        if message.tool_calls:
            open_calls = [f"call_{place}_{number}" for number in range(len(message.tool_calls))]
            row["tool_calls"] = [
                {"id": id_, "type": "function", "function": {"name": c.name, "arguments": _json(c.arguments)}}
                for id_, c in zip(open_calls, message.tool_calls, strict=True)
            ]
        if message.role == "assistant" and not trained:
            row["weight"] = 0
        rows.append(row)
    tools = [{"type": "function", "function": to_dict(tool)} for tool in conversation.tools]
    row = {"id": conversation.id, "messages": opening + rows} | ({"tools": tools} if tools else {})
    return row | {"success": conversation.success, "reward": conversation.reward}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), ensure_ascii=False)


def _given(row: Row, where: str) -> tuple[list[Any], int, Any]:
    """The row's messages, the first that may be learned from, and the name of the i-th for a person."""
    lists = {key: row[key] for key in ("messages", "prompt", "completion") if row.get(key) is not None}
    for key, value in lists.items():
        if not isinstance(value, list) or not value:
            raise DataError(f"{where}: `{key}` is {shown(value)}; it must be a list of messages with roles.")
    if "messages" in lists:
        return lists["messages"], 0, lambda i: f"messages[{i}]"
    if {"prompt", "completion"} <= lists.keys():
        n = len(lists["prompt"])
        both = [*lists["prompt"], *lists["completion"]]
        return both, n, lambda i: f"prompt[{i}]" if i < n else f"completion[{i - n}]"
    found = ", ".join(row) or "nothing"
    raise DataError(f"{where}: no field `messages` (nor `prompt` and `completion`); the row has {found}.")


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or "role" not in item:
        raise DataError(f"{where}: {shown(item)} is no message; it needs `role` and `content`.")
    role = ROLES.get(item["role"]) if isinstance(item["role"], str) else None
    if role is None:
        raise DataError(f"{where}.role: unknown role {shown(item['role'])}; there are {', '.join(ROLES)}.")
    calls = _calls(item.get("tool_calls"), f"{where}.tool_calls")
    if calls and role != "assistant":
        raise DataError(f"{where}.tool_calls: only an assistant calls tools, this is a message of {role}.")
    if item.get("function_call") or item.get("audio"):
        raise DataError(f"{where}: `function_call` and `audio` are not read; write calls as `tool_calls`.")
    content = _content(item.get("content"), f"{where}.content")
    if not calls and (content is None or (role == "assistant" and not content)):
        besides = " and no tool call either" if role == "assistant" else ""
        raise DataError(f"{where}.content: there is none{besides}.")
    thoughts = [item[key] for key in REASONING if item.get(key)]
    if any(not isinstance(thought, str) for thought in thoughts) or (thoughts and role != "assistant"):
        raise DataError(f"{where}: reasoning must be text, of an assistant.")
    answers = item.get("tool_call_id") if role == "tool" else None
    return Message(
        role, content or "", calls, None if answers is None else str(answers),
        reasoning=thoughts[0] if thoughts else None,
    )  # fmt: skip


def _content(value: Any, where: str) -> str | None:
    """Text, or OpenAI's list of text parts; None where there is none."""
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if all(
        isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    ):
        return "".join(part["text"] for part in parts)
    raise DataError(f"{where}: {shown(value)} is neither text nor a list of parts of type text.")


def _calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{where}: {shown(value)} is no list of calls.")
    return tuple(_call(item, f"{where}[{i}]") for i, item in enumerate(value))


def _call(item: Any, where: str) -> ToolCall:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f'{where}: {shown(item)} is no call; write {{"function": {{"name", "arguments"}}}}.')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, f"{where}.function.arguments")
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}.function.arguments: {shown(arguments)} is no JSON object; none is {{}}.")
    return ToolCall(function["name"], arguments)


def _tools(value: Any, where: str) -> tuple[ToolSpec, ...]:
    """Tools as a list, or as its JSON, which keeps a table of many schemas simple."""
    if isinstance(value, str) and value:
        value = _loads(value, where)
    if value in (None, ""):
        return ()
    if not isinstance(value, list):
        raise DataError(f"{where}: {shown(value)} is no list of tools.")
    return tuple(_tool(item, f"{where}[{i}]") for i, item in enumerate(value))


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}).") from error


def _tool(item: Any, where: str) -> ToolSpec:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: {shown(item)} is no tool; it needs `function.name` and its parameters.")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    description = function.get("description")
    if not isinstance(parameters, Mapping) or not isinstance(description, str | None):
        raise DataError(f"{where}: `parameters` must be a JSON schema object and `description` text.")
    return ToolSpec(function["name"], description or "", parameters)


def _check_order(given: Sequence[Row], read: Sequence[Message], places: Sequence[str]) -> None:
    """Roles as a chat has them: [system], user, then assistant after user or tool, tool after its call."""
    pending: list[str | None] = []  # ids of the calls that are not answered yet
    before = ""
    for item, message, place in zip(given, read, places, strict=True):
        match message.role:
            case "system" if before:
                raise DataError(f"{place}: a system message after the first; put its text into the first.")
            case "tool":
                _answered(message, pending, place)
            case role if pending:
                raise DataError(
                    f"{place}: a message of {role}, but {len(pending)} tool call(s) have no answer."
                )
            case "assistant" if before in ("", "system"):
                raise DataError(f"{place}: an assistant message before any of the user's.")
            case "assistant" if before == "assistant":
                raise DataError(f"{place}: two assistant messages in a row; join them into one.")
        if message.role == "assistant":
            ids = [call.get("id") for call in item.get("tool_calls") or ()]
            pending = [None if id_ is None else str(id_) for id_ in ids]
        before = message.role


def _answered(message: Message, pending: list[str | None], place: str) -> None:
    """Take the call that a tool's ``message`` answers out of ``pending``: by id, without one the first."""
    if not pending:
        raise DataError(f"{place}: a tool message that answers no tool call of the assistant before it.")
    answered = message.tool_call_id if any(pending) and message.tool_call_id else pending[0]
    if answered not in pending:
        raise DataError(f"{place}.tool_call_id: {answered!r} is none of the open calls {pending}.")
    pending.remove(answered)


def _weight(item: Row, where: str) -> bool:
    weight = item.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{where}.weight: {shown(weight)}; it must be 0 or 1.")
    return bool(weight)


def _verdict(row: Row, where: str) -> tuple[bool, float]:
    """Success and reward; a success is a full 1, as an environment's verifier has it."""
    success, reward = row.get("success"), row.get("reward")
    for key, value in (("success", success), ("reward", reward)):
        if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
            raise DataError(f"{where}: `{key}` is {shown(value)}; it must be true, false or a number.")
    if success is None:
        success = 1.0 if reward is None else reward
    return success >= 1, float(success if reward is None else reward)
