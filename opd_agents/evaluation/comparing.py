"""Two policies on the same tasks, and one recipe over several training seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_agents.evaluation.metrics import by_task
from opd_agents.evaluation.rates import bootstrap, mcnemar, over_seeds
from opd_agents.types import Trajectory

OVER_SEEDS = ("success", "success_greedy", "reward", "turns", "invalid_calls", "recovery")


@dataclass(frozen=True, slots=True)
class Played:
    """All episodes of one policy, and what they took: ``seconds`` of wall clock, and what the policy
    counts."""

    sampled: Sequence[Trajectory]
    greedy: Sequence[Trajectory]
    spent: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Entry:
    """What was asked for by one name: a policy, or the runs of several seeds, by seed (None: it has none)."""

    name: str
    policies: Mapping[int | None, str]


def compare(baseline: Played, other: Played) -> dict[str, Any]:
    """How much more often ``other`` succeeds on the tasks that both played.

    ``difference`` is the mean over tasks of the difference of success rates, ``interval`` its bootstrap over
    tasks, paired: what makes a task hard for both cancels. ``mcnemar`` is of one episode a task, the first
    sample: how many tasks ``baseline_only`` and ``other_only`` solved, and the exact two-sided p-value.
    ``greedy`` holds the same of the greedy episodes.
    """
    return _paired(baseline.sampled, other.sampled) | {"greedy": _paired(baseline.greedy, other.greedy)}


def _paired(baseline: Sequence[Trajectory], other: Sequence[Trajectory]) -> dict[str, Any]:
    theirs = by_task(other)
    pairs = [(one, theirs[key]) for key, one in by_task(baseline).items() if key in theirs]
    differences = [_rate(b) - _rate(a) for a, b in pairs]
    solved = [(a[0].success, b[0].success) for a, b in pairs]
    first, second = solved.count((True, False)), solved.count((False, True))
    return {
        "tasks": len(pairs), "difference": sum(differences) / len(pairs),
        "interval": bootstrap(differences, [1] * len(pairs)),
        "mcnemar": {"baseline_only": first, "other_only": second, "p": mcnemar(first, second)},
    }  # fmt: skip


def comparisons(entries: Sequence[Entry], played: Mapping[str, Played]) -> list[dict[str, Any]]:
    """Every policy beside the first one; the runs of several seeds beside that of the same seed, where the
    first is of several seeds, too."""
    first, *others = entries
    found = []
    for entry in others:
        for seed, policy in entry.policies.items():
            baseline = first.policies.get(seed, first.policies.get(None))
            if baseline is not None and baseline != policy:
                row = compare(played[baseline], played[policy])
                found.append({"policy": policy, "baseline": baseline} | row)
    return found


def seeds(entries: Sequence[Entry], rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the training seeds of each name that has several, with t-intervals: they hold for another
    run of the recipe, which the intervals of one policy do not. ``difference`` is to the first name's, of
    equal seeds, where it has them."""
    first = entries[0].policies
    found = []
    for entry in entries:
        if None in entry.policies:
            continue
        row: dict[str, Any] = {"policy": entry.name, "seeds": list(entry.policies)}
        for key in OVER_SEEDS:
            values = [rows[policy][key] for policy in entry.policies.values()]
            if None not in values:
                row[key] = over_seeds(values)
        if entry is not entries[0] and entry.policies.keys() == first.keys():
            gains = [rows[p]["success"] - rows[first[s]]["success"] for s, p in entry.policies.items()]
            row["difference"] = over_seeds(gains)
        found.append(row)
    return found


def _rate(trajectories: Sequence[Trajectory]) -> float:
    return sum(t.success for t in trajectories) / len(trajectories)
