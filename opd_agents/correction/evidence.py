"""What re-rollouts prove of a repair: Bayesian comparison of success rates, decided in looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, lgamma
from typing import Literal

from opd_agents.types import Outcome, Trajectory

Verdict = Literal["accepted", "rejected", "open"]


@dataclass(frozen=True, slots=True)
class Arm:
    """``wins`` of ``played`` rollouts, all of them fresh. One whose environment failed is not counted: it is
    evidence of nothing."""

    wins: int = 0
    played: int = 0

    @staticmethod
    def of(trajectories: Iterable[Trajectory]) -> Arm:
        played = [one.success for one in trajectories if one.outcome is not Outcome.ERROR]
        return Arm(sum(played), len(played))

    @property
    def share(self) -> float | None:
        return self.wins / self.played if self.played else None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Rollouts after the ``repair``, and of each of its rivals: after the student's ``own`` action, and of a
    ``retry`` of its own from the same state. Where there is no rival one success is proof enough, as in
    SCoRe (arXiv 2509.14257)."""

    repair: Arm
    rivals: Mapping[str, Arm]

    @property
    def played(self) -> int:
        """Rollouts of all arms."""
        return self.repair.played + sum(arm.played for arm in self.rivals.values())

    @property
    def better(self) -> float:
        """The least probability with which the repair succeeds more often than a rival."""
        if not self.rivals:
            return float(self.repair.wins > 0)
        return min(probability_better(self.repair, rival) for rival in self.rivals.values())

    @property
    def gain(self) -> float | None:
        """Its success rate, less that of the best rival."""
        shares = [arm.share for arm in self.rivals.values()]
        known = [share for share in shares if share is not None]
        return self.repair.share - max(known) if known and self.repair.share is not None else None


def probability_better(one: Arm, other: Arm) -> float:
    """P(p > q) for success rates p of ``one`` and q of ``other`` with flat priors, Beta(1, 1).

    With p ~ Beta(a, b), a an integer, it is the sum over i < a of
    B(c + i, b + d) / ((b + i) B(1 + i, b) B(c, d)), q ~ Beta(c, d).
    """
    if one == other:  # to the last digit: whether to look again hangs on it
        return 0.5
    a, b = 1 + one.wins, 1 + one.played - one.wins
    c, d = 1 + other.wins, 1 + other.played - other.wins
    terms = (_log_beta(c + i, b + d) - _log_beta(1 + i, b) - _log_beta(c, d) for i in range(a))
    return sum(exp(term) / (b + i) for i, term in enumerate(terms))


def decide(evidence: Evidence, *, accept: float, stop: float, last: bool) -> Verdict:
    """Accepted at a probability of ``accept``; rejected below ``stop``, where not one rollout after it has
    succeeded, and where a ``last`` look leaves it open."""
    if (better := evidence.better) >= accept:
        return "accepted"
    hopeless = better < stop or evidence.repair.wins == 0
    return "rejected" if last or hopeless else "open"


def false_verdicts(audited: Sequence[tuple[bool, Evidence]]) -> tuple[int, int]:
    """Of repairs (accepted, what fresh rollouts say) how many were accepted though they are more likely no
    better than a rival, and how many rejected though they are better with a probability of .975."""
    accepted = sum(was and found.better < 0.5 for was, found in audited)
    return accepted, sum(not was and found.better >= 0.975 for was, found in audited)


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
