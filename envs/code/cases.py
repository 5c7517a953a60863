"""What a code task holds, and how one is drawn."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from opd_agents.envs.code.algorithms import algorithm
from opd_agents.envs.code.functions import Function, expression, operation
from opd_agents.envs.code.loops import fold, short, spelling
from opd_agents.envs.code.slips import Slip, outcomes, slipped, slips

SPLITS = {"train": range(2, 10), "validation": range(1), "test": range(1, 2)}  # tenths of all functions
SPLIT_SIZES = {"train": 100_000, "validation": 1_000, "test": 1_000}
POOL, EXAMPLES, HIDDEN = 120, 3, 12
Arguments: TypeAlias = tuple[Any, ...]
Work: TypeAlias = Literal["fix", "write"]


@dataclass(frozen=True, slots=True)
class Level:
    """How hard the tasks of a level are: the kinds of its functions, and how many slips one has to fix."""

    kinds: tuple[Callable[[random.Random], Function], ...]
    slips: int
    max_turns: int


LEVELS: Mapping[str, Level] = {
    "intro": Level((operation,), 1, 6),
    "easy": Level((expression,), 1, 8),
    "medium": Level((fold, fold, fold, spelling, short), 1, 12),
    "hard": Level((algorithm,), 2, 16),
}


@dataclass(frozen=True, slots=True)
class Test:
    """One call and what it must give."""

    arguments: Arguments
    expected: Any


@dataclass(frozen=True, slots=True)
class Case:
    """The content of a task: the file as the agent finds it, what it should become, and the tests."""

    name: str  # of the function
    prompt: str
    start: str
    solution: str
    examples: tuple[Test, ...]
    hidden: tuple[Test, ...] = ()  # the examples are among them


@functools.lru_cache(maxsize=4096)  # groups, repairs and forks come back to the same task
def draw_case(work: Work, level: str, split: str, task_id: str) -> Case:
    """The case of a task: the first one in the task's own stream whose function belongs to the split.

    A function belongs to one split by a hash of its code, so the answer to a task of one split never answers
    a task of another.
    """
    rng = random.Random(f"{work}/{level}/{split}/{task_id}")
    kinds, count = LEVELS[level].kinds, LEVELS[level].slips
    while True:
        function = rng.choice(kinds)(rng)
        if content_class(function.code) not in SPLITS[split]:
            continue
        case = to_fix(function, count, rng) if work == "fix" else to_write(function, rng)
        if case is not None:
            return case


def content_class(code: str) -> int:
    """The class 0 ... 9 of a function, which decides its split."""
    return int.from_bytes(hashlib.blake2b(code.encode(), digest_size=8).digest()) % 10


def to_write(function: Function, rng: random.Random) -> Case:
    """The task to write ``function``, of which the agent finds the first line."""
    calls = _calls(function, rng)
    start = f"def {function.signature}:\n    pass\n"
    return _case(function, "Write it in solution.py:", start, calls, range(EXAMPLES))


def to_fix(function: Function, count: int, rng: random.Random) -> Case | None:
    """The task to mend ``count`` slips, each shown by an example; None where no such slips were found."""
    calls = _calls(function, rng)
    right = outcomes(function.code, function.name, calls)
    chosen: list[Slip] = []
    shown: list[int] = []
    every = list(slips(function.code))
    for slip in rng.sample(every, len(every)):
        if any(slip.start < other.stop and other.start < slip.stop for other in chosen):
            continue
        together = _wrong(function, [*chosen, slip], calls, right)
        alone = [place for place in _wrong(function, [slip], calls, right) if place in together]
        if not alone or (shown and shown[0] not in together):
            continue
        chosen, shown = [*chosen, slip], [*shown, next((p for p in alone if p not in shown), alone[0])]
        if len(chosen) == count:
            break
    else:
        return None
    places = list(dict.fromkeys([*shown, *range(len(calls))]))[:EXAMPLES]
    return _case(function, "Fix solution.py:", slipped(function.code, chosen), calls, places)


def _calls(function: Function, rng: random.Random) -> list[Arguments]:
    """Different calls that the function answers."""
    drawn = {repr(call): call for call in (function.draw(rng) for _ in range(POOL))}
    calls = list(drawn.values())
    right = outcomes(function.code, function.name, calls)
    return [call for call, value in zip(calls, right, strict=True) if not isinstance(value, type)]


def _case(
    function: Function, wish: str, start: str, calls: Sequence[Arguments], places: Sequence[int]
) -> Case:
    right = outcomes(function.code, function.name, calls)
    tests = [Test(call, value) for call, value in zip(calls, right, strict=True)]
    others = [place for place in range(len(calls)) if place not in places]
    hidden = [*places, *others[:HIDDEN]]
    for slip in slips(function.code):  # whatever slip any call shows, a hidden one shows
        wrong = _wrong(function, [slip], calls, right)
        if wrong and not set(wrong) & set(hidden):
            hidden.append(wrong[0])
    return Case(
        name=function.name,
        prompt=f"{function.signature} should give {function.text}. {wish}\n{start}",
        start=start,
        solution=function.code,
        examples=tuple(tests[place] for place in places),
        hidden=tuple(tests[place] for place in hidden),
    )


def _wrong(
    function: Function, chosen: Sequence[Slip], calls: Sequence[Arguments], right: Sequence[Any]
) -> list[int]:
    """Which calls show the slips."""
    found = outcomes(slipped(function.code, chosen), function.name, calls)
    return [place for place, value in enumerate(found) if value != right[place]]
