"""Environments: text in, text out, forkable."""

from opd_agents.envs.actions import BadAction, format_calls, parse_action
from opd_agents.envs.base import AgentEnv, Recording, Snapshot
from opd_agents.envs.registry import describe, import_plugins, list_envs, make, register
from opd_agents.envs.spaces import AnyText

__all__ = [
    "AgentEnv",
    "AnyText",
    "BadAction",
    "Recording",
    "Snapshot",
    "describe",
    "format_calls",
    "import_plugins",
    "list_envs",
    "make",
    "parse_action",
    "register",
]
