"""Two actions at one state -> which of them a judge prefers, asked twice, with the two in either order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from opd_agents.api.wire import Request
from opd_agents.config.judge import Judge
from opd_agents.judging.judge import Asks, ToolsOf
from opd_agents.judging.prompts import PREFERENCE, preference_messages
from opd_agents.types import ActionFeedback, Trajectory


@dataclass(frozen=True, slots=True)
class Preferred:
    """``better``: of the pairs that were decided, by the other's uid, whether the other's action is better
    than the student's. Of ``judged`` pairs ``ties`` had two answers that disagree, ``failed`` less than two
    answers."""

    better: Mapping[str, bool] = field(default_factory=dict)
    feedback: tuple[ActionFeedback, ...] = ()  # on the other's actions, with the first answer's reason
    judged: int = 0
    ties: int = 0
    failed: int = 0

    def metrics(self) -> dict[str, float | None]:
        """``alternatives/better``: the share of the decided pairs whose better action is the other's; nothing
        where no judge was asked."""
        if not self.judged:
            return {}
        decided = len(self.better)
        return {
            "alternatives/judged": self.judged,
            "alternatives/ties": self.ties,
            "alternatives/undecided": self.failed,
            "alternatives/better": sum(self.better.values()) / decided if decided else None,
        }


NO_PREFERENCE = Preferred()


def judge_preferences(
    asks: Asks,
    settings: Judge,
    others: Sequence[Trajectory],
    parent_of: Callable[[Trajectory], Trajectory],
    tools_of: ToolsOf,
) -> Preferred:
    """Whether the last action of each of ``others`` is better than what was done at that turn of its parent.

    Two requests a pair: a judge that prefers whichever stands first (or second) contradicts itself, and that
    is a tie. An answer that could not be had decides nothing.
    """
    pairs = [(parent_of(one), one) for one in others]
    requests = []
    for parent, one in pairs:
        *before, own = parent.turns[: len(one.turns)]
        state, tools = replace(parent, turns=tuple(before)), tools_of(parent)
        for shown in ((own, one.turns[-1]), (one.turns[-1], own)):
            messages = preference_messages(settings, state, tools, *shown)
            requests.append(Request(messages, schema=PREFERENCE, max_tokens=settings.max_tokens))
    replies = asks.ask(requests) if requests else []
    better: dict[str, bool] = {}
    feedback: list[ActionFeedback] = []
    ties = failed = 0
    for one, first, second in zip(others, replies[::2], replies[1::2], strict=True):
        if first.failure is not None or second.failure is not None:
            failed += 1
        elif first.data["better"] == second.data["better"]:  # the same place, and so the other action
            ties += 1
        else:
            better[one.uid] = first.data["better"] == "second"
            feedback.append(ActionFeedback(one.uid, len(one.turns) - 1, reason=first.data["reason"]))
    return Preferred(better, tuple(feedback), len(others), ties, failed)
