"""JSON read strictly: no duplicate keys, finite numbers, bounded nesting, text that a file can hold.

A call acts on the world, so what only a lenient reader would accept is an error, never a guess.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_NESTING = 32  # of a call's JSON; deeper values would exhaust the stack of whoever walks or logs them


def loads(text: str) -> Any:
    """The value of a whole text. Raises JSONDecodeError for no JSON, another ValueError for refused JSON."""
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"JSON nested deeper than {MAX_NESTING} levels") from None
    check_value(value)
    return value


def read_value(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at ``start``, and where it ends. Raises ValueError."""
    try:
        value, stop = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(f"JSON nested deeper than {MAX_NESTING} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at character {error.pos}: {error.msg}") from None
    check_value(value)
    return value, stop


def check_value(value: Any) -> None:
    """Raises ValueError for plain data that JSON text could not hold, or that is nested too deep."""
    if _deeper(value, MAX_NESTING):
        raise ValueError(f"JSON nested deeper than {MAX_NESTING} levels")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("text with a lone surrogate, which no file can hold") from None


def _deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return items is not None and (levels == 0 or any(_deeper(item, levels - 1) for item in items))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
