"""What runs inside the sandbox beside an agent's code, and the form in which values go in and out.

It is sent as source text to the Python of any image, so it uses nothing but the standard library of Python
3.8. Beside an agent's code it only answers calls: what they should give never enters the sandbox together
with that code, so nothing that the code prints, patches or ends can turn a wrong answer into a right one.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from typing import Any, TextIO


def encode(value: Any) -> Any:
    """A plain Python value as JSON, told apart from every other. Raises TypeError for what is none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    """The value that was encoded. Raises LookupError, TypeError or ValueError for what nothing encodes to."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        return {"tuple": tuple, "dict": dict}[kind](decode(items))
    return value


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def answer(job: dict[str, Any], out: TextIO) -> None:
    """Call the function ``name`` of solution.py, once a line: what it gives, or what it raises."""
    try:
        function = getattr(importlib.import_module("solution"), job["name"])
    except BaseException as error:
        print(json.dumps({"broken": describe(error)}), file=out, flush=True)
        return
    for arguments in job["calls"]:
        try:
            line = json.dumps({"value": encode(function(*decode(arguments)))})
        except BaseException as error:
            line = json.dumps({"error": describe(error)})
        print(line, file=out, flush=True)


def record(job: dict[str, Any], out: TextIO) -> None:
    """Write down the calls that a check makes of a solution known to be right."""
    space: dict[str, Any] = {}
    calls = []
    exec(job["solution"] + "\n" + job["check"], space)

    def candidate(*arguments: Any) -> Any:
        calls.append(encode(arguments))
        return space[job["name"]](*arguments)

    random.seed(0)
    space["check"](candidate)
    print(json.dumps(calls), file=out, flush=True)


def check(job: dict[str, Any], out: TextIO) -> None:
    """Run a check on answers given before, in the order of its calls: "passed" if none was wrong."""
    space: dict[str, Any] = {}
    answers = iter(job["answers"])
    exec(job["solution"] + "\n" + job["check"], space)

    def candidate(*arguments: Any) -> Any:
        line = next(answers)
        if "error" in line:
            raise RuntimeError(line["error"])
        return decode(line["value"])

    random.seed(0)
    space["check"](candidate)
    print("passed", file=out, flush=True)


def main() -> None:
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what the agent's code prints is no answer
        os.dup2(nowhere, descriptor)
    {"answer": answer, "record": record, "check": check}[job["do"]](job, out)
    os._exit(0)  # whatever threads and exit handlers the code left


if __name__ == "__main__":
    main()
