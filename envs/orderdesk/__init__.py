"""OrderDesk: a customer-service desk over a real SQLite database."""

from opd_agents.envs.orderdesk.env import OrderDesk

__all__ = ["OrderDesk"]
