"""The alarms of a group's runs, those of several seeds together."""

from __future__ import annotations

from dataclasses import dataclass

from opd_agents.alarms import Alarm, alarms
from opd_agents.report.groups import Group


@dataclass(frozen=True, slots=True)
class Raised:
    """An ``alarm`` of a ``stage``, as the first of the seeds raised it; ``seeds``: in how many, where there
    are several."""

    stage: str
    alarm: Alarm
    seeds: str


def raised(group: Group) -> list[Raised]:
    """In the order of stages, then of steps."""
    found: list[Raised] = []
    for label, stages in group.training().items():
        same: dict[tuple[str, str], list[Alarm]] = {}
        for stage in stages:
            for alarm in alarms(stage.metrics):
                same.setdefault((alarm.name, alarm.about), []).append(alarm)
        for those in same.values():
            seeds = f"in {len(those)} of {len(stages)} seeds" if len(stages) > 1 else ""
            found.append(Raised(label, min(those, key=lambda alarm: alarm.step), seeds))
    return found
