"""A small web shop, in a real browser and as plain Python."""

from opd_agents.envs.web.shop.env import Shop, ShopText

__all__ = ["Shop", "ShopText"]
