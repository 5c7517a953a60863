"""Models behind an OpenAI-compatible endpoint: requests in, replies out, paid for once."""

from opd_agents.api.client import ApiClient
from opd_agents.api.wire import Reply, Request

__all__ = ["ApiClient", "Reply", "Request"]
