"""Tools: a JSON schema in, text out."""

from opd_agents.tools.base import Tool, ToolError, to_json
from opd_agents.tools.sampling import random_call

__all__ = ["Tool", "ToolError", "random_call", "to_json"]
