"""Start-up and steps per second of every environment, beside the raw package and gymnasium's vector classes.

    python benchmarks/environments.py [NAME ...] [--repeats 3] [--seconds 1] [--json]

First the scripted expert plays EPISODES tasks (random calls where there is none); then everyone is sent these
actions, at most TURNS an episode: our environment, one by one and in rollouts of one and of AT_ONCE episodes
at a time, which make and close an environment for each; the package behind it (raw_environments.py); and for
some AT_ONCE copies in gymnasium's vector classes, which keep theirs. Each arm runs in processes of its own,
the arms alternating; a ratio is of neighbours. A start is from nothing but Python and this project to the
first observation, what the environment imports, compiles and launches included; everything is warm
afterwards. Environments that are not named keep their rows of the last run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import gymnasium
import typer
from cases import Case, chosen
from figures import keep, markdown, spread
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from raw_environments import RAW, Raw

from opd_agents import envs
from opd_agents.envs import AgentEnv
from opd_agents.envs.process import launch
from opd_agents.episode import Episode, Limits
from opd_agents.errors import OpdError, UserError
from opd_agents.policies import ExpertPolicy, RandomPolicy
from opd_agents.policies.base import Action, History, Policy
from opd_agents.rollout import rollout
from opd_agents.types import Actor, Outcome, StopReason, Task, Trajectory

EPISODES, TURNS, AT_ONCE = 8, 12, 8
PATIENCE = 300  # seconds for one process
EIGHT = f"rollout {AT_ONCE}"
VECTORS = ("OrderDesk", "BabyAI", "ShopText")
Episodes = list[list[str]]  # the actions of each


class Recorded:
    """Takes the actions that were recorded, by the task's number."""

    def __init__(self, actions: Episodes) -> None:
        self._actions = actions

    def act(self, histories: Sequence[History]) -> list[Action]:
        taken = [len(one.turns) for one in histories]
        texts = [self._actions[int(one.uid)][turn] for one, turn in zip(histories, taken, strict=True)]
        return [Action(Actor.EXPERT, StopReason.NOT_SAMPLED, text=text) for text in texts]


def _episodes(case: Case) -> list[Episode]:
    with closing(envs.make(case.id, **case.options)) as env:
        split, size = next(iter(env.split_sizes.items()))
    numbers = range(min(EPISODES, size))
    return [
        Episode(str(n), case.id, n, Task(str(n), split), (0, 0, n), env_kwargs=case.options) for n in numbers
    ]


def _played(episodes: Sequence[Episode], policy: Policy, at_once: int) -> list[Trajectory]:
    """Raises OSError for an episode that failed."""
    limits = Limits(max_turns=TURNS, max_live=at_once)
    played = rollout(episodes, policy, make=launch, chat=None, limits=limits, temperature=1.0)
    for one in played:
        if one.outcome is Outcome.ERROR:
            raise OSError(f"task {one.task.id}: {one.error}")
    return played


def record(case: Case) -> Episodes:
    with closing(envs.make(case.id, **case.options)) as env:
        expert = env.has_expert  # of some, a matter of the options
    played = _played(_episodes(case), ExpertPolicy() if expert else RandomPolicy(), AT_ONCE)
    return [[turn.action for turn in one.turns] for one in played]


class Ours:
    """Our environment as the raw ones are stepped."""

    def __init__(self, case: Case) -> None:
        self._env = envs.make(case.id, **case.options)
        self._split = next(iter(self._env.split_sizes))

    def reset(self, number: int) -> None:
        self._env.reset(seed=number, options={"task_id": str(number), "split": self._split})

    def play(self, actions: Sequence[str]) -> None:
        for action in actions:
            self._env.step(action)

    def close(self) -> None:
        self._env.close()


class Vector:
    """AT_ONCE copies of our environment, all in the same episode."""

    def __init__(self, case: Case, kind: str) -> None:
        make: list[Callable[[], AgentEnv]] = [partial(envs.make, case.id, **case.options)] * AT_ONCE
        self._envs: gymnasium.vector.VectorEnv[Any, Any, Any] = (
            SyncVectorEnv(make, autoreset_mode=AutoresetMode.DISABLED)
            if kind == "SyncVectorEnv"
            else AsyncVectorEnv(make, shared_memory=False, autoreset_mode=AutoresetMode.DISABLED)
        )

    def reset(self, number: int) -> None:
        self._envs.reset(seed=[number] * AT_ONCE, options={"task_id": str(number)})

    def play(self, actions: Sequence[str]) -> None:
        for action in actions:
            self._envs.step((action,) * AT_ONCE)

    def close(self) -> None:
        self._envs.close()


