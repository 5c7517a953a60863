"""Hostile actions for every registered environment, each in a process of its own.

    python benchmarks/fuzz.py [NAME ...] [--actions 10000] [--seconds 600] [--json]

The actions are those of `opd_agents.fuzzing`, in rounds of ROUND with seeds 0, 1, ...; the first TWICE are
sent to two environments, which must answer alike. An exception, a crash of the process, an answer that takes
longer than SLOWEST seconds and one that never comes are told, with the action, and let the program exit with
1. An environment stops when its seconds are over; the table says how many actions it has seen. Environments
that are not named keep their rows of the last run.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from cases import Case, chosen
from figures import keep, markdown

from opd_agents import envs
from opd_agents.errors import EnvironmentContractError, MissingPart, UserError
from opd_agents.fuzzing import fuzz

ROUND = 200  # actions; a failure is found again by the seed of its round
TWICE = 50
SLOWEST = 60.0  # seconds for an answer, where two cores may be shared by many
SILENCE = 180.0  # seconds without an answer, resets and the end included: then the process ends itself
KINDS = ("fine", "tool_error", "parse_error", "episodes")


def worker(case: Case, actions: int, seconds: float, silence: float) -> dict[str, Any]:
    """Rounds until ``actions`` are done or ``seconds`` over. Raises EnvironmentContractError."""
    start, counts = time.monotonic(), Counter[str]()
    first = [_round(case, min(TWICE, actions), 0, silence)[1] for _ in range(2)]
    if first[0] != first[1]:
        raise EnvironmentContractError("the same actions were answered differently in a new environment")
    done = 0
    while done < actions and (done == 0 or time.monotonic() - start < seconds):
        size = min(ROUND, actions - done)
        counts += _round(case, size, done // ROUND, silence)[0]
        done += size
    faulthandler.dump_traceback_later(silence, exit=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"actions": done, "seconds": time.monotonic() - start, "peak_mib": peak}
    return row | {kind: counts[kind] for kind in KINDS}


def _round(case: Case, actions: int, seed: int, silence: float) -> tuple[Counter[str], str]:
    """What was counted, and a hash of all answers."""
    heard = hashlib.blake2b()

    def on_answer(action: str, observation: str) -> None:
        faulthandler.dump_traceback_later(silence, exit=True)
        heard.update(observation.encode() + b"\0")

    faulthandler.dump_traceback_later(silence, exit=True)
    with closing(envs.make(case.id, **case.options)) as env:
        try:
            counts = fuzz(env, actions, seed, tasks=case.tasks, slowest=SLOWEST, on_answer=on_answer)
        except EnvironmentContractError as error:
            raise EnvironmentContractError(f"round {seed}: {error}") from error
    return counts, heard.hexdigest()


def fresh_process(
    case: Case, plugins: Sequence[str], actions: int, seconds: float, silence: float = SILENCE
) -> dict[str, Any]:
    """What :func:`worker` gives in a process of its own, or a row that says what went wrong."""
    work = {"id": case.id, "options": case.options, "tasks": case.tasks}
    command = [sys.executable, __file__, "--worker", json.dumps(work), "--actions", str(actions)]
    command += [
        "--seconds",
        str(seconds),
        "--silence",
        str(silence),
        *(word for plugin in plugins for word in ("--import", plugin)),
    ]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        hung = next((line for line in said if line.startswith("Timeout (")), None)
        place = next((line.strip() for line in said if "most recent call first" in line), "")
        problem = f"no answer: {hung} {place}".strip() if hung else " ".join(said[-3:])
        return {"problem": problem, "seconds": time.monotonic() - start}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown, and below it what went wrong."""
    rows: Mapping[str, Mapping[str, Any]] = result["rows"]
    table = [
        {
            "arm": name,
            **{key.replace("_", " "): f"{row[key]:,}" if key in row else "" for key in ("actions", *KINDS)},
            "seconds": f"{row['seconds']:.0f}",
            "peak MiB": f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
            "result": "FAILED" if "problem" in row else row.get("left_out", "all answered"),
        }
        for name, row in sorted(rows.items())
    ]
    about = "Random, malformed, huge and adversarial actions; the first 50 twice, and answered alike."
    problems = [f"{name}: {row['problem']}" for name, row in sorted(rows.items()) if "problem" in row]
    return "\n\n".join([markdown(about, result, table), *problems]).strip() + "\n"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Environments, by default all.")] = None,
    actions: Annotated[int, typer.Option(min=1, help="For each environment.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=0, help="An environment stops after them.")] = 600,
    plugins: Annotated[list[str] | None, typer.Option("--import", help="A file or module first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    silence: Annotated[float, typer.Option(hidden=True)] = SILENCE,
    out: Annotated[Path, typer.Option(help="Where fuzz.json and fuzz.md go.")] = Path("benchmarks/results"),
    work: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Counts of what every environment answers to hostile actions."""
    envs.import_plugins(plugins or [])
    if work is not None:
        print(json.dumps(_told(Case(**json.loads(work)), actions, seconds, silence)))
        return
    file = out / "fuzz.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            cases = chosen(names or [], Path(folder))
        except UserError as error:
            raise typer.BadParameter(str(error)) from error
        for name, case in cases.items():
            rows[name] = fresh_process(case, plugins or [], actions, seconds)
            print(name, rows[name], file=sys.stderr)
            result = {"cores": os.cpu_count(), "load after": round(os.getloadavg()[0], 2), "rows": rows}
            keep(out, "fuzz", result, page(result))  # at once: all of them take long
    print(json.dumps(result, indent=1) if as_json else page(result))
    if any("problem" in rows[name] for name in cases):
        raise typer.Exit(1)


def _told(case: Case, actions: int, seconds: float, silence: float) -> dict[str, Any]:
    try:
        return worker(case, actions, seconds, silence)
    except MissingPart as error:
        return {"left_out": str(error).splitlines()[0], "seconds": 0}
    except EnvironmentContractError as error:
        return {"problem": str(error), "seconds": 0}


if __name__ == "__main__":
    typer.run(main)
