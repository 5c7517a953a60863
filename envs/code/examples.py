"""The example calls in the docstring of a HumanEval problem, in the many forms that its authors used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from opd_agents.envs.code.cases import Test

_GIVES = re.compile(r"\s*(?:#\s*)?(?:==>|=>|==|=|->|➞|returns|should return|\n)\s*")
_IN_WORDS = re.compile(
    r"(?:For|Input:)\s*(.+?),?\s*(?:the sum of digits will be \d+ )?"
    r"(?:the output should be|the result should be|Output:)\s*",
    re.DOTALL,
)


def examples(prompt: str, name: str) -> tuple[Test, ...]:
    """The calls with literal arguments and results that the docstring of ``name`` shows, each once."""
    text = prompt[prompt.rindex(f"def {name}(") :]
    text = text[text.index(":\n") :]
    found: dict[str, Test] = {}
    for call, rest in [*_calls(text, name), *_told(text)]:
        try:
            arguments = _arguments(call)
        except (SyntaxError, ValueError):
            continue
        for value in _literal(rest):
            found.setdefault(repr(arguments), Test(arguments, value))
    return tuple(found.values())


def _calls(text: str, name: str) -> Iterator[tuple[str, str]]:
    """What stands between the brackets of ``name(...)``, and what follows the sign for "gives"."""
    for match in re.finditer(rf"\b{name}\(", text):
        stop = _closing(text, match.end())
        gives = _GIVES.match(text, stop + 1)
        if gives:
            yield text[match.end() : stop], text[gives.end() :]


def _told(text: str) -> Iterator[tuple[str, str]]:
    """The same of examples in words: "For x = 1 the output should be 2"."""
    for match in _IN_WORDS.finditer(text):
        yield match[1], text[match.end() :]


def _arguments(call: str) -> tuple[Any, ...]:
    tree = ast.parse(f"f({call.strip()})", mode="eval").body
    if not isinstance(tree, ast.Call):
        raise ValueError(call)
    return tuple(ast.literal_eval(node) for node in (*tree.args, *(word.value for word in tree.keywords)))


def _closing(text: str, start: int) -> int:
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place
    return len(text)


def _literal(text: str) -> Iterator[Any]:
    """The longest literal that ``text`` begins with, if it is the whole of a value."""
    ends = [match.start() for match in re.finditer(r"\s|$|[.#,]", text[:400])]
    for stop in reversed(ends):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text[:stop], text[:stop]))
        except (SyntaxError, ValueError):
            continue
        if text[:stop].rstrip().endswith("."):  # of a sentence, not of a number
            continue
        if not re.match(r"\s*[-+*/=]", text[stop:].split("\n")[0]):  # no term of a sum
            yield value
        return
