"""Success by environment, difficulty, tool and horizon, and without tasks that are known to be bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_agents.evaluation.metrics import TaskKey, brief, by_task, task_key
from opd_agents.evaluation.rates import wilson
from opd_agents.evaluation.suites import Suite, SuiteEnvironment
from opd_agents.types import Trajectory, to_json

UNSOLVED = "unsolved"


def shortest_solutions(sampled: Sequence[Sequence[Trajectory]]) -> dict[TaskKey, int]:
    """The fewest turns in which any of the policies solved each task that one solved: its horizon. With
    `expert` among them it is the expert's, or less."""
    found: dict[TaskKey, int] = {}
    for trajectory in (t for trajectories in sampled for t in trajectories if t.success):
        key = task_key(trajectory)
        found[key] = min(found.get(key, len(trajectory.turns)), len(trajectory.turns))
    return found


def breakdown(
    suite: Suite, sampled: Sequence[Trajectory], horizons: Mapping[TaskKey, int]
) -> dict[str, dict[str, Any]]:
    """Figures of the sampled episodes by ``environment``; by ``difficulty``, where the suite or an
    environment's `level` names one; by ``horizon``, the fewest turns that a task takes, in powers of 2; and
    by ``tool``: of the episodes that called it, with its ``calls`` and the ``refused_turns`` in which it was
    called and a call was refused."""
    sources = {(e.id, to_json(e.options)): e for e in suite.environments}

    def source(trajectory: Trajectory) -> SuiteEnvironment:
        return sources[trajectory.env_id, to_json(trajectory.env_kwargs)]

    def horizon(trajectory: Trajectory) -> str:
        turns = horizons.get(task_key(trajectory))
        return UNSOLVED if turns is None else _bucket(turns)

    labels = suite.labels()
    groups = {
        "environment": _grouped(sampled, lambda t: labels[t.env_id, to_json(t.env_kwargs)]),
        "difficulty": _grouped(sampled, lambda t: source(t).difficulty_name),
        "horizon": dict(sorted(_grouped(sampled, horizon).items(), key=lambda item: _first(item[0]))),
    }
    return {name: found for name, found in groups.items() if found} | {"tool": _by_tool(sampled)}


def without_known_bad(
    suite: Suite, sampled: Sequence[Trajectory], greedy: Sequence[Trajectory]
) -> dict[str, Any] | None:
    """The rates without the tasks that the suite lists as ``known_bad``, and how many of those were played;
    None where none was."""
    bad = {(e.id, to_json(e.options), task) for e in suite.environments for task in e.known_bad}

    def good(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        return [t for t in trajectories if (t.env_id, to_json(t.env_kwargs), t.task.id) not in bad]

    kept, kept_greedy = good(sampled), good(greedy)
    excluded = len(by_task(sampled)) - len(by_task(kept))
    if not excluded or not kept:
        return None
    wins, greedy_wins = sum(t.success for t in kept), sum(t.success for t in kept_greedy)
    return {
        "excluded": excluded, "episodes": len(kept), "success": wins / len(kept),
        "interval": wilson(wins, len(kept)), "success_greedy": greedy_wins / len(kept_greedy),
        "interval_greedy": wilson(greedy_wins, len(kept_greedy)),
    }  # fmt: skip


def _grouped(
    sampled: Sequence[Trajectory], name: Callable[[Trajectory], str | None]
) -> dict[str, dict[str, Any]]:
    """Figures by name, in the order of their first episodes; those without a name are left out."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in sampled:
        if (group := name(trajectory)) is not None:
            groups.setdefault(group, []).append(trajectory)
    return {group: brief(trajectories) for group, trajectories in groups.items()}


def _by_tool(sampled: Sequence[Trajectory]) -> dict[str, dict[str, Any]]:
    users: dict[str, list[Trajectory]] = {}
    calls: dict[str, int] = {}
    refused: dict[str, int] = {}
    for trajectory in sampled:
        for turn in trajectory.turns:
            for call in turn.calls:
                calls[call.name] = calls.get(call.name, 0) + 1
            for name in {call.name for call in turn.calls}:
                refused[name] = refused.get(name, 0) + (turn.tool_error is not None)
        for name in {call.name for turn in trajectory.turns for call in turn.calls}:
            users.setdefault(name, []).append(trajectory)
    return {
        name: {"calls": calls[name], "refused_turns": refused[name]} | brief(users[name])
        for name in sorted(users, key=lambda name: (-calls[name], name))
    }


def _bucket(turns: int) -> str:
    """1, 2, 3-4, 5-8, ...: the power of 2 that it takes."""
    high = 1 << max(turns - 1, 0).bit_length()
    return str(high) if high < 3 else f"{high // 2 + 1}-{high}"


def _first(bucket: str) -> float:
    return float("inf") if bucket == UNSOLVED else int(bucket.partition("-")[0])
