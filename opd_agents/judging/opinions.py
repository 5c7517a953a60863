"""What was said of which action."""

from __future__ import annotations

from collections.abc import Iterable

from opd_agents.types import ActionFeedback, Trajectory

BEST = 9  # of a score


class Opinions:
    """Feedback by action: its own, or else its episode's."""

    def __init__(self, feedback: Iterable[ActionFeedback]) -> None:
        self._known = {(one.trajectory, one.turn): one for one in feedback if one.replacement is None}

    def of(self, trajectory: str, turn: int | None) -> ActionFeedback | None:
        """Of an action, or with ``turn`` None of a whole episode; None where nothing was said."""
        own = self._known.get((trajectory, turn))
        return own or self._known.get((trajectory, None))

    def episode_score(self, trajectory: Trajectory) -> float | None:
        """An episode's score, 0 to 9, or the mean of those of its actions."""
        whole = self.of(trajectory.uid, None)
        if whole is not None and whole.score is not None:
            return float(whole.score)
        found = [self._known.get((trajectory.uid, turn)) for turn in range(len(trajectory.turns))]
        scores = [one.score for one in found if one is not None and one.score is not None]
        return sum(scores) / len(scores) if scores else None


NOTHING_SAID = Opinions(())
