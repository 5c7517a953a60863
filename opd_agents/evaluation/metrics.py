"""Figures of a set of episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opd_agents.types import Outcome, Trajectory

if TYPE_CHECKING:
    from rich.table import Table


def wilson(successes: int, episodes: int) -> list[float]:
    """95 % Wilson score interval of a success rate."""
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return [round(float(interval.low), 6), round(float(interval.high), 6)]


def summarise(sampled: Sequence[Trajectory], greedy: Sequence[Trajectory]) -> dict[str, Any]:
    """``success`` and ``turns``, ``invalid_calls``, ``tokens_per_episode`` (means) are of the sampled episodes;
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
    """A rich table of an evaluation's policies."""
    from rich.table import Table

    view = Table(title=f"{result['suite']}: success with 95 % Wilson intervals")
    for column in ("policy", "success", "interval", "greedy", "turns", "invalid calls", "errors", "episodes"):
        view.add_column(column, justify="left" if column == "policy" else "right")
    for row in result["policies"]:
        low, high = row["interval"]
        view.add_row(
            row["policy"], f"{row['success']:.1%}", f"{low:.1%} to {high:.1%}", f"{row['success_greedy']:.1%}",
            f"{row['turns']:.1f}", f"{row['invalid_calls']:.2f}", str(row["errors"]), str(row["episodes"]),
        )  # fmt: skip
    return view
