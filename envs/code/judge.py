"""Calling an agent's function in a sandbox, and judging its answers outside of it."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_agents.envs.code.cases import Arguments, Test
from opd_agents.envs.code.inside import decode, encode
from opd_agents.tools import ToolError
from opd_agents.tools.sandbox import Result, Sandbox

SOLUTION = "solution.py"
PROGRAM = importlib.resources.files("opd_agents.envs.code").joinpath("inside.py").read_text("utf-8")
STOPPED = {"timeout": "ran for too long", "memory": "used too much memory", "output": "gave too much"}
LONGEST = 200  # characters of a value that an agent is shown
# What a line raises that the agent's code wrote itself.
MALFORMED = (AttributeError, LookupError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call gave: ``line`` as it came from inside (a value or an error), or why nothing did."""

    line: Mapping[str, Any]

    @property
    def error(self) -> str | None:
        if "error" not in self.line:
            return None
        return str(self.line["error"]).encode(errors="backslashreplace").decode()

    def fits(self, test: Test) -> bool:
        return self.error is None and bool(decode(self.line["value"]) == test.expected)

    def shown(self) -> str:
        """As an agent reads it."""
        return shorten(self.error or repr(decode(self.line["value"])))


def ask(sandbox: Sandbox, files: Mapping[str, bytes], name: str, calls: Sequence[Arguments]) -> list[Answer]:
    """What function ``name`` of solution.py gives for each call, one after the other in one process.

    Raises ToolError if the sandbox fails; whatever the code does is an answer.
    """
    job = {"do": "answer", "name": name, "calls": [encode(call) for call in calls]}
    result = _run(sandbox, files, job)
    answers: list[Answer] = []
    for line in result.output.split("\n")[: len(calls)]:
        found = _read(line)
        if "broken" in found:
            return [Answer({"error": found["broken"]})] * len(calls)
        if not found:
            break
        answers.append(Answer(found))
    why = "no answer" if result.stopped is None else f"no answer: it {STOPPED[result.stopped]}"
    return answers + [Answer({"error": why})] * (len(calls) - len(answers))


def recorded_calls(sandbox: Sandbox, name: str, solution: str, check: str) -> list[Arguments]:
    """The calls that the program ``check`` makes of a right solution."""
    result = _run(sandbox, {}, {"do": "record", "name": name, "solution": solution, "check": check})
    if not result.ok:
        raise ToolError("the tests cannot be run")
    return [decode(call) for call in json.loads(result.output)]


def passes(sandbox: Sandbox, name: str, solution: str, check: str, answers: Sequence[Answer]) -> bool:
    """Whether the program ``check`` is content with ``answers``. The agent's code has no part in this run."""
    lines = [dict(answer.line) for answer in answers]
    job = {"do": "check", "name": name, "solution": solution, "check": check, "answers": lines}
    return _run(sandbox, {}, job).output == "passed\n"


def shorten(text: str, longest: int = LONGEST) -> str:
    """``text``, its middle left out where it is too long."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def _run(sandbox: Sandbox, files: Mapping[str, bytes], job: Mapping[str, Any]) -> Result:
    sandbox.put(files)
    return sandbox.run(["python", "-c", PROGRAM], stdin=json.dumps(job).encode())


def _read(line: str) -> Mapping[str, Any]:
    """A line from inside; empty for one that the program there did not write, or did not end."""
    try:
        found = json.loads(line)
        ((kind, value),) = found.items()
        if kind == "value":
            decode(value)
        elif kind not in ("error", "broken"):
            return {}
    except MALFORMED:
        return {}
    return dict(found)
