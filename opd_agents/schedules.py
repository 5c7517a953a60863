"""Coefficients over a run: constant, linear, cosine."""

from __future__ import annotations

import math

from opd_agents.config import Scheduled


def value_at(schedule: Scheduled, progress: float) -> float:
    """The coefficient when ``progress`` (0 at the start of the run, 1 at its end) has been made."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    share = min(max(progress, 0.0), 1.0)
    if schedule.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return schedule.start + (schedule.end - schedule.start) * share
