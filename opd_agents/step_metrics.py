"""The flat line of metrics that a training step leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_agents.config import Recorded
from opd_agents.correction import Repair
from opd_agents.evaluation.metrics import invalid_calls
from opd_agents.experience import Assigned, Experience
from opd_agents.runs import trajectory_row
from opd_agents.session import Session
from opd_agents.types import ActionFeedback, Actor, Credit, Outcome, SpanKind, StopReason, Trajectory


def step_metrics(
    session: Session,
    experience: Experience,
    assigned: Assigned,
    losses: Mapping[str, float],
    before: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Means are per episode; ``distill/kl`` is the mean KL(student || teacher) in nats per student token,
    ``distill/kl_think`` (call, text, special) that per token of one kind of span, ``recorded/kl`` that per
    recorded token; of a teacher that tells log-probs only, ``distill/log_ratio`` is the mean log q - log p of
    the student's tokens, which estimates it. Of another reference it is ``kl/NAME`` or ``log_ratio/NAME``.
    ``rollout/think_tokens`` and the like count what models wrote in
    this step's episodes, ``rollout/forced_tokens`` what a thinking budget put there beside it; ``api/...`` is
    what this step asked of API teachers, see :class:`opd_agents.api.ApiClient`."""
    rolled, repairs = experience.rollouts, experience.repairs
    generated = session.totals["generated_tokens"] - before["generated_tokens"]
    row: dict[str, Any] = {
        "step": session.step,
        "progress": min(1.0, session.progress),
        "rollout/episodes": len(rolled),
        **_episode_means(rolled),
        "rollout/generated_tokens": generated,
        **_span_tokens(rolled),
        **_recorded(session, experience),
        **losses,
    }
    row |= _distances(experience, recorded=isinstance(session.config.rollout.source, Recorded))
    row |= _advantages(experience, assigned)
    if session.config.correction is not None:
        row |= {
            "correction/proposed": len(repairs),
            "correction/accepted": sum(repair.accepted for repair in repairs),
            "correction/token_share": session.totals["correction_tokens"]
            / max(1.0, session.totals["generated_tokens"]),
        }
        if session.config.correction.propose.by == "judge":
            judged = experience.proposed
            row |= {"correction/asked": judged.asked, "correction/failed": judged.failed}
            row |= {"correction/leaked": judged.leaked}
        gains = [repair.success_repair - repair.success_student for repair in repairs]
        row["correction/gain"] = sum(gains) / len(gains) if gains else None
    totals = {key: value for key, value in session.totals.items() if key != "seconds"}
    for key, value in totals.items():
        if value or not key.startswith(("api/retries/", "api/failures/")):  # only what did go wrong
            row |= {f"total/{key}": value} | ({key: value - before[key]} if key.startswith("api/") else {})
    return row | {
        "seconds": seconds,
        "total/seconds": session.totals["seconds"] + seconds,
        "tokens_per_second": generated / seconds,
    }


def _distances(experience: Experience, *, recorded: bool) -> dict[str, float | None]:
    """Of the student from every reference, each over the tokens that it had something to say about."""
    row: dict[str, float | None] = {}
    student = _of_actor(experience, Actor.STUDENT)
    for name, terms in experience.frozen.references.items():
        own, taught = name == "teacher", experience.taught.get(name, torch.ones_like(student))
        if terms.kl is None:
            key = "distill/log_ratio" if own else f"log_ratio/{name}"
            row[key] = _mean(experience.frozen.logprob - terms.logprob, student & taught)
            continue
        row["distill/kl" if own else f"kl/{name}"] = _mean(terms.kl, student & taught)
        if not own:
            continue
        for kind in SpanKind:
            value = _mean(terms.kl, student & taught & experience.packed.of_kinds([kind]))
            row |= {} if value is None else {f"distill/kl_{kind}": value}
        if recorded:
            row["recorded/kl"] = _mean(terms.kl, _of_actor(experience, Actor.CORPUS) & taught)
    return row


