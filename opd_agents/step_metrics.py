"""The flat line of metrics that a training step leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from opd_agents.config import Correction, Recorded
from opd_agents.correction import Repair
from opd_agents.correction.evidence import Evidence, false_verdicts
from opd_agents.episode_metrics import episode_metrics
from opd_agents.experience import Assigned, Experience
from opd_agents.runs import trajectory_row
from opd_agents.session import Session
from opd_agents.token_metrics import token_metrics
from opd_agents.types import ActionFeedback, Credit, KeyStep, Trajectory


def step_metrics(
    session: Session,
    experience: Experience,
    assigned: Assigned,
    losses: Mapping[str, float],
    before: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What is of episodes is told in `episode_metrics`, what is of tokens in `token_metrics`; ``losses`` are
    those of the updates. ``api/...`` is what this step asked of API teachers, see
    :class:`opd_agents.api.ApiClient`. ``flops/rollout``, ``flops/teacher`` and ``flops/update`` are what it
    computed, in three parts that add up, see :meth:`opd_agents.session.Session.count`. Of ``seconds``, which
    are this rank's, the references' scoring took ``teacher_seconds``, added up over the ranks."""
    rolled, repairs = experience.rollouts, experience.repairs
    generated = session.totals["generated_tokens"] - before["generated_tokens"]
    row: dict[str, Any] = {
        "step": session.step,
        "progress": min(1.0, session.progress),
        "rollout/episodes": len(rolled),
        **episode_metrics(rolled),
        "rollout/generated_tokens": generated,
        **_recorded(session, experience),
        **losses,
    }
    recorded = isinstance(session.config.rollout.source, Recorded)
    row |= token_metrics(experience, assigned, session.config.loss.components, recorded=recorded)
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
        if session.config.correction.key_by == "judge":
            row |= {"practice/judged": experience.keyed.judged}
            row |= {"practice/judge_failed": experience.keyed.failed}
    totals = {key: value for key, value in session.totals.items() if key != "seconds"}
    for key, value in totals.items():
        if value or not key.startswith(("api/retries/", "api/failures/")):  # only what did go wrong
            row |= {f"total/{key}": value} | ({key: value - before[key]} if "/" in key else {})
    return row | {
        "seconds": seconds,
        "teacher_seconds": session.totals["teacher_seconds"] - before["teacher_seconds"],
        "total/seconds": session.totals["seconds"] + seconds,
        "tokens_per_second": generated / seconds,
    }


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
    for one in (*experience.feedback, *experience.proposed.feedback, *experience.keyed.feedback):
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
