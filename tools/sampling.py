"""Random calls, for a random policy and for conformance tests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_agents.types import ToolCall, ToolSpec


def random_call(tools: Sequence[ToolSpec], rng: random.Random, words: Sequence[str] = ()) -> ToolCall:
    """A call of a random tool with arguments of the right types.

    Strings, and the integers of every other call, are from ``words`` (say, those seen in observations), so
    that some calls hit something: numbers that stand side by side there are used side by side.
    """
    tool = rng.choice(tools)
    seen = [int(word) for word in words if word.isdecimal() and len(word) < 10]
    first = rng.randrange(len(seen)) if seen and rng.random() < 0.5 else None
    numbers = None if first is None else itertools.cycle(seen[first:] + seen[:first])
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    required = tool.parameters.get("required", ())
    chosen = [name for name in properties if name in required or rng.random() < 0.3]
    return ToolCall(tool.name, {name: _value(properties[name], rng, words, numbers) for name in chosen})


def _value(
    schema: Mapping[str, Any], rng: random.Random, words: Sequence[str], numbers: Iterator[int] | None
) -> Any:
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    match schema.get("type"):
        case "integer":
            return rng.randint(0, 9) if numbers is None else next(numbers)
        case "number":
            return round(rng.uniform(0, 9), 2)
        case "boolean":
            return rng.random() < 0.5
        case "array":
            return [_value(schema.get("items", {}), rng, words, numbers) for _ in range(rng.randint(0, 2))]
        case "object":
            items = schema.get("properties", {}).items()
            return {name: _value(item, rng, words, numbers) for name, item in items}
        case _:
            return rng.choice(words) if words else "x"
