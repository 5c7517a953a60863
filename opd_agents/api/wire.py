"""What is asked and what comes back, and how both stand in an OpenAI-compatible request and its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for

from opd_agents.config import Endpoint
from opd_agents.types import ToolCall, ToolSpec, to_dict

Body: TypeAlias = dict[str, Any]
"""Of a POST to /chat/completions."""

IN_WORDS = (
    "You can call these tools, here as JSON schemas:\n{tools}\n"
    'To call one, answer with this JSON and nothing else: {{"name": "TOOL", "arguments": {{...}}}}. '
    "A list of such objects makes several calls. Any other answer is said to the user."
)
AS_JSON = "Answer with JSON alone, without any other word, of this JSON schema:\n{schema}"
AGAIN = "That is not what was asked for: {problem}. Answer again, with JSON of the schema alone."


@dataclass(frozen=True, slots=True)
class Request:
    """One question. ``messages`` are OpenAI's; ``tools`` are offered natively where the endpoint has them,
    else in words. With a ``schema`` the answer is JSON of it; where the endpoint's output is structured it
    has to be one that OpenAI takes (objects closed by ``additionalProperties: false``, all properties
    required).

    ``sample`` tells several draws of the same question apart: equal requests have one answer.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[ToolSpec, ...] = ()
    schema: Mapping[str, Any] | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a request: ``text``, ``calls``, or the ``data`` that answers its schema; or the kind of
    ``failure`` after all attempts, with a ``detail`` for a person. Calls whose arguments are no JSON object
    are in ``text`` as they came. Tokens are those of all answers that it took, from the store or not."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    data: Any = None
    failure: str | None = None
    detail: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint answered, as it is stored: ``calls`` are names and arguments as they came. ``problem``
    is why it is of no use: refusal, empty, too_large or bad_body."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    problem: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def body_of(request: Request, model: str, endpoint: Endpoint) -> Body:
    """The request's body; fields of ``endpoint.body`` that are null are taken out."""
    messages, extra = [dict(message) for message in request.messages], Body()
    if request.tools and endpoint.native_tools:
        extra["tools"] = [{"type": "function", "function": to_dict(tool)} for tool in request.tools]
    elif request.tools:
        messages = _told([_spoken(message) for message in messages], _tools_in_words(request.tools))
    if request.schema is not None and endpoint.structured:
        answer = {"name": "answer", "schema": dict(request.schema), "strict": True}
        extra["response_format"] = {"type": "json_schema", "json_schema": answer}
    elif request.schema is not None:
        messages = _told(messages, AS_JSON.format(schema=json.dumps(request.schema, ensure_ascii=False)))
    body = {"model": model, "messages": messages, "temperature": request.temperature}
    body |= {"max_tokens": request.max_tokens, **extra, **endpoint.body}
    return {key: value for key, value in body.items() if value is not None}


def asked_again(body: Body, text: str, problem: str) -> Body:
    """The request that follows the answer ``text``, which does not keep to its schema."""
    told = {"role": "user", "content": AGAIN.format(problem=problem)}
    return body | {"messages": [*body["messages"], {"role": "assistant", "content": text}, told]}


def after(first: Reply, second: Reply) -> Reply:
    """The second, which took the first."""
    return replace(
        second, cached=first.cached and second.cached,
        prompt_tokens=first.prompt_tokens + second.prompt_tokens,
        completion_tokens=first.completion_tokens + second.completion_tokens,
    )  # fmt: skip


def estimated_tokens(body: Body) -> int:
    """Prompt and longest answer, at four characters a token."""
    return len(json.dumps(body["messages"])) // 4 + int(body.get("max_tokens", 0))


