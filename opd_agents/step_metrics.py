"""The flat line of metrics that a training step leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_agents.config import Correction, Recorded
from opd_agents.correction import Repair
from opd_agents.correction.evidence import Evidence, false_verdicts
from opd_agents.evaluation.metrics import invalid_calls
from opd_agents.experience import Assigned, Experience
from opd_agents.runs import trajectory_row
from opd_agents.session import Session
from opd_agents.teachers import SpanLogprobs
from opd_agents.types import ActionFeedback, Actor, Credit, KeyStep, Outcome, SpanKind, StopReason, Trajectory


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
    ``taught/NAME`` is the share of the student's tokens that a reference of some of them only (one that is
    told more, one with routes, one with another tokenizer) had something to say about, ``span_tokens/NAME``
    how many of them a span has on average. ``rollout/think_tokens`` and the like count what models wrote in
    this step's episodes, ``rollout/forced_tokens`` what a thinking budget put there beside it; ``api/...`` is
    what this step asked of API teachers, see :class:`opd_agents.api.ApiClient`. Of ``seconds``, which are
    this rank's, the references' scoring took ``teacher_seconds``, added up over the ranks."""
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
            **_repairs(repairs, session.config.correction),
            **_kept(session),
            "correction/token_share": session.totals["correction_tokens"]
            / max(1.0, session.totals["generated_tokens"]),
        }
        if session.config.correction.propose.by == "judge":
            judged = experience.proposed
            row |= {"correction/asked": judged.asked, "correction/failed": judged.failed}
            row |= {"correction/leaked": judged.leaked}
    totals = {key: value for key, value in session.totals.items() if key != "seconds"}
    for key, value in totals.items():
        if value or not key.startswith(("api/retries/", "api/failures/")):  # only what did go wrong
            row |= {f"total/{key}": value} | ({key: value - before[key]} if key.startswith("api/") else {})
    return row | {
        "seconds": seconds,
        "teacher_seconds": session.totals["teacher_seconds"] - before["teacher_seconds"],
        "total/seconds": session.totals["seconds"] + seconds,
        "tokens_per_second": generated / seconds,
    }


def _distances(experience: Experience, *, recorded: bool) -> dict[str, float | None]:
    """Of the student from every reference, each over the tokens that it had something to say about."""
    row: dict[str, float | None] = {}
    student = _of_actor(experience, Actor.STUDENT)
    for name, terms in experience.frozen.references.items():
        own, taught = name == "teacher", experience.taught.get(name, torch.ones_like(student))
        if name in experience.taught:
            row[f"taught/{name}"] = _mean(taught.float(), student)
        if isinstance(signal := experience.signals[name], SpanLogprobs):
            heard = student & taught
            row[f"span_tokens/{name}"] = int(heard.sum()) / max(1, int((heard & ~signal.joined).sum()))
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
                if t.group and a and t.branch is None
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
        if one.trajectory in said:  # else of a run after a repair, which is not learned from
            said[one.trajectory].append(one)
    return [
        trajectory_row(trajectory, credit, _repair_row(trajectory, experience.repairs), said[trajectory.uid])
        for trajectory, credit in zip(experience.trajectories, credits, strict=True)
    ]


def _repairs(repairs: Sequence[Repair], settings: Correction) -> dict[str, float | None]:
    """What was proposed and accepted, also of the controls, which are random actions. The gain is what audits
    of accepted repairs found, in success rate, over their best rival. Of the rollouts ``practice``d in states
    of accepted ones there are the success rate, and how many begin with which key step."""
    meant, controls = (
        [repair for repair in repairs if repair.control is control] for control in (False, True)
    )
    row: dict[str, float | None] = {
        "correction/proposed": len(meant),
        "correction/accepted": sum(repair.accepted for repair in meant),
        "correction/rollouts": sum(repair.evidence.played for repair in repairs),
    }
    if settings.practice is not None:
        practised = [one for repair in repairs for one in repair.practised]
        row["practice/episodes"] = len(practised)
        if practised:
            row["practice/success"] = sum(one.success for one in practised) / len(practised)
            row |= {f"practice/key_{key}": n / len(practised) for key, n in _keys(practised).items()}
    if settings.random:
        row["correction/controls"] = len(controls)
        row["correction/controls_accepted"] = sum(repair.accepted for repair in controls)
    if settings.audit is not None:
        audited = [(repair.accepted, repair.audit) for repair in meant if repair.audit is not None]
        gains = [found.gain for accepted, found in audited if accepted and found.gain is not None]
        wrong = false_verdicts(audited)
        row["correction/audited"] = len(audited)
        row["correction/audited_gain"] = sum(gains) / len(gains) if gains else None
        row |= {"correction/falsely_accepted": wrong[0], "correction/falsely_rejected": wrong[1]}
    return row


def _repair_row(trajectory: Trajectory, repairs: Sequence[Repair]) -> dict[str, Any] | None:
    """What was tried on this episode, if anything, and ``then`` on a run after that."""
    for repair in repairs:
        if repair.parent.uid == trajectory.uid:
            return {
                "turn": repair.turn,
                "accepted": repair.accepted,
                "student_action": trajectory.turns[repair.turn].action,
                "teacher_action": repair.teacher_action,
                "evidence": evidence_row(repair.evidence),
                "audit": repair.audit and evidence_row(repair.audit),
                "control": repair.control,
                "practised": _keys(repair.practised),
                "then": repair.failed and _repair_row(repair.failed, repairs),
            }
    return None


def _kept(session: Session) -> dict[str, int]:
    """How many episodes of earlier steps' repairs are learned from once more."""
    if session.config.correction is None or not session.config.correction.kept:
        return {}
    *earlier, _ = session.kept.values()
    return {"correction/kept": sum(len(of_step) for of_step in earlier)}


def _keys(practised: Sequence[Trajectory]) -> dict[str, int]:
    """How many begin with which key step."""
    counts = Counter(one.branch.key for one in practised if one.branch)
    return {key.value: counts[key] for key in KeyStep}


def evidence_row(evidence: Evidence) -> dict[str, Any]:
    """[successes, rollouts] of each arm, and the probability that the repair is the best."""
    arms = {"repair": evidence.repair, **evidence.rivals}
    return {name: [arm.wins, arm.played] for name, arm in arms.items()} | {"better": evidence.better}
