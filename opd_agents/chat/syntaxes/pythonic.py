"""``[f(a=1), g(b="x")]``, the whole text, or between LFM2's markers. Parsed, never evaluated."""

from __future__ import annotations

import ast
import json
import keyword
import warnings
from collections.abc import Sequence
from typing import Any

from opd_agents.chat.syntaxes.base import Found, Syntax, bad, bare_json, read_blocks
from opd_agents.envs.actions import format_calls
from opd_agents.envs.strict_json import check_value
from opd_agents.types import ToolCall, ToolSpec

LFM_MARKERS = ("<|tool_call_start|>", "<|tool_call_end|>")
MAX_CHARACTERS = 100_000  # beyond, Python's own parser could exhaust the stack of the process
_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\0": "\\x00"})
_NAMES = {"true": True, "false": False, "null": None}  # JSON's, which LFM2's template writes inside lists


def _render(calls: Sequence[ToolCall]) -> str:
    if not calls:
        return ""
    if not all(_is_name(part) for call in calls for part in call.name.split(".")):
        return format_calls(calls)  # bare JSON, which is read whatever the syntax
    return f"[{', '.join(map(_render_call, calls))}]"


def _render_lfm(calls: Sequence[ToolCall]) -> str:
    text = _render(calls)
    return LFM_MARKERS[0] + text + LFM_MARKERS[1] if text.endswith(")]") else text


def _render_call(call: ToolCall) -> str:
    if not all(map(_is_name, call.arguments)):
        return f"{call.name}(**{_render_value(dict(call.arguments))})"
    return (
        f"{call.name}({', '.join(f'{key}={_render_value(value)}' for key, value in call.arguments.items())})"
    )


def _render_value(value: Any) -> str:
    if isinstance(value, str):
        text = "'" + value.translate(_ESCAPES) + "'"
    else:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else repr(value)
    for marker in LFM_MARKERS:
        text = text.replace(marker, f"\\u003c{marker[1:]}")
    return text


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _read(text: str, tools: Sequence[ToolSpec]) -> Found:
    if text.lstrip()[:1] != "[":
        return bare_json(text) or Found((), (), None)
    bare = bare_json(text)
    if bare and bare.calls:
        return bare
    try:
        return Found(tuple(_calls(text)), ((0, len(text)),), None)
    except ValueError as error:
        return bad(error, (0, len(text)))


def _read_lfm(text: str, tools: Sequence[ToolSpec]) -> Found:
    return bare_json(text) or read_blocks(text, LFM_MARKERS, _block)


def _block(text: str, start: int) -> tuple[list[ToolCall], int]:
    opener, closer = LFM_MARKERS
    stop = text.find(closer, start)  # texts that hold the marker are written with an escape
    if stop < 0:
        raise ValueError(f"no {closer} after {opener}")
    return _calls(text[start:stop]), stop + len(closer)


def _calls(text: str) -> list[ToolCall]:
    """The calls of the source text of a list. Raises ValueError."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    try:
        with warnings.catch_warnings():  # of escapes such as "\d", which mean what they say
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            raise ValueError("calls must stand in a list: [f(a=1), g()]")
        return [_call(item) for item in tree.elts]
    except SyntaxError as error:
        raise ValueError(f"no list of calls: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError("nested too deep") from None


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("every item must be a call with named arguments: [f(a=1)]")
    keys: list[str] = []
    values: list[Any] = []
    for item in node.keywords:
        value = _value(item.value)
        if item.arg is None and not isinstance(value, dict):
            raise ValueError("** must be followed by a dict")
        # What cannot be named in Python, such as "from", stands in a dict.
        keys += [item.arg] if item.arg is not None else value
        values += [value] if item.arg is not None else value.values()
    arguments = _dict(keys, values)
    check_value(arguments)
    return ToolCall(_name(node.func), arguments)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("the name of a tool must be a plain name")


def _value(node: ast.expr, levels: int = 40) -> Any:
    """A literal's value, as JSON knows it. Raises ValueError."""
    if levels == 0:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.List(elts=items):
            return [_value(item, levels - 1) for item in items]
        case ast.Dict(keys=keys, values=values):
            return _dict([_key(key) for key in keys], [_value(item, levels - 1) for item in values])
    raise ValueError("a value must be a literal: text, number, list, dict, True, False or None")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as key):
            return key
    raise ValueError("the keys of a dict must be texts")


def _dict(keys: list[str], values: list[Any]) -> dict[str, Any]:
    result = dict(zip(keys, values, strict=True))
    if len(result) < len(keys):
        raise ValueError(f"duplicate name {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


PYTHONIC = Syntax("pythonic", (), '[NAME(KEY="VALUE", ...)]', _render, _read)
LFM = Syntax(
    "lfm",
    LFM_MARKERS,
    f'{LFM_MARKERS[0]}[NAME(KEY="VALUE", ...)]{LFM_MARKERS[1]}',
    _render_lfm,
    _read_lfm,
)
