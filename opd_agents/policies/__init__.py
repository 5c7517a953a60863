"""Policies: ``act(list[History]) -> list[Action]``, synchronous, list in, list out."""

from opd_agents.policies.base import (
    Action,
    ExpertPolicy,
    History,
    MixturePolicy,
    Policy,
    RandomPolicy,
    RelayPolicy,
)

__all__ = ["Action", "ExpertPolicy", "History", "MixturePolicy", "Policy", "RandomPolicy", "RelayPolicy"]
