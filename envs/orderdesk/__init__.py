"""OrderDesk: a customer-service desk over a real SQLite database; with a customer to talk to, if wanted."""

from opd_agents.envs.orderdesk.dialogue import OrderDeskDialogue
from opd_agents.envs.orderdesk.env import OrderDesk

__all__ = ["OrderDesk", "OrderDeskDialogue"]
