"""What models and tools wrote, made safe to show: it may be meant to run, or to be read as something else."""

from __future__ import annotations

import json
import re
from typing import Any

from markupsafe import Markup, escape

LONGEST_TEXT = 1200  # characters of one action or observation in the page itself
# Controls, overrides of the direction of writing, and characters that show nothing but are there: what a
# reader sees would not be what a model read. Joiners (U+200C, U+200D) make words and emoji, and stay.
HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
FOR_SCRIPTS = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def visible(text: str) -> str:
    """``text`` with a replacement character for each that is hidden, half of a surrogate pair included."""
    return HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def clip(text: str) -> Markup:
    """Visible text, escaped and bounded, for the page."""
    shown, rest = visible(text[:LONGEST_TEXT]), len(text) - LONGEST_TEXT
    more = Markup('<span class="more"> … {} more characters</span>').format(f"{rest:,}") if rest > 0 else ""
    return escape(shown) + more


def script_json(value: Any) -> str:
    """JSON that ends no script element and no line of a script, whatever texts are in it. Raises ValueError
    for NaN and infinity, which JSON has no words for."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, escaped in FOR_SCRIPTS.items():
        text = text.replace(character, escaped)
    return text
