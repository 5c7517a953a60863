"""Argument values written without quotes, in markup that does not say whether ``7`` is a text or a number.

Published templates write a text as it is and anything else as JSON, so only the tool's schema can tell; a
reader without it takes JSON for what reads as JSON. To be read back either way, a text that reads as JSON or
holds the markup is written here as a JSON string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from opd_agents.chat.syntaxes.base import skip_space
from opd_agents.envs.strict_json import check_value, loads
from opd_agents.types import ToolSpec

# Python's spelling, which some templates write; read only where the schema has no place for a text.
_PYTHON = {"True": ("boolean", True), "False": ("boolean", False), "None": ("null", None)}


def write_value(value: Any, markup: Sequence[str]) -> str:
    """``value`` as text that holds nothing of ``markup``."""
    if isinstance(value, str) and not _doubtful(value, markup):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("<", "\\u003c") if any(marker in text for marker in markup) else text


def read_value_text(text: str, types: Collection[str], markup: Sequence[str]) -> Any:
    """The value of ``text``, of one of the JSON ``types`` (none given: unknown). Raises ValueError."""
    for marker in markup:
        if marker in text:
            raise ValueError(f"{marker} inside a value; close the value before it")
    if text in _PYTHON and _PYTHON[text][0] in types:
        return _PYTHON[text][1]
    if types and set(types) <= {"string", "null"} and not (text == "null" and "null" in types):
        value = _json_or_text(text) if text[:1] == '"' else text
        return value if isinstance(value, str) and _doubtful(value, markup) else text
    return _json_or_text(text)


def read_arguments(
    text: str,
    start: int,
    types: Mapping[str, Collection[str]],
    opening: re.Pattern[str],
    closing: str,
    markup: Sequence[str],
    space: str = "",
) -> tuple[dict[str, Any], int]:
    """Arguments that stand one after the other from ``start`` on, and where what follows them begins.

    ``opening`` matches all before a value; its one group is the argument's name, and the group's name what
    such an argument is called. ``space`` may stand on both sides of a value. Raises ValueError.
    """
    arguments: dict[str, Any] = {}
    while found := opening.match(text, start):
        name, stop = found[1], text.find(closing, found.end())
        if stop < 0:
            raise ValueError(f"no {closing} after the {found.lastgroup} {name!r}")
        if name in arguments:
            raise ValueError(f"duplicate {found.lastgroup} {name!r}")
        value = text[found.end() : stop].removeprefix(space).removesuffix(space)
        arguments[name] = read_value_text(value, types.get(name, ()), markup)
        start = skip_space(text, stop + len(closing))
    check_value(arguments)
    return arguments, start


def parameter_types(tools: Sequence[ToolSpec], name: str) -> dict[str, frozenset[str]]:
    """The JSON types that each parameter of tool ``name`` may have, where its schema says them."""
    for tool in tools:
        properties = tool.parameters.get("properties")
        if tool.name == name and isinstance(properties, Mapping):
            return {key: _types(schema, tool.parameters) for key, schema in properties.items()}
    return {}


def _types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Empty if the schema does not say, or not in a way that is understood here."""
    if not isinstance(schema, Mapping):
        return frozenset()
    if isinstance(reference := schema.get("$ref"), str):
        definitions = root.get("$defs")
        known = definitions if isinstance(definitions, Mapping) else {}
        # No further references: they could go round in circles.
        return _types(known.get(reference.removeprefix("#/$defs/")), {})
    if isinstance(options := schema.get("anyOf", schema.get("oneOf")), list):
        members = [_types(option, root) for option in options]
        return frozenset().union(*members) if all(members) else frozenset()
    kind = schema.get("type")
    kinds: list[Any] = kind if isinstance(kind, list) else [kind]
    return frozenset(kinds) if all(isinstance(one, str) for one in kinds) else frozenset()


def _json_or_text(text: str) -> Any:
    try:
        return loads(text.strip())
    except json.JSONDecodeError:
        return text


def _doubtful(text: str, markup: Sequence[str]) -> bool:
    """Whether ``text``, written as it is, could be read as something else."""
    if text in _PYTHON or any(marker in text for marker in markup):
        return True
    try:
        return _json_or_text(text) is not text
    except ValueError:
        return True
