"""Earliest-error correction at the action level: propose, restore, repair, resume, verify; and what another
would do at the student's states."""

from opd_agents.correction.alternatives import Alternatives, act_otherwise
from opd_agents.correction.repair import Proposed, Repair, correct, earliest_errors, may_be_repaired

__all__ = [
    "Alternatives",
    "Proposed",
    "Repair",
    "act_otherwise",
    "correct",
    "earliest_errors",
    "may_be_repaired",
]
