"""Right functions with what they give in words, of which the code tasks are made; the shortest of them.

No function here or in the modules beside has a `while` loop or changes its arguments: whatever slip is made
in one, it still ends, and it can be called again with the same arguments.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Draw: TypeAlias = Callable[[random.Random], tuple[Any, ...]]  # the arguments of one call

OPERATIONS = {"+": "plus", "-": "minus", "*": "times", "%": "modulo"}
COMPARISONS = {
    "<": "is less than",
    "<=": "is at most",
    ">": "is greater than",
    ">=": "is at least",
    "==": "equals",
    "!=": "differs from",
}
PICKS = {"min": "the smaller of", "max": "the larger of"}
LETTERS = [letter for letter in string.ascii_lowercase if letter not in "fl"]  # f is the function, l a one

CONDITIONS = (
    ("x > {k}", "greater than {k}"),
    ("x < {k}", "less than {k}"),
    ("x >= {k}", "at least {k}"),
    ("x <= {k}", "at most {k}"),
    ("x != {k}", "other than {k}"),
    ("x % {k} == 0", "divisible by {k}"),
    ("x % {k} == 1", "one more than a multiple of {k}"),
    ("x % 2 == 0 and x > {k}", "even and greater than {k}"),
    ("x < {k} or x > {m}", "less than {k} or greater than {m}"),
    ("x >= {k} and x <= {m}", "from {k} to {m}"),
)


@dataclass(frozen=True, slots=True)
class Function:
    """A right function: ``text`` says what a call gives, ``draw`` draws the arguments of one."""

    code: str
    text: str
    draw: Draw

    @property
    def signature(self) -> str:
        return self.code.removeprefix("def ").partition(":\n")[0]

    @property
    def name(self) -> str:
        return self.signature.partition("(")[0]


@dataclass(frozen=True, slots=True)
class Template:
    """A function with gaps in its code and its text."""

    code: str
    text: str
    draw: Draw

    def filled(self, **values: object) -> Function:
        return Function(self.code.lstrip("\n").format(**values), self.text.format(**values), self.draw)


def operation(rng: random.Random) -> Function:
    """One operator between two variables."""
    x, y = rng.sample(LETTERS, 2)
    sign = rng.choice((*OPERATIONS, *COMPARISONS))
    text = f"{x} {OPERATIONS[sign]} {y}" if sign in OPERATIONS else f"whether {x} {COMPARISONS[sign]} {y}"
    return Function(f"def f({x}, {y}):\n    return {x} {sign} {y}\n", text, numbers(2))


def expression(rng: random.Random) -> Function:
    """One line of one or two operators, of which the last has a variable or a digit on its right."""
    x, y, z = rng.sample(LETTERS, 3)
    right = rng.choice((z, str(rng.randint(1, 9))))
    first = rng.choice(("variable", "operation", "pick"))
    left = said = x
    if first == "operation":
        sign = rng.choice(list(OPERATIONS))
        left, said = f"{x} {sign} {y}", f"{x} {OPERATIONS[sign]} {y}"
    elif first == "pick":
        name = rng.choice(list(PICKS))
        left, said = f"{name}({x}, {y})", f"{PICKS[name]} {x} and {y}"
    last = rng.choice(("operation", "comparison", "none") if left != x else ("operation", "comparison"))
    code, text = left, said
    if last == "operation":
        sign = rng.choice(list(OPERATIONS))
        code = f"({left}) {sign} {right}" if first == "operation" else f"{left} {sign} {right}"
        text = f"{said}{'' if left == x else ','} {OPERATIONS[sign]} {right}"
    elif last == "comparison":
        sign = rng.choice(list(COMPARISONS))
        code, text = f"{left} {sign} {right}", f"whether {said} {COMPARISONS[sign]} {right}"
    used = [x] + [y] * (left != x) + [z] * (last != "none" and right == z)
    return Function(f"def f({', '.join(used)}):\n    return {code}\n", text, numbers(len(used)))


def condition(rng: random.Random) -> tuple[str, str]:
    """Of a number x: as code, and in words."""
    code, said = rng.choice(CONDITIONS)
    k = rng.randint(2, 9)
    m = k + rng.randint(2, 6)
    return code.format(k=k, m=m), said.format(k=k, m=m)


def numbers(count: int, low: int = 1, high: int = 12) -> Draw:
    """Arguments: ``count`` whole numbers."""
    return lambda rng: tuple(rng.randint(low, high) for _ in range(count))


def lists(count: int, low: int = -3, high: int = 20, longest: int = 7) -> Draw:
    """Arguments: ``count`` lists of equally many whole numbers."""

    def draw(rng: random.Random) -> tuple[Any, ...]:
        size = rng.randint(0, longest)
        return tuple([rng.randint(low, high) for _ in range(size)] for _ in range(count))

    return draw


def words(alphabet: str, longest: int = 9) -> Draw:
    """Arguments: one string."""
    return lambda rng: ("".join(rng.choices(alphabet, k=rng.randint(0, longest))),)
