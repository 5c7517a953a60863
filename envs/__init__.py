"""Environments: text in, text out, forkable."""

from opd_agents.envs.actions import BadAction, format_calls, parse_action
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.process import ProcessEnv, launch
from opd_agents.envs.registry import (
    describe,
    env_class,
    has_expert,
    import_plugins,
    list_envs,
    make,
    register,
)
from opd_agents.envs.snapshots import Recording, Snapshot
from opd_agents.envs.spaces import AnyText
from opd_agents.envs.splits import draw_from_split
from opd_agents.envs.tasks import TaskFile, TaskRow, load_tasks

__all__ = [
    "AgentEnv",
    "AnyText",
    "BadAction",
    "ProcessEnv",
    "Recording",
    "Snapshot",
    "TaskFile",
    "TaskRow",
    "describe",
    "draw_from_split",
    "env_class",
    "format_calls",
    "has_expert",
    "import_plugins",
    "launch",
    "list_envs",
    "load_tasks",
    "make",
    "parse_action",
    "register",
]