def arms(name: str) -> list[str]:
    vectors = ["SyncVectorEnv", "AsyncVectorEnv"] if name in VECTORS else []
    return ["ours", *(["raw"] if name in RAW else []), *vectors]


def worker(case: Case, arm: str, actions: Episodes, folder: Path, seconds: float) -> dict[str, Any]:
    """Seconds of the start and of a reset, and steps per second, of one arm."""
    opened = {"ours": lambda: Ours(case), "raw": lambda: RAW[case.name](folder)}
    start = time.perf_counter()
    subject: Raw = opened[arm]() if arm in opened else Vector(case, arm)
    with closing(subject):
        subject.reset(0)
        row: dict[str, Any] = {"start": time.perf_counter() - start}
        _timed(subject, actions, 0)  # for warming up
        taken = _timed(subject, actions, seconds)
    steps = sum(map(len, actions)) * (1 if arm in opened else AT_ONCE)
    row |= {"reset": median(reset for reset, _ in taken) / len(actions)}
    row |= {"steps": steps / median(play for _, play in taken)}
    row |= {"with resets": steps / median(reset + play for reset, play in taken)}
    if arm == "ours":
        row |= {f"rollout {n}": rate for n, rate in _rollouts(case, actions, seconds).items()}
    return row


def _rollouts(case: Case, actions: Episodes, seconds: float) -> dict[int, float]:
    """Steps per second of rollouts of one and of AT_ONCE episodes at a time, alternating."""
    episodes, policy, steps = _episodes(case), Recorded(actions), sum(map(len, actions))
    rates: dict[int, list[float]] = {1: [], AT_ONCE: []}
    _played(episodes, policy, AT_ONCE)  # for warming up
    begun = time.perf_counter()
    while not rates[1] or time.perf_counter() - begun < 2 * seconds:
        for at_once, found in rates.items():
            start = time.perf_counter()
            _played(episodes, policy, at_once)
            found.append(steps / (time.perf_counter() - start))
    return {at_once: median(found) for at_once, found in rates.items()}


def _timed(subject: Raw, actions: Episodes, seconds: float) -> list[tuple[float, float]]:
    """All episodes, again and again until ``seconds`` are over: (seconds of the resets, of the steps)."""
    taken: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while not taken or time.perf_counter() - begun < seconds:
        resets = plays = 0.0
        for number, episode in enumerate(actions):
            start = time.perf_counter()
            subject.reset(number)
            middle = time.perf_counter()
            subject.play(episode)
            resets, plays = resets + middle - start, plays + time.perf_counter() - middle
        taken.append((resets, plays))
    return taken


def in_process(case: Case, arm: str, actions: Episodes, seconds: float) -> Any:
    """One arm, or with "record" the actions. Raises OpdError and OSError."""
    with tempfile.TemporaryDirectory() as folder:
        # every process begins with an empty cache
        options = case.options | ({"cache": str(Path(folder, "games"))} if "cache" in case.options else {})
        case = Case(case.id, options)
        if arm == "record":
            return record(case)
        return worker(case, arm, actions, Path(folder), seconds)


def fresh_process(case: Case, arm: str, actions: Episodes, seconds: float) -> Any:
    """What :func:`in_process` gives in a process of its own."""
    work = {"id": case.id, "options": case.options, "arm": arm, "actions": actions, "seconds": seconds}
    command = [sys.executable, __file__, "--worker"]
    try:
        done = subprocess.run(
            command, input=json.dumps(work), capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"not done within {PATIENCE} s") from error
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    cases: Mapping[str, Case], repeats: int, seconds: float, run: Callable[..., Any] = fresh_process
) -> dict[str, Any]:
    """All arms of all cases; one that fails is told and left out."""
    rows: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    for name, case in cases.items():
        print(name, file=sys.stderr)
        try:
            rows += _rows(case, repeats, seconds, run)
        except (OSError, OpdError) as error:
            problems[name] = str(error)
    return {
        "episodes": EPISODES, "turns at most": TURNS, "cores": os.cpu_count(),
        "rows": rows, "left_out": problems,
    }  # fmt: skip


