"""Earliest-error correction at the action level: propose, restore, repair, resume, verify; and what another
would do at the student's states."""

from opd_agents.correction.alternatives import Alternatives, act_otherwise
from opd_agents.correction.locate import disagreed, divergent, dropped, improbable
from opd_agents.correction.repair import Proposed, correct
from opd_agents.correction.states import first_turn, may_be_repaired
from opd_agents.correction.verify import Repair

__all__ = [
    "Alternatives",
    "Proposed",
    "Repair",
    "act_otherwise",
    "correct",
    "disagreed",
    "divergent",
    "dropped",
    "first_turn",
    "improbable",
    "may_be_repaired",
]
