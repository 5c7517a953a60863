"""Two actions, word by word: what one has and the other has not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import SequenceMatcher

WORDS = re.compile(r"\w+|\s+|[^\w\s]")
MOST_WORDS = 2000  # of both together; of longer ones all is different


def difference(old: str, new: str) -> list[tuple[str, str]]:
    """Pieces in order, each with a sign: "-" stands in ``old`` alone, "+" in ``new`` alone, "=" in both."""
    a, b = (WORDS.findall(_readable(text)) for text in (old, new))
    if len(a) + len(b) > MOST_WORDS:
        return [("-", "".join(a)), ("+", "".join(b))]
    return list(_pieces(a, b))


def _pieces(a: list[str], b: list[str]) -> Iterator[tuple[str, str]]:
    for kind, a_from, a_to, b_from, b_to in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            yield "=", "".join(a[a_from:a_to])
            continue
        if a_from < a_to:
            yield "-", "".join(a[a_from:a_to])
        if b_from < b_to:
            yield "+", "".join(b[b_from:b_to])


def _readable(action: str) -> str:
    """JSON with spaces between its parts; any other text as it is."""
    try:
        value = json.loads(action)
    except ValueError:
        return action
    return json.dumps(value, ensure_ascii=False)