def _rows(case: Case, repeats: int, seconds: float, run: Callable[..., Any]) -> list[dict[str, Any]]:
    load, actions = os.getloadavg()[0], run(case, "record", [], seconds)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms(case.name)}
    for repeat in range(repeats):
        for arm in [*found][:: -1 if repeat % 2 else 1]:
            found[arm].append(run(case, arm, actions, seconds))
    rows: list[dict[str, Any]] = []
    for arm, results in found.items():
        row: dict[str, Any] = {"name": case.name, "arm": arm, "load": load, "processes": repeats}
        row |= {key: spread([result[key] for result in results]) for key in results[0]}
        if arm != "ours":
            ours = [result["with resets" if arm == "raw" else EIGHT] for result in found["ours"]]
            theirs = [result["with resets"] for result in results]
            row["ours_is_faster"] = spread([a / b for a, b in zip(ours, theirs, strict=True)])
        rows.append(row)
    return rows


def merged(last: Mapping[str, Any], result: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``result`` of the environments ``names``, with the rows of the ``last`` for the others."""
    kept = [row for row in last["rows"] if row["name"] not in names]
    left_out = {name: why for name, why in last["left_out"].items() if name not in names}
    rows = sorted([*kept, *result["rows"]], key=lambda row: str(row["name"]))
    return result | {"rows": rows, "left_out": left_out | result["left_out"]}


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown, and below it what was left out and why."""
    table = []
    for row in result["rows"]:
        vector = row["arm"].endswith("VectorEnv")
        table.append(
            {
                "part": row["name"] if row["arm"] == "ours" else "", "arm": row["arm"],
                "start, s": short(row["start"]), "reset, ms": short(row["reset"], 1000),
                "steps/s": "" if vector else short(row["steps"]),
                "rollout of 1": short(row["rollout 1"]) if row["arm"] == "ours" else "",
                f"of {AT_ONCE} at once": short(row["with resets"] if vector else row.get(EIGHT)),
                "ours is faster": short(row.get("ours_is_faster")),
                "processes": str(row["processes"]),
                "load": f"{row['load']:.0f}" if row["arm"] == "ours" else "",
            }
        )  # fmt: skip
    about = (
        "Median (min to max) of processes. Steps/s: of one environment, resets aside. Rollouts and vectors: "
        "steps/s with resets. Ours is faster, whole episodes: the environment over the raw package, the "
        "rollouts over a vector. Load: of the machine, as it began."
    )
    left_out = [f"Left out: {name}: {why}" for name, why in result["left_out"].items()]
    return "\n\n".join([markdown(about, result, table), *left_out]).strip() + "\n"


def short(values: Mapping[str, float] | None, times: float = 1) -> str:
    """A spread in three digits, empty for none."""
    if values is None:
        return ""
    scaled = [values[key] * times for key in ("median", "min", "max")]
    middle, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in scaled)
    return f"{middle} ({low} to {high})"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Environments, by default all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each arm.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="Timed in a process, at least one round.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Where environments.json and .md go.")] = Path(
        "benchmarks/results"
    ),
    work: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Start-up, reset and steps per second of the environments."""
    if work:
        given = json.loads(sys.stdin.read())
        case = Case(given["id"], given["options"])
        print("\n" + json.dumps(in_process(case, given["arm"], given["actions"], given["seconds"])))
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            cases = chosen(names or [], Path(folder))
        except UserError as error:
            raise typer.BadParameter(str(error)) from error
        for name, case in cases.items():  # each is kept at once: all of them take long
            result = measure({name: case}, repeats, seconds)
            if (file := out / "environments.json").exists():
                result = merged(json.loads(file.read_text(encoding="utf-8")), result, [name])
            keep(out, "environments", result, page(result))
    print(json.dumps(result, indent=1) if as_json else page(result))


if __name__ == "__main__":
    typer.run(main)
