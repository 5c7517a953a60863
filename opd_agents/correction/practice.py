"""What the student does in a state in which its action was repaired: the key step (SCoRe, arXiv 2509.14257),
and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from opd_agents.correction.evidence import Arm, Evidence
from opd_agents.correction.states import effect
from opd_agents.envs.actions import same_action
from opd_agents.types import KeyStep, Outcome, Trajectory

PUBLISHED: Mapping[KeyStep, float] = MappingProxyType(
    {KeyStep.REPAIR: 0.5, KeyStep.OWN: 0.0, KeyStep.OTHER: 0.1}
)


def key_step(
    one: Trajectory, parent: Trajectory, turn: int, repair: str, arms: Mapping[str, Sequence[Trajectory]]
) -> KeyStep:
    """Whose action ``one`` takes at ``turn``: that of the ``repair``, as the environment got it, or that of
    ``parent``, by its text or by execution, where the environment gave the same answer and was left in the
    same state as in one of these rollouts."""
    if len(one.turns) <= turn:  # its environment failed
        return KeyStep.OTHER
    for key, text, known in (
        (KeyStep.REPAIR, repair, arms["repair"]),
        (KeyStep.OWN, parent.turns[turn].action, [parent, *arms.get("own", ())]),
    ):
        tried = (other for other in known if len(other.turns) > turn)
        same = same_action(one.turns[turn].action, text)
        if same or any(effect(one, turn) == effect(other, turn) for other in tried):
            return key
    return KeyStep.OTHER


def worth(key: KeyStep, evidence: Evidence, practised: Sequence[Trajectory]) -> float | None:
    """V(after) - V(before) in the student's success rate, by the rollouts that verified the repair; V(before)
    by its own tries there, the rival's where there was one or else those that are ``practised``. None for an
    action that was not verified."""
    before = evidence.rivals.get("retry", Arm.of(practised)).share
    known = {KeyStep.REPAIR: evidence.repair, KeyStep.OWN: evidence.rivals.get("own", Arm())}
    after = known.get(key, Arm()).share
    return None if after is None or before is None else after - before


def published_reward(one: Trajectory) -> float:
    """The reward of an episode as SCoRe's code has it: 1 of success, 0 of one that does not come to an end or
    whose only action is the key step, or that has none; else .5, 0 or .1."""
    if one.success:
        return 1.0
    if one.branch is None or one.branch.key is None:
        return 0.0
    if one.outcome is not Outcome.FAILURE or len(one.turns) == one.branch.turn + 1:
        return 0.0
    return PUBLISHED[one.branch.key]


def match_reward(one: Trajectory, turn: int) -> float:
    """Of the key step alone: .5 where it is the repair, else 0; NaN of other turns."""
    if one.branch is None or one.branch.key is None or turn != one.branch.turn:
        return math.nan
    return 0.5 if one.branch.key is KeyStep.REPAIR else 0.0


def value_reward(one: Trajectory, turn: int) -> float:
    """Of the key step alone its worth; NaN where that is unknown, and of other turns."""
    if one.branch is None or one.branch.worth is None or turn != one.branch.turn:
        return math.nan
    return one.branch.worth
