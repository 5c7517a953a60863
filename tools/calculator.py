"""A calculator with a grammar of its own: nothing is ever evaluated as code."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, TypeAlias

import pydantic

from opd_agents.tools.base import ToolError

Number: TypeAlias = int | float

MAX_CHARS = 500  # of an expression
MAX_NESTING = 40  # of parentheses, signs and powers
MAX_BITS = 1024  # of a whole number: as large as a float gets
MAX_PLACES = 15  # that round() takes

CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS: dict[str, tuple[Callable[..., Number], int, int]] = {  # with least and most arguments
    "abs": (abs, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "cos": (math.cos, 1, 1),
    "exp": (math.exp, 1, 1),
    "floor": (math.floor, 1, 1),
    "log": (math.log, 1, 2),
    "log10": (math.log10, 1, 1),
    "max": (max, 2, 20),
    "min": (min, 2, 20),
    "round": (lambda value, places=0: _round(value, places), 1, 2),
    "sin": (math.sin, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "tan": (math.tan, 1, 1),
}
_NUMBER = r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
_TOKEN = re.compile(rf"\s*(?:{_NUMBER}|(?P<name>[A-Za-z]\w*)|(?P<sign>\*\*|//|[-+*/%^(),]))", re.ASCII)


def calculate(
    expression: Annotated[str, pydantic.Field(description="such as (3 + 4) * 2 ** 5 or sqrt(2)")],
) -> str:
    """Calculate with + - * / // % ** ( ), the constants pi and e, and the functions abs, ceil, cos, exp,
    floor, log, log10, max, min, round, sin, sqrt, tan."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression is longer than {MAX_CHARS} characters")
    try:
        value = _Parser(_tokens(expression)).whole()
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the result is too large") from None
    except ValueError:  # of math: a root or logarithm of a negative number
        raise ToolError("the result is no real number") from None
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _tokens(expression: str) -> list[tuple[str, str]]:
    """Pairs of kind (number, name, sign) and text."""
    tokens, place, text = [], 0, expression.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ToolError(f"cannot read {text[place:].strip()[:20]!r}")
        tokens.append((str(match.lastgroup), str(match[str(match.lastgroup)])))
        place = match.end()
    return tokens


class _Parser:
    """Recursive descent that calculates as it reads; a sign binds weaker than a power: -2**2 is -4."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = [*tokens, ("end", "the end")]
        self._depth = 0

    def whole(self) -> Number:
        value = self._sum()
        if self._tokens[0][0] != "end":
            raise ToolError(f"unexpected {self._tokens[0][1]!r}")
        return value

    def _sum(self) -> Number:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Number:
        value = self._signed()
        while sign := self._take("*", "/", "//", "%"):
            value = _bounded(_multiplied(value, sign, self._signed()))
        return value

    def _signed(self) -> Number:
        self._depth += 1  # everything that nests comes through here
        if self._depth > MAX_NESTING:
            raise ToolError(f"the expression is nested deeper than {MAX_NESTING} levels")
        sign = self._take("+", "-")
        value = self._signed() if sign else self._power()
        self._depth -= 1
        return -value if sign == "-" else value

    def _power(self) -> Number:
        base = self._atom()
        return _power(base, self._signed()) if self._take("**", "^") else base

    def _atom(self) -> Number:
        kind, text = self._tokens.pop(0)
        if kind == "number":
            return _bounded(int(text) if text.isdigit() else float(text))
        if kind == "name":
            return self._named(text)
        if text != "(":
            raise ToolError(f"unexpected {text!r}" if kind == "sign" else "the expression is incomplete")
        value = self._sum()
        self._expect(")")
        return value

    def _named(self, name: str) -> Number:
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name not in FUNCTIONS:
            raise ToolError(f"unknown name {name!r}; there are {', '.join([*CONSTANTS, *FUNCTIONS])}")
        function, least, most = FUNCTIONS[name]
        self._expect("(")
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self._expect(")")
        if not least <= len(arguments) <= most:
            raise ToolError(f"{name} takes {least if least == most else f'{least} to {most}'} arguments")
        return _bounded(function(*arguments))

    def _take(self, *signs: str) -> str | None:
        """The next token if it is one of ``signs``."""
        return self._tokens.pop(0)[1] if self._tokens[0][1] in signs else None

    def _expect(self, sign: str) -> None:
        if not self._take(sign):
            raise ToolError(f"expected {sign!r} but found {self._tokens[0][1]!r}")


def _multiplied(value: Number, sign: str, other: Number) -> Number:
    match sign:
        case "*":
            return value * other
        case "//":
            return value // other
        case "%":
            return value % other
        case _:  # what divides without rest stays whole, and so exact
            return value / other if isinstance(value % other, float) or value % other else value // other


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0
    if whole and abs(base) > 1 and exponent * math.log2(abs(base)) > MAX_BITS:
        raise OverflowError
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError
    return _bounded(value)


def _round(value: Number, places: Number) -> Number:
    if not isinstance(places, int) or abs(places) > MAX_PLACES:
        raise ToolError(f"round takes a whole number of places up to {MAX_PLACES}")
    return round(value, places) if places else round(value)


def _bounded(value: Number) -> Number:
    if value.bit_length() > MAX_BITS if isinstance(value, int) else not math.isfinite(value):
        raise OverflowError
    return value
