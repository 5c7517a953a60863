"""Longer functions, of the kinds that programmers get wrong: runs, windows, pairs, pieces, recurrences."""

from __future__ import annotations

import random
from typing import Any

from opd_agents.envs.code.functions import Draw, Function, Template, condition, lists, numbers, words

LONGEST_RUN = """
def longest_run(xs):
    best = 0
    run = 0
    for x in xs:
        if {test}:
            run += 1
            best = max(best, run)
        else:
            run = 0
    return best
"""
BEST_WINDOW = """
def best_window(xs):
    best = None
    for i in range(len(xs) - {k} + 1):
        total = {m} * xs[i]
        for x in xs[i + 1:i + {k}]:
            total += x
        if best is None or total > best:
            best = total
    return 0 if best is None else best
"""
PAIRS = """
def pairs(xs):
    total = 0
    for i in range(len(xs)):
        for j in range(i + 1, len(xs)):
            if xs[i] + xs[j] >= {k} and xs[i] * xs[j] <= {m} * {m}:
                total += 1
    return total
"""
SCORE = """
def score(xs):
    points = 0
    for x in xs:
        if {test}:
            points += {k}
        elif {test2}:
            points -= {j}
        else:
            points += 1
    return points
"""
MATCHES = """
def matches(xs, ys):
    total = 0
    seen = 0
    for x, y in zip(xs, ys):
        if {test}:
            if seen >= {j}:
                total += x * y - {k}
            seen += 1
    return total
"""
RECURRENCE = """
def recurrence(n):
    a = {j}
    b = {k}
    for i in range(n):
        a, b = b, {j} * b + {m} * a
    return a
"""
SHIFT = """
def shift(s):
    out = ''
    for c in s:
        if 'a' <= c <= 'z':
            out += chr((ord(c) - 97 + {k}) % 26 + 97)
        elif c.isdigit():
            out += str((int(c) + {m}) % 10)
        else:
            out += c
    return out
"""
PACK = """
def pack(s):
    runs = []
    for c in s:
        if runs and runs[-1][0] == c:
            runs[-1][1] += 1
        else:
            runs.append([c, 1])
    return [run for run in runs if run[1] >= {j} and run[1] != {k}]
"""
DEPTH = """
def depth(s):
    now = 0
    best = 0
    for c in s:
        if c == '(':
            now += 1
        elif c == ')':
            now -= 1
        if now < 0:
            return -1
        best = max(best, now)
    if now != 0:
        return -1
    return -2 if best > {k} else best
"""
MERGE = """
def merge(xs, ys):
    out = []
    for x in sorted(xs + ys):
        if {test} and out.count(x) < {j}:
            out.append(x)
    return out
"""
DIAGONAL = """
def diagonal(grid):
    total = 0
    for i, row in enumerate(grid):
        for j, x in enumerate(row):
            if i == j and ({test}):
                total += x
            if i != j and ({test2}):
                total -= {k}
    return total
"""
PIECES = """
def pieces(xs):
    out = []
    for i in range(0, len(xs), {k}):
        total = 0
        for x in xs[i:i + {k}]:
            if not ({test}):
                total += x
        out.append(total % {m})
    return out
"""


def _brackets(rng: random.Random) -> tuple[Any, ...]:
    pieces = ("(", "(" * 11, ")", ")" * 11, "()", "(x)", "(())")
    return ("".join(rng.choices(pieces, k=rng.randint(0, 4))),)


def _grid(rng: random.Random) -> tuple[Any, ...]:
    size = rng.randint(1, 4)
    return ([[rng.randint(0, 15) for _ in range(size)] for _ in range(size)],)


def _sorted(draw: Draw) -> Draw:
    return lambda rng: tuple(map(sorted, draw(rng)))


ALGORITHMS = (
    Template(
        LONGEST_RUN, "the length of the longest run of neighbouring items of xs that are {said}", lists(1)
    ),
    Template(
        BEST_WINDOW,
        "the largest sum of {k} neighbouring items of xs, of which the first counts {m} times; 0 if xs "
        "has fewer items",
        lists(1, longest=12),
    ),
    Template(
        PAIRS,
        "how many pairs of items of xs, at two different indices, have a sum of at least {k} and a "
        "product of at most {m} * {m}",
        lists(1),
    ),
    Template(
        SCORE,
        "{k} points for each item of xs that is {said}, {j} points off for each other item that is "
        "{said2}, and 1 point for each of the rest, summed up",
        lists(1),
    ),
    Template(
        MATCHES,
        "the sum of x * y - {k} over the items x of xs that are {said} and the items y of ys at their "
        "indices, the first {j} of them left out",
        lists(2),
    ),
    Template(
        RECURRENCE,
        "t(n), where t(0) = {j}, t(1) = {k}, and t(i) = {j} * t(i - 1) + {m} * t(i - 2) from then on",
        numbers(1, 0, 14),
    ),
    Template(
        SHIFT,
        "s with every small letter moved {k} places on in the alphabet, from z on to a, and with the last"
        " digit of its sum with {m} for every digit",
        words("abmxyzAZ 0459"),
    ),
    Template(
        PACK,
        "the list of [character, length] of the runs of equal characters in s, but only of those that are"
        " at least {j} long and not {k} long",
        words("aaab", 24),
    ),
    Template(
        DEPTH,
        "how deep the brackets in s are nested at most; -1 if they do not match, -2 if they are deeper "
        "than {k}",
        _brackets,
    ),
    Template(
        MERGE,
        "the items of the sorted lists xs and ys that are {said}, as one sorted list, each value at most "
        "{j} times",
        _sorted(lists(2)),
    ),
    Template(
        DIAGONAL,
        "the sum of the entries of the square grid that are {said} and on its diagonal from the upper "
        "left, minus {k} for each entry that is {said2} and not there",
        _grid,
    ),
    Template(
        PIECES,
        "the list of the sums of xs cut into pieces of {k} items (the last may be shorter), each sum "
        "without the items that are {said}, and modulo {m}",
        lists(1, low=0, longest=14),
    ),
)


def algorithm(rng: random.Random) -> Function:
    """A function of two loops, two cases or more."""
    template = rng.choice(ALGORITHMS)
    j = rng.randint(1, 3)
    k = j + rng.randint(1, 6)
    (test, said), (test2, said2) = condition(rng), condition(rng)
    return template.filled(j=j, k=k, m=k + rng.randint(1, 6), test=test, said=said, test2=test2, said2=said2)
