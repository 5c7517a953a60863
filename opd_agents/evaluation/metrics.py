"""Figures of a set of episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opd_agents.types import Outcome, Trajectory

if TYPE_CHECKING:
    from rich.table import Table


# Spent on making a policy, by its key, with the column's label.
COSTS = {"generated_tokens": "tokens", "teacher_tokens": "teacher", "flops": "FLOPs", "seconds": "seconds"}


def wilson(successes: int, episodes: int) -> list[float]:
    """95 % Wilson score interval of a success rate."""
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return [round(float(interval.low), 6), round(float(interval.high), 6)]


def summarise(sampled: Sequence[Trajectory], greedy: Sequence[Trajectory]) -> dict[str, Any]:
    """``success``, ``turns``, ``invalid_calls`` and ``tokens_per_episode`` are means of the sampled episodes;
    an episode that failed by an error counts as no success and in ``errors``."""
    n = len(sampled)
    wins, greedy_wins = sum(t.success for t in sampled), sum(t.success for t in greedy)
    return {
        "episodes": n,
        "success": wins / n,
        "interval": wilson(wins, n),
        "success_greedy": greedy_wins / len(greedy),
        "interval_greedy": wilson(greedy_wins, len(greedy)),
        "turns": sum(len(t.turns) for t in sampled) / n,
        "invalid_calls": sum(invalid_calls(t) for t in sampled) / n,
        "errors": sum(t.outcome is Outcome.ERROR for t in sampled),
        "tokens_per_episode": sum(t.n_action_tokens for t in sampled) / n,
    }


def invalid_calls(trajectory: Trajectory) -> int:
    """Turns whose text was no valid action."""
    return sum(turn.parse_error is not None for turn in trajectory.turns)


def table(result: Mapping[str, Any]) -> Table:
    """A rich table of an evaluation's policies, 80 columns wide; with what they cost to make, where known."""
    from rich.table import Table

    rows = result["policies"]
    costs = {name: label for name, label in COSTS.items() if name in rows[0]}
    view = Table(
        title=f"{result['suite']}: success in % (95 % Wilson interval), turns and invalid calls an episode",
        box=None, padding=(0, 1, 0, 0), header_style="bold", title_justify="left",
    )  # fmt: skip
    view.add_column("policy", no_wrap=True)
    for label in ("sampled", "greedy", "turns", "invalid", *costs.values()):
        view.add_column(label, justify="right", no_wrap=True)
    for row in rows:
        low, high = (round(100 * bound) for bound in row["interval"])
        view.add_row(
            row["policy"] + (f" ({row['errors']} errors)" if row["errors"] else ""),
            f"{100 * row['success']:.1f} ({low}-{high})", f"{100 * row['success_greedy']:.1f}",
            f"{row['turns']:.1f}", f"{row['invalid_calls']:.2f}", *(_short(row[name]) for name in costs),
        )  # fmt: skip
    return view


def _short(value: float) -> str:
    """Three digits with a unit: 412k, 1.46T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
