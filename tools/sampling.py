"""Random calls, for a random policy and for conformance tests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from opd_agents.types import ToolCall, ToolSpec


def random_call(tools: Sequence[ToolSpec], rng: random.Random, words: Sequence[str] = ()) -> ToolCall:
    """A call of a random tool with arguments of the right types.

    Strings, and every other integer, are drawn from ``words`` (say, those seen in observations), so that some
    calls hit something.
    """
    tool = rng.choice(tools)
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    required = tool.parameters.get("required", ())
    chosen = [name for name in properties if name in required or rng.random() < 0.3]
    return ToolCall(tool.name, {name: _value(properties[name], rng, words) for name in chosen})


def _value(schema: Mapping[str, Any], rng: random.Random, words: Sequence[str]) -> Any:
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    match schema.get("type"):
        case "integer":
            seen = [int(word) for word in words if word.isdecimal() and len(word) < 10]
            return rng.choice(seen) if seen and rng.random() < 0.5 else rng.randint(0, 9)
        case "number":
            return round(rng.uniform(0, 9), 2)
        case "boolean":
            return rng.random() < 0.5
        case "array":
            return [_value(schema.get("items", {}), rng, words) for _ in range(rng.randint(0, 2))]
        case "object":
            return {name: _value(item, rng, words) for name, item in schema.get("properties", {}).items()}
        case _:
            return rng.choice(words) if words else "x"
