"""Slips of a programmer: one operator, number or name that is not the one it should be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

TOKEN = re.compile(r"//=?|[-+*%<>=!]=|\w+|\s+|.", re.DOTALL)
GROUPS = (  # one taken for another
    ("+", "-", "*", "%"),
    ("<", "<=", ">", ">=", "==", "!="),
    ("+=", "-=", "*="),
    ("min", "max"),
    ("and", "or"),
    ("isupper", "islower"),
)
TAKEN_FOR = {token: tuple(other for other in group if other != token) for group in GROUPS for token in group}


@dataclass(frozen=True, slots=True)
class Slip:
    """The characters ``[start, stop)`` of a text, and what stands there by mistake."""

    start: int
    stop: int
    text: str


def slips(code: str) -> Iterator[Slip]:
    """Every slip that can be made in the body of a function and leaves it Python."""
    body = code.index("\n")
    for match in TOKEN.finditer(code, body):
        start, stop = match.span()
        spaced = code[start - 1] == " " == code[stop : stop + 1]
        if match[0] in "+-*%" and not spaced:  # a sign, not an operation
            continue
        for other in TAKEN_FOR.get(match[0], _near(match[0])):
            slip = Slip(start, stop, other)
            if _compiles(slipped(code, [slip])):
                yield slip


def slipped(code: str, chosen: Iterable[Slip]) -> str:
    """``code`` with slips in it, which must not overlap."""
    for slip in sorted(chosen, key=lambda s: s.start, reverse=True):
        code = code[: slip.start] + slip.text + code[slip.stop :]
    return code


def outcomes(code: str, name: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What function ``name`` of ``code`` gives for each call, or the type of what it raises.

    Only for the text of this package's own functions, with or without slips, which ends and does no harm.
    """
    space: dict[str, Any] = {}
    exec(code, space)
    return [_outcome(space[name], call) for call in calls]


def _outcome(function: Any, call: tuple[Any, ...]) -> Any:
    try:
        return function(*call)
    except Exception as error:  # of a slip: a wrong index, a division by zero
        return type(error)


def _near(token: str) -> tuple[str, ...]:
    if not token.isdecimal():
        return ()
    return (str(int(token) + 1), *([str(int(token) - 1)] if int(token) else []))


def _compiles(code: str) -> bool:
    try:
        compile(code, "solution.py", "exec")
    except SyntaxError:
        return False
    return True
