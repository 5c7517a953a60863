"""Retrieval: questions whose answer is several documents away."""

from opd_agents.envs.retrieval.env import Retrieval

__all__ = ["Retrieval"]
