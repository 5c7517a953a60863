"""What the student does in a state in which an action of its was repaired -> whether a judge finds that it
amounts to the repair or to that action, where carrying it out has not shown it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from opd_agents.api.wire import Request
from opd_agents.config.judge import Judge
from opd_agents.envs.actions import same_action
from opd_agents.judging.judge import Asks, ToolsOf
from opd_agents.judging.prompts import SAMENESS, sameness_messages
from opd_agents.types import ActionFeedback, KeyStep, Trajectory

KEYS: Mapping[str, KeyStep] = MappingProxyType(
    {"first": KeyStep.REPAIR, "second": KeyStep.OWN, "neither": KeyStep.OTHER}
)


class Practised(NamedTuple):
    """``rollouts`` of the student from the state before turn ``turn`` of ``parent``, where ``repair`` was
    done in the place of its action."""

    parent: Trajectory
    turn: int
    repair: str  # as the environment got it
    rollouts: Sequence[Trajectory]


@dataclass(frozen=True, slots=True)
class Compared:
    """``keys``: by the uid of each rollout that was judged, whose action it begins with; ``feedback`` has the
    reasons. Of ``judged`` actions, equal ones in a state counted once, ``failed`` had no answer."""

    keys: Mapping[str, KeyStep] = field(default_factory=dict)
    feedback: tuple[ActionFeedback, ...] = ()
    judged: int = 0
    failed: int = 0


NOT_COMPARED = Compared()


def judge_key_steps(
    asks: Asks, settings: Judge, practised: Sequence[Practised], tools_of: ToolsOf
) -> Compared:
    """Which of the key steps that are neither's by execution (see `practice.key_step`) a judge finds to be
    the repair, or the student's former action, in other words.

    One request for all equal actions at a state, none for an action that could not be read. What has no
    answer stays what it is.
    """
    asked = [(case, alike) for case in practised for alike in _unknown(case)]
    messages = [_messages(settings, case, alike[0], tools_of) for case, alike in asked]
    requests = [Request(one, schema=SAMENESS, max_tokens=settings.max_tokens) for one in messages]
    keys: dict[str, KeyStep] = {}
    feedback: list[ActionFeedback] = []
    failed = 0
    for (case, alike), reply in zip(asked, asks.ask(requests) if requests else (), strict=True):
        if reply.failure is not None:
            failed += 1
            continue
        keys |= {one.uid: KEYS[reply.data["amounts_to"]] for one in alike}
        feedback += [ActionFeedback(one.uid, case.turn, reason=reply.data["reason"]) for one in alike]
    return Compared(keys, tuple(feedback), len(asked), failed)


def _unknown(case: Practised) -> list[list[Trajectory]]:
    """The rollouts whose key step is still neither's and can be read, those with equal actions together."""
    groups: list[list[Trajectory]] = []
    for one in case.rollouts:
        known = one.branch is None or one.branch.key is not KeyStep.OTHER
        if known or len(one.turns) <= case.turn or one.turns[case.turn].parse_error is not None:
            continue
        action = one.turns[case.turn].action
        alike = (group for group in groups if same_action(group[0].turns[case.turn].action, action))
        group = next(alike, None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return groups


def _messages(
    settings: Judge, case: Practised, one: Trajectory, tools_of: ToolsOf
) -> tuple[dict[str, str], ...]:
    """Of actions alone, as the environment got them; of one that could not be read, what was written."""
    own, tools = case.parent.turns[case.turn], tools_of(case.parent)
    before = replace(case.parent, turns=case.parent.turns[: case.turn])
    second = own.text if own.parse_error else own.action
    return sameness_messages(settings, before, tools, one.turns[case.turn].action, case.repair, second)