def read_answer(raw: bytes, body: Body) -> Answer:
    """The answer of a server, whatever it sent. Tokens that it does not tell are estimated."""
    try:
        value = json.loads(raw)
        usage, choices = value.get("usage") or {}, value["choices"]
        message = choices[0]["message"] if choices else {}
        text, refusal = message.get("content") or "", message.get("refusal")
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        spoken = tuple((str(call["name"]), str(call.get("arguments") or "{}")) for call in calls)
        filtered = bool(choices) and choices[0].get("finish_reason") == "content_filter"
        prompt = int(usage.get("prompt_tokens") or len(json.dumps(body["messages"])) // 4)
        completion = int(usage.get("completion_tokens") or len(raw) // 4)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Answer(problem="bad_body", prompt_tokens=len(json.dumps(body["messages"])) // 4)
    said = str(refusal or text).rpartition("</think>")[2].strip()  # of a server that reads no thoughts
    problem = "refusal" if refusal or filtered else None if spoken or said else "empty"
    return Answer(said, spoken, problem, prompt, completion)


def read_reply(answer: Answer, request: Request) -> Reply:
    """What the answer says to the request."""
    reply = Reply(answer.text, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
    return replace(reply, **_content(answer, request))


def _content(answer: Answer, request: Request) -> dict[str, Any]:
    if answer.problem is not None:
        return {"failure": answer.problem, "detail": answer.text[:200]}
    if request.schema is not None:
        try:
            data = json_in(answer.text)
        except ValueError as error:
            return {"failure": "bad_json", "detail": str(error)}
        if wrong := best_match(validator_for(request.schema)(request.schema).iter_errors(data)):
            return {"failure": "wrong_schema", "detail": f"{wrong.json_path}: {wrong.message}"[:200]}
        return {"data": data}
    if answer.calls:
        calls = [_call(name, arguments) for name, arguments in answer.calls]
        if None in calls:
            return {"text": ",".join(f'{{"name":{json.dumps(n)},"arguments":{a}}}' for n, a in answer.calls)}
        return {"calls": tuple(calls)}
    return {"calls": _calls_in(answer.text, {tool.name for tool in request.tools})}


def json_in(text: str) -> Any:
    """The JSON value that a text is, in a code fence or with words around it too. Raises ValueError."""
    start = min((place for mark in "{[" if (place := text.find(mark)) >= 0), default=0)
    try:
        return _DECODER.raw_decode(text[start:].lstrip())[0]
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def _calls_in(text: str, names: AbstractSet[str]) -> tuple[ToolCall, ...]:
    """The calls that a text is, in a code fence too; none where it is anything else."""
    bare = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if not names or bare[:1] not in ("{", "["):
        return ()
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        return ()
    items = value if isinstance(value, list) else [value]
    calls = tuple(
        ToolCall(item["name"], item.get("arguments", {}))
        for item in items
        if isinstance(item, dict)
        and item.get("name") in names
        and isinstance(item.get("arguments", {}), dict)
    )
    return calls if len(calls) == len(items) else ()


def _call(name: str, arguments: str) -> ToolCall | None:
    try:
        value = _DECODER.decode(arguments)
    except (ValueError, RecursionError):
        return None
    return ToolCall(name, value) if isinstance(value, dict) else None


def _told(messages: list[Body], words: str) -> list[Body]:
    """The messages with ``words`` at the end of the system prompt."""
    if messages and messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _tools_in_words(tools: Sequence[ToolSpec]) -> str:
    return IN_WORDS.format(tools="\n".join(json.dumps(to_dict(tool), ensure_ascii=False) for tool in tools))


def _spoken(message: Body) -> Body:
    """A message without tool calls: they, and their answers, as text."""
    if message["role"] == "tool":
        return {"role": "user", "content": message["content"]}
    if not (calls := message.get("tool_calls")):
        return message
    said = [
        f'{{"name":{json.dumps(c["function"]["name"])},"arguments":{c["function"]["arguments"]}}}'
        for c in calls
    ]
    return {"role": "assistant", "content": said[0] if len(said) == 1 else f"[{','.join(said)}]"}


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
