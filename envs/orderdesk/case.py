"""The content of one task: a world of customers and orders, what the customer asks, and what policy says.

Everything here is plain data and pure functions; the noise of an episode is none of it.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import Literal

OPEN_STATUSES = ("processing", "shipped", "delivered")  # any other status is final


@dataclass(frozen=True, slots=True)
class Customer:
    id: str
    name: str
    city: str | None = None
    postcode: str | None = None  # what verify_customer compares; a level without verification has none
    verified: bool = True


@dataclass(frozen=True, slots=True)
class Order:
    id: str
    customer_id: str
    status: str
    items: tuple[tuple[str, int], ...] = ()  # (sku, price in whole euros)
    city: str | None = None  # where it goes
    delivered_on: datetime.date | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What the customer wants of one order; ``wish`` is the new item of an exchange, the city of a move."""

    kind: Literal["settle", "exchange", "move"]
    order_id: str
    sku: str | None = None
    wish: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One task. The customer who writes is ``customers[0]``."""

    prompt: str
    customers: tuple[Customer, ...]
    orders: tuple[Order, ...]
    requests: tuple[Request, ...]
    stock: tuple[tuple[str, int], ...] = ()  # (sku, count)
    policies: tuple[tuple[str, str], ...] = ()  # (topic, text)
    given_postcode: str | None = None  # as the customer states it; None: no verification at this level
    by_item: bool = False  # orders are named by an item, so that they must be looked for
    today: datetime.date | None = None
    window_days: int | None = None  # refunds until this many days after delivery; None: always

    @property
    def verifiable(self) -> bool:
        """Whether the customer can be verified; if not, policy allows no change at all."""
        return self.given_postcode == self.customers[0].postcode

    @property
    def signature(self) -> str:
        """What makes this task the task it is, other customers' records left out: two tasks with the same
        signature would be the same to an agent that works properly."""
        own = [order for order in self.orders if order.customer_id == self.customers[0].id]
        return json.dumps(
            [self.prompt, str(self.customers[0]), str(own), str(self.stock), str(self.policies)]
        )


def resolve(case: Case, request: Request, order: Order) -> tuple[str, dict[str, str]] | None:
    """The tool and arguments with which policy settles ``request``; None: leave the order as it is."""
    arguments = {"order_id": order.id}
    if request.kind == "exchange" and order.status == "delivered" and dict(case.stock)[str(request.wish)] > 0:
        return "exchange_item", arguments | {"sku": str(request.sku), "new_sku": str(request.wish)}
    if request.kind == "move":
        if order.status == "processing":
            return "update_address", arguments | {"city": str(request.wish)}
        return ("recall_order", arguments) if order.status == "shipped" else None
    match order.status:
        case "processing":
            return "cancel_order", arguments
        case "shipped":
            return "recall_order", arguments
        case _:
            return ("refund_order" if _in_window(case, order) else "issue_credit"), arguments


def _in_window(case: Case, order: Order) -> bool:
    if case.window_days is None or case.today is None or order.delivered_on is None:
        return True
    return (case.today - order.delivered_on).days <= case.window_days
