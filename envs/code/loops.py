"""Functions of a few lines: a loop over a list or a string that keeps some of it, or a little arithmetic."""

from __future__ import annotations

import random
import string

from opd_agents.envs.code.functions import Function, Template, condition, lists, numbers, words

TERMS = (
    ("x", "the items"),
    ("x * x", "the squares of the items"),
    ("x + {k}", "{k} plus each of the items"),
    ("x * {k}", "{k} times each of the items"),
    ("x % {k}", "the remainders by {k} of the items"),
)
CHARACTERS = (
    ("c in 'aeiou'", "a small vowel"),
    ("c.isupper()", "an upper-case letter"),
    ("c.isdigit()", "a digit"),
    ("c in '{p}{q}'", "{p} or {q}"),
    ("c == '{p}'", "{p}"),
    ("c.isdigit() or c == '{p}'", "a digit or {p}"),
)

COUNT = """
def count(xs):
    total = 0
    for x in xs:
        if {test}:
            total += 1
    return total
"""
ADD = """
def add(xs):
    total = 0
    for x in xs:
        if {test}:
            total += {term}
    return total
"""
MULTIPLY = """
def multiply(xs):
    total = 1
    for x in xs:
        if {test}:
            total *= {term}
    return total
"""
PICK = """
def pick(xs):
    out = []
    for x in xs:
        if {test}:
            out.append({term})
    return out
"""
LARGEST = """
def largest(xs):
    best = None
    for x in xs:
        if {test}:
            if best is None or {term} > best:
                best = {term}
    return best
"""
FIRST = """
def first(xs):
    for i, x in enumerate(xs):
        if {test}:
            return i
    return -1
"""
LAST = """
def last(xs):
    place = -1
    for i, x in enumerate(xs):
        if {test}:
            place = i
    return place
"""
FOLDS = (
    Template(COUNT, "how many items of xs are {said}", lists(1)),
    Template(ADD, "the sum of {named} of xs that are {said}", lists(1)),
    Template(MULTIPLY, "the product of {named} of xs that are {said}", lists(1)),
    Template(PICK, "the list of {named} of xs that are {said}", lists(1)),
    Template(LARGEST, "the largest of {named} of xs that are {said}, or None", lists(1)),
    Template(FIRST, "the index of the first item of xs that is {said}, or -1", lists(1)),
    Template(LAST, "the index of the last item of xs that is {said}, or -1", lists(1)),
)

COUNT_CHARACTERS = """
def count(s):
    total = 0
    for c in s:
        if {test}:
            total += 1
    return total
"""
KEEP = """
def keep(s):
    out = ''
    for c in s:
        if {test}:
            out += c
    return out
"""
MARK = """
def mark(s):
    out = ''
    for c in s:
        if {test}:
            out += '-'
        else:
            out += c
    return out
"""
REPEAT = """
def repeat(s):
    out = ''
    for c in s:
        if {test}:
            out += c * {k}
        else:
            out += c
    return out
"""
PLACES = """
def places(s):
    out = []
    for i, c in enumerate(s):
        if {test}:
            out.append(i)
    return out
"""
SPELLINGS = (
    (COUNT_CHARACTERS, "how many characters of s are {said}"),
    (KEEP, "the characters of s that are {said}, as a string"),
    (MARK, "s with - in place of every character that is {said}"),
    (REPEAT, "s with every character that is {said} written {k} times"),
    (PLACES, "the list of the indices of the characters of s that are {said}"),
)

GRADE = """
def grade(n):
    if n < {k}:
        return 'low'
    if n > {m}:
        return 'high'
    return 'mid'
"""
CLAMP = """
def clamp(n):
    return max({k}, min(n, {m}))
"""
SPAN = """
def span(a, b):
    total = 0
    for i in range(a, b + 1, {k}):
        total += i
    return total
"""
FARE = """
def fare(n):
    return {m} + {k} * max(0, n - {j})
"""
EVERY = """
def every(xs):
    return xs[{j}::{k}]
"""
STEPS = """
def steps(xs):
    out = []
    for i in range(len(xs) - 1):
        out.append(xs[i + 1] - {k} * xs[i])
    return out
"""
RUNNING = """
def running(xs):
    out = []
    total = {k}
    for x in xs:
        total += x + {j}
        out.append(total)
    return out
"""
MIX = """
def mix(xs, ys):
    out = []
    for x, y in zip(xs, ys):
        out.append({k} * x + {j} * y)
    return out
"""
SHORT = (
    Template(
        GRADE, "'low' if n is less than {k}, 'high' if it is greater than {m}, else 'mid'", numbers(1, 0, 20)
    ),
    Template(
        CLAMP, "n, but {k} if it is less than {k}, and {m} if it is greater than {m}", numbers(1, 0, 20)
    ),
    Template(SPAN, "the sum of a, a + {k}, a + 2 * {k} and so on up to b", numbers(2)),
    Template(
        FARE, "{m} plus {k} for each of n stops but the first {j}, and never less than {m}", numbers(1, 0, 20)
    ),
    Template(
        EVERY,
        "the items of xs with the indices {j}, {j} + {k}, {j} + 2 * {k} and so on",
        lists(1, longest=16),
    ),
    Template(
        STEPS, "the list of each item of xs but the first, minus {k} times the item before it", lists(1)
    ),
    Template(RUNNING, "the running totals of xs, from {k} on and with {j} more at every item", lists(1)),
    Template(MIX, "the list of {k} times an item of xs plus {j} times the one of ys at its index", lists(2)),
)


def fold(rng: random.Random) -> Function:
    """A loop over the items of a list."""
    test, said = condition(rng)
    term, named = rng.choice(TERMS)
    k = rng.randint(2, 9)
    return rng.choice(FOLDS).filled(test=test, said=said, term=term.format(k=k), named=named.format(k=k))


def spelling(rng: random.Random) -> Function:
    """A loop over the characters of a string."""
    p, q = rng.sample(string.ascii_lowercase, 2)
    test, said = (part.format(p=p, q=q) for part in rng.choice(CHARACTERS))
    template = Template(*rng.choice(SPELLINGS), words(f"aAeEbB19 {p}{p}{q}{q}"))
    return template.filled(test=test, said=said, k=rng.randint(2, 4))


def short(rng: random.Random) -> Function:
    """A little arithmetic."""
    k = rng.randint(2, 9)
    return rng.choice(SHORT).filled(k=k, j=rng.randint(1, 4), m=k + rng.randint(2, 9))
