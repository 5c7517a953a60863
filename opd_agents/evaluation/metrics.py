"""Figures of a set of episodes. An *error* of an agent is a turn whose text was no valid action, or in which
the environment refused a call or a tool failed; an episode that the environment itself broke is in ``errors``
and counts as no success."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from opd_agents.evaluation.rates import bootstrap, pass_all, pass_at, wilson
from opd_agents.types import Outcome, Trajectory, to_json

TaskKey: TypeAlias = tuple[str, str, str, str]  # environment, its arguments, split, id


def task_key(trajectory: Trajectory) -> TaskKey:
    """Which task an episode was of."""
    task = trajectory.task
    return trajectory.env_id, to_json(trajectory.env_kwargs), task.split, task.id


def by_task(trajectories: Iterable[Trajectory]) -> dict[TaskKey, list[Trajectory]]:
    """The episodes of each task, both in the order given."""
    found: dict[TaskKey, list[Trajectory]] = {}
    for trajectory in trajectories:
        found.setdefault(task_key(trajectory), []).append(trajectory)
    return found


def summarise(sampled: Sequence[Trajectory], greedy: Sequence[Trajectory]) -> dict[str, Any]:
    """All figures; but for the greedy rate they are of the sampled episodes.

    ``success`` is the share of episodes that succeeded, ``interval`` its Wilson interval and
    ``interval_tasks`` that of a bootstrap over tasks; ``success_greedy`` and ``interval_greedy`` are of one
    greedy episode a task. ``pass_at`` and ``pass_all`` (pass^k) are means over tasks, by k: the powers of 2
    up to the fewest samples of a task, and that number. Means per episode: ``reward``, ``turns``,
    ``invalid_calls``, ``refused_calls``, ``repeated_calls``, ``tokens_per_episode`` (that a model wrote).
    ``tokens_per_success`` divides all tokens by the number of successes. ``first_error_turn`` (the first turn
    is 1) and ``recovery`` (the share that succeeded all the same, with its Wilson interval) are of the
    ``with_error`` episodes in which the agent made an error. What is not defined is None. ``errors`` and
    ``unfinished`` (a budget of turns or tokens ended them) count episodes.
    """
    n, wins, greedy_wins = len(sampled), _wins(sampled), _wins(greedy)
    tasks = list(by_task(sampled).values())
    tokens = sum(t.n_action_tokens for t in sampled)
    first_errors = [(t, turn) for t in sampled if (turn := first_error(t)) is not None]
    recovered = _wins([t for t, _ in first_errors])
    return {
        "episodes": n, "tasks": len(tasks),
        "success": wins / n, "interval": wilson(wins, n),
        "interval_tasks": bootstrap([_wins(task) for task in tasks], [len(task) for task in tasks]),
        "success_greedy": greedy_wins / len(greedy), "interval_greedy": wilson(greedy_wins, len(greedy)),
        **_passes(tasks),
        "reward": sum(t.reward for t in sampled) / n,
        "turns": sum(len(t.turns) for t in sampled) / n,
        "invalid_calls": sum(map(invalid_calls, sampled)) / n,
        "refused_calls": sum(map(refused_calls, sampled)) / n,
        "repeated_calls": sum(map(repeated_calls, sampled)) / n,
        "with_error": len(first_errors),
        "first_error_turn": _ratio(sum(turn for _, turn in first_errors), len(first_errors)),
        "recovery": _ratio(recovered, len(first_errors)),
        "interval_recovery": wilson(recovered, len(first_errors)) if first_errors else None,
        "errors": sum(t.outcome is Outcome.ERROR for t in sampled),
        "unfinished": sum(t.outcome is Outcome.UNFINISHED for t in sampled),
        "tokens_per_episode": tokens / n, "tokens_per_success": _ratio(tokens, wins),
    }  # fmt: skip


def brief(sampled: Sequence[Trajectory]) -> dict[str, Any]:
    """The figures of a group of episodes."""
    n, wins = len(sampled), _wins(sampled)
    return {
        "tasks": len(by_task(sampled)), "episodes": n, "success": wins / n, "interval": wilson(wins, n),
        "reward": sum(t.reward for t in sampled) / n, "turns": sum(len(t.turns) for t in sampled) / n,
    }  # fmt: skip


def _passes(tasks: Sequence[Sequence[Trajectory]]) -> dict[str, Mapping[str, float]]:
    """pass@k and pass^k; the keys of JSON are strings."""
    fewest = min(len(task) for task in tasks)
    ks = sorted({2**i for i in range(fewest.bit_length())} | {fewest})
    counts = [(len(task), _wins(task)) for task in tasks]
    return {
        name: {str(k): sum(chance(k, n, c) for n, c in counts) / len(counts) for k in ks}
        for name, chance in (("pass_at", pass_at), ("pass_all", pass_all))
    }


def invalid_calls(trajectory: Trajectory) -> int:
    """Turns whose text was no valid action."""
    return sum(turn.parse_error is not None for turn in trajectory.turns)


def refused_calls(trajectory: Trajectory) -> int:
    """Turns with a valid action in which the environment refused a call, or a tool failed."""
    return sum(turn.tool_error is not None for turn in trajectory.turns)


def repeated_calls(trajectory: Trajectory) -> int:
    """Turns with calls that an earlier turn made, too, all of them with the same arguments and in the same
    state of the environment: they can tell the agent nothing new, except where the environment is noisy."""
    seen: set[tuple[str, str]] = set()
    repeated = 0
    for turn in trajectory.turns:
        if turn.calls:
            key = (turn.state_digest, to_json(turn.calls))
            repeated += key in seen
            seen.add(key)
    return repeated


def first_error(trajectory: Trajectory) -> int | None:
    """The turn, counted from 1, of the agent's first error."""
    for number, turn in enumerate(trajectory.turns, 1):
        if turn.parse_error is not None or turn.tool_error is not None:
            return number
    return None


def _wins(trajectories: Iterable[Trajectory]) -> int:
    return sum(t.success for t in trajectories)


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None
