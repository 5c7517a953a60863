"""FileDesk: an office that keeps its bills as files."""

from opd_agents.envs.filedesk.env import FileDesk

__all__ = ["FileDesk"]
