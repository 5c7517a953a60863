"""Earliest-error correction at the action level: propose, restore, repair, resume, verify."""

from opd_agents.correction.repair import Repair, correct

__all__ = ["Repair", "correct"]
