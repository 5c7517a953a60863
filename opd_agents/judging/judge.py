"""Finished episodes -> what a judge says of them, one request an episode.

An answer that could not be had, or that leaves an action out, is no feedback: it is counted, and whoever uses
feedback says what it takes the place of. It is never a score of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from opd_agents.api.wire import Reply, Request
from opd_agents.config.judge import Judge
from opd_agents.envs.actions import BadAction, format_calls, parse_action
from opd_agents.judging.leaks import leaks
from opd_agents.judging.prompts import CORRECTION, correction_messages, judgement, judging_messages
from opd_agents.types import ActionFeedback, Actor, Outcome, ToolSpec, Trajectory, Verdict

ToolsOf: TypeAlias = Callable[[Trajectory], Sequence[ToolSpec]]
"""The tools of an episode's environment."""


class Asks(Protocol):
    """Who answers: an API client, or whatever a test puts in its place."""

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """All answers, in order; what went wrong is in them."""
        ...


class Judging(Protocol):
    """A teacher that can judge."""

    @property
    def client(self) -> Asks: ...


@dataclass(frozen=True, slots=True)
class Judged:
    """``asked`` counts episodes, ``failed`` those of them without an answer, ``missing`` the actions that an
    answer leaves out; of corrections ``leaked`` those that were refused."""

    feedback: tuple[ActionFeedback, ...] = ()
    asked: int = 0
    failed: int = 0
    missing: int = 0
    leaked: int = 0

    def and_then(self, later: Judged) -> Judged:
        """Both together."""
        return Judged(
            self.feedback + later.feedback, self.asked + later.asked, self.failed + later.failed,
            self.missing + later.missing, self.leaked + later.leaked,
        )  # fmt: skip

    def metrics(self) -> dict[str, float | None]:
        """Of the answers: the mean score, the share of each verdict, and how many there are."""
        scores = [one.score for one in self.feedback if one.score is not None]
        verdicts = [one.verdict for one in self.feedback if one.verdict is not None]
        row: dict[str, float | None] = {
            "judge/asked": self.asked, "judge/failed": self.failed, "judge/missing": self.missing,
            "judge/feedback": len(self.feedback),
        }  # fmt: skip
        row |= {"judge/score": sum(scores) / len(scores)} if scores else {}
        return row | {f"judge/{v}": verdicts.count(v) / len(verdicts) for v in Verdict if verdicts}


NOT_ASKED = Judged()


def judge_episodes(
    asks: Asks,
    settings: Judge,
    trajectories: Sequence[Trajectory],
    tools_of: ToolsOf,
    stream: tuple[int, int],
) -> Judged:
    """What is said of the student's episodes among these, or of a ``share`` of them that ``stream`` (seed,
    step) draws: of each action of the student's, or of the episode. Environments' failures are not judged."""
    own = {
        index: turns
        for index, one in enumerate(trajectories)
        if one.branch is None and (turns := judged_turns(one))
    }
    count = max(1, round(settings.share * len(own))) if own and settings.ask else 0
    random = np.random.Generator(np.random.Philox(key=list(stream), counter=[0, 0, 5, 2**63]))
    places = np.array(list(own), dtype=np.int64)
    chosen = sorted(random.permutation(places)[:count].tolist())
    asked = [(trajectories[index], own[index]) for index in chosen]
    schema = judgement(settings)
    requests = [
        Request(
            judging_messages(settings, one, tools_of(one), turns),
            schema=schema,
            max_tokens=settings.max_tokens,
        )
        for one, turns in asked
    ]
    feedback: list[ActionFeedback] = []
    failed = missing = 0
    for (one, turns), reply in zip(asked, asks.ask(requests) if requests else (), strict=True):
        if reply.failure is not None:
            failed += 1
            continue
        if settings.per == "episode":
            feedback.append(_feedback(one.uid, None, reply.data))
            continue
        said = {item["number"] - 1: item for item in reversed(reply.data["actions"])}  # the first, if twice
        feedback += [_feedback(one.uid, turn, said[turn]) for turn in turns if turn in said]
        missing += sum(turn not in said for turn in turns)
    return Judged(tuple(feedback), len(asked), failed, missing)


def judge_corrections(
    asks: Asks, settings: Judge, trajectories: Sequence[Trajectory], tools_of: ToolsOf
) -> Judged:
    """The earliest error of each of these episodes, with a replacement for it: where the judge finds one at
    an action of the student's, and the replacement says nothing that the student could not know there."""
    requests = [
        Request(
            correction_messages(settings, one, tools_of(one)),
            schema=CORRECTION,
            max_tokens=settings.max_tokens,
        )
        for one in trajectories
    ]
    feedback: list[ActionFeedback] = []
    failed = leaked = 0
    for one, reply in zip(trajectories, asks.ask(requests) if requests else (), strict=True):
        if reply.failure is not None:
            failed += 1
            continue
        turn, action = reply.data["number"] - 1, _canonical(reply.data["replacement"])
        if turn not in judged_turns(one) or not action:
            continue
        if leaks(action, one, turn, tools_of(one)):
            leaked += 1
            continue
        feedback.append(ActionFeedback(one.uid, turn, replacement=action, reason=reply.data["reason"]))
    return Judged(tuple(feedback), len(trajectories), failed, leaked=leaked)


def judged_turns(trajectory: Trajectory) -> list[int]:
    """The student's own actions in an episode that it played; of a branch those after the other action."""
    branch = trajectory.branch
    theirs = (branch is not None and not branch.tried) or trajectory.demonstration or trajectory.recorded
    if theirs or trajectory.outcome is Outcome.ERROR:
        return []
    first = 0 if branch is None else branch.turn + 1
    turns = enumerate(trajectory.turns)
    return [index for index, turn in turns if index >= first and turn.actor is Actor.STUDENT]


def _canonical(action: str) -> str:
    """An action as environments get it; as it is where it cannot be read."""
    try:
        calls = parse_action(action)
    except BadAction:
        return action.strip()
    return format_calls(calls) if calls else action.strip()


def _feedback(uid: str, turn: int | None, said: Mapping[str, Any]) -> ActionFeedback:
    verdict = None if "verdict" not in said else Verdict(said["verdict"])
    hint = said.get("hint", "").strip()
    return ActionFeedback(uid, turn, said.get("score"), verdict, reason=said["reason"], hint=hint)
