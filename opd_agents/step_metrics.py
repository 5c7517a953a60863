"""The flat line of metrics that a training step leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_agents.correction import Repair
from opd_agents.evaluation.metrics import invalid_calls
from opd_agents.experience import Experience
from opd_agents.session import Session
from opd_agents.types import Actor, Credit, Outcome, Trajectory


def step_metrics(
    session: Session,
    experience: Experience,
    rewards: Mapping[str, Tensor],
    losses: Mapping[str, float],
    before: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Means are per episode; ``distill/kl`` is the mean KL(student || teacher) in nats per student token."""
    trajectories, rolled = experience.trajectories, experience.rollouts
    packed, frozen, repairs = experience.packed, experience.frozen, experience.repairs
    n = len(rolled)
    generated = session.totals["generated_tokens"] - before["generated_tokens"]
    row: dict[str, Any] = {
        "step": session.step,
        "progress": min(1.0, session.progress),
        "rollout/episodes": n,
        "rollout/success": sum(t.success for t in rolled) / n,
        "rollout/reward": sum(t.reward for t in rolled) / n,
        "rollout/turns": sum(len(t.turns) for t in rolled) / n,
        "rollout/invalid_calls": sum(map(invalid_calls, rolled)) / n,
        "rollout/errors": sum(t.outcome is Outcome.ERROR for t in rolled),
        "rollout/unfinished": sum(t.outcome is Outcome.UNFINISHED for t in rolled) / n,
        "rollout/generated_tokens": generated,
        **losses,
    }
    if frozen is not None and frozen.kl is not None:
        by_turn = [trajectories[e].turns[t].actor is Actor.STUDENT for e, t in packed.turns]
        student = torch.tensor(by_turn)[packed.turn]
        row["distill/kl"] = float(frozen.kl[student].mean()) if bool(student.any()) else None
    for values in rewards.values():
        groups = {t.group: False for t in rolled}
        for trajectory, advantage in zip(trajectories, values.tolist(), strict=True):
            groups[trajectory.group] = groups.get(trajectory.group, False) or advantage != 0
        row |= {"groups/total": len({t.group for t in rolled}), "groups/nonzero": sum(groups.values())}
    if session.config.correction is not None:
        row |= {
            "correction/proposed": len(repairs),
            "correction/accepted": sum(repair.accepted for repair in repairs),
            "correction/token_share": session.totals["correction_tokens"]
            / max(1.0, session.totals["generated_tokens"]),
        }
        if repairs:
            row["correction/gain"] = sum(r.success_repair - r.success_student for r in repairs) / len(repairs)
    row |= {f"total/{key}": value for key, value in session.totals.items() if key != "seconds"}
    return row | {
        "seconds": seconds,
        "total/seconds": session.totals["seconds"] + seconds,
        "tokens_per_second": generated / seconds,
    }


def trajectory_rows(experience: Experience, credits: Sequence[Sequence[Credit]]) -> list[dict[str, Any]]:
    """The lines of a step's trajectory file."""
    return [
        {"trajectory": trajectory, "credit": credit, "repair": _repair_row(trajectory, experience.repairs)}
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