def _advantages(experience: Experience, assigned: Assigned) -> dict[str, float | int]:
    """Root mean square of each part of an advantage over the tokens that its component selects; groups whose
    episodes a reward tells apart."""
    rows: dict[str, float | int] = {}
    for name, composed in assigned.composed.items():
        chosen = assigned.counted[name]
        for part, values in composed.parts.items():
            rows[f"advantage/{name}.{part}"] = (
                float(values[chosen].square().mean().sqrt()) if bool(chosen.any()) else 0.0
            )
        for values in composed.rewards.values():
            told = {
                t.group
                for t, a in zip(experience.trajectories, values.tolist(), strict=True)
                if t.group and a
            }
            total = len({t.group for t in experience.rollouts if t.group})
            rows |= {"groups/total": total, "groups/nonzero": len(told)}
    return rows


def _span_tokens(rolled: Sequence[Trajectory]) -> dict[str, int]:
    """Sampled and forced tokens of each kind of span that occurs."""
    counts: Counter[SpanKind] = Counter()
    for turn in (turn for t in rolled for turn in t.turns if turn.logprobs is not None):
        for span in turn.spans:
            counts[span.kind] += span.stop - span.start
    return {f"rollout/{kind}_tokens": counts[kind] for kind in SpanKind if counts[kind]}


def _of_actor(experience: Experience, actor: Actor) -> Tensor:
    packed, trajectories = experience.packed, experience.trajectories
    of_turn = [trajectories[episode].turns[index].actor is actor for episode, index in packed.turns]
    return torch.tensor(of_turn, dtype=torch.bool)[packed.turn]


def _mean(values: Tensor, where: Tensor) -> float | None:
    return float(values[where].mean()) if bool(where.any()) else None


def _episode_means(rolled: Sequence[Trajectory]) -> dict[str, float]:
    """Of the step's episodes; nothing where all experience is recorded."""
    if not rolled:
        return {}
    n = len(rolled)
    return {
        "rollout/success": sum(t.success for t in rolled) / n,
        "rollout/reward": sum(t.reward for t in rolled) / n,
        "rollout/turns": sum(len(t.turns) for t in rolled) / n,
        "rollout/invalid_calls": sum(map(invalid_calls, rolled)) / n,
        "rollout/errors": sum(t.outcome is Outcome.ERROR for t in rolled),
        "rollout/unfinished": sum(t.outcome is Outcome.UNFINISHED for t in rolled) / n,
        "rollout/cut_actions": _stopped_by(rolled, StopReason.LENGTH),
        "rollout/context_overflow": sum(t.exhausted == "context" for t in rolled) / n,
        # what rendering the history anew costs: rows, and the context that is read anew with each of them
        "rollout/segments": sum(len(list(t.segments())) for t in rolled) / n,
        "rollout/context_tokens": sum(len(turn.context_ids) for t in rolled for turn in t.turns) / n,
    }


def _stopped_by(rolled: Sequence[Trajectory], reason: StopReason) -> float:
    """The share of all actions that stopped for this reason."""
    reasons = [turn.stop_reason for t in rolled for turn in t.turns]
    return reasons.count(reason) / max(1, len(reasons))


def _recorded(session: Session, experience: Experience) -> dict[str, float]:
    """Recorded conversations and tokens learned from in this step; passes over the data so far."""
    if session.recordings is None:
        return {}
    turns = [turn for t in experience.recorded for turn in t.turns if turn.weight]
    return {
        "recorded/conversations": len(experience.recorded),
        "recorded/tokens": sum(len(turn.action_ids) for turn in turns),
        "recorded/epoch": session.recordings.epoch(session.step),
    }


def trajectory_rows(experience: Experience, credits: Sequence[Sequence[Credit]]) -> list[dict[str, Any]]:
    """The lines of a step's trajectory file."""
    said: dict[str, list[ActionFeedback]] = {trajectory.uid: [] for trajectory in experience.trajectories}
    for one in (*experience.feedback, *experience.proposed.feedback):
        said[one.trajectory].append(one)
    return [
        trajectory_row(trajectory, credit, _repair_row(trajectory, experience.repairs), said[trajectory.uid])
        for trajectory, credit in zip(experience.trajectories, credits, strict=True)
    ]


def _repair_row(trajectory: Trajectory, repairs: Sequence[Repair]) -> dict[str, Any] | None:
    """What was tried on this episode, if anything."""
    for repair in repairs:
        if repair.parent.uid == trajectory.uid:
            return {
                "turn": repair.turn,
                "accepted": repair.accepted,
                "student_action": trajectory.turns[repair.turn].action,
                "teacher_action": repair.teacher_action,
                "trials": repair.trials,
                "success_student": repair.success_student,
                "success_repair": repair.success_repair,
            }
    return None
