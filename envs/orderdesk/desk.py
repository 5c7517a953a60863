"""The tools of the desk. What they are asked they do, sensible or not: policy is the agent's business."""

from __future__ import annotations

from typing import Any, Literal

from opd_agents.envs.orderdesk.case import OPEN_STATUSES
from opd_agents.envs.orderdesk.database import Database
from opd_agents.tools import ToolError


class Desk:
    """The tools over one database. Nothing that changes an order can be undone.

    A ``linked`` desk names one order at a time, a work queue: ``list_orders`` the customer's first open one,
    and every tool that settles an order the next.
    """

    def __init__(self, database: Database, linked: bool) -> None:
        self.database = database
        self.linked = linked

    def find_customer(self, name: str) -> dict[str, Any]:
        """Find a customer by name."""
        found = self.database.rows("SELECT id, city FROM customers WHERE name = ? ORDER BY id", name)
        records = [_known({"customer_id": id, "city": city}) for id, city in found]
        if not records:
            raise ToolError("no such customer")
        return records[0] if len(records) == 1 else {"customers": records}

    def verify_customer(self, customer_id: str, postcode: str) -> dict[str, Any]:
        """Compare the postcode that the customer gives with the one on record."""
        self._customer(customer_id)
        query = "SELECT 1 FROM customers WHERE id = ? AND postcode = ?"
        verified = bool(self.database.rows(query, customer_id, postcode))
        if verified:
            self.database.run("UPDATE customers SET verified = 1 WHERE id = ?", customer_id)
        return {"verified": verified}

    def list_orders(self, customer_id: str) -> dict[str, Any]:
        """List the ids of a customer's orders."""
        self._customer(customer_id)
        if self.linked:
            return self._next_order(customer_id)
        query = "SELECT id FROM orders WHERE customer_id = ? ORDER BY place"
        return {"orders": [id for (id,) in self.database.rows(query, customer_id)]}

    def get_order(self, order_id: str) -> dict[str, Any]:
        """Look up an order."""
        query = "SELECT status, city, delivered_on FROM orders WHERE id = ?"
        found = self.database.rows(query, order_id)
        if not found:
            raise ToolError("unknown order")
        status, city, delivered_on = found[0]
        items = self.database.rows("SELECT sku, price FROM items WHERE order_id = ?", order_id)
        return _known(
            {
                "order_id": order_id,
                "status": status,
                "city": city,
                "delivered_on": delivered_on,
                "items": [{"sku": sku, "price": price} for sku, price in items] or None,
            }
        )

    def get_policy(self, topic: str = "orders") -> dict[str, Any]:
        """Read the desk's policy on a topic."""
        policies = dict(self.database.rows("SELECT topic, text FROM policies"))
        if topic not in policies:
            raise ToolError(f"no policy on {topic!r}; topics: {', '.join(policies)}")
        return {"policy": policies[topic]}

    def check_stock(self, sku: str) -> dict[str, Any]:
        """Count the pieces of an item in stock."""
        found = self.database.rows("SELECT count FROM stock WHERE sku = ?", sku)
        if not found:
            raise ToolError("unknown item")
        return {"sku": sku, "count": found[0][0]}

    def refund_order(self, order_id: str) -> dict[str, Any]:
        """Pay an order back. Cannot be undone."""
        return self._pay(order_id, "refund_order", "refunded")

    def issue_credit(self, order_id: str) -> dict[str, Any]:
        """Pay an order back as store credit. Cannot be undone."""
        return self._pay(order_id, "issue_credit", "credited")

    def cancel_order(self, order_id: str) -> dict[str, Any]:
        """Cancel an order before it is shipped. Cannot be undone."""
        return self._settle(order_id, "cancel_order", "cancelled")

    def recall_order(self, order_id: str) -> dict[str, Any]:
        """Call an order back on its way. Cannot be undone."""
        return self._settle(order_id, "recall_order", "recalled")

    def exchange_item(self, order_id: str, sku: str, new_sku: str) -> dict[str, Any]:
        """Exchange an item of an order for another from the stock. Cannot be undone."""
        self._open_order(order_id)
        if not self.database.rows("SELECT 1 FROM items WHERE order_id = ? AND sku = ?", order_id, sku):
            raise ToolError(f"order {order_id} has no item {sku!r}")
        self.check_stock(new_sku)
        result = self._settle(order_id, "exchange_item", "exchanged")
        statement = "UPDATE OR IGNORE items SET sku = ? WHERE order_id = ? AND sku = ?"
        self.database.run(statement, new_sku, order_id, sku)
        self.database.run("UPDATE stock SET count = count + 1 WHERE sku = ?", sku)
        self.database.run("UPDATE stock SET count = count - 1 WHERE sku = ?", new_sku)
        return result

    def update_address(self, order_id: str, city: str) -> dict[str, Any]:
        """Send an order to another city."""
        self._open_order(order_id)
        self._note(order_id, "update_address")
        self.database.run("UPDATE orders SET city = ? WHERE id = ?", city, order_id)
        return {"city": city}

    def close_ticket(self, resolution: Literal["done", "refused"] = "done") -> dict[str, Any]:
        """Close the case; nothing can be done after this."""
        self.database.run("UPDATE ticket SET status = 'closed', resolution = ?", resolution)
        return {"ticket": "closed"}

    def _customer(self, customer_id: str) -> None:
        if not self.database.rows("SELECT 1 FROM customers WHERE id = ?", customer_id):
            raise ToolError("unknown customer")

    def _open_order(self, order_id: str) -> None:
        found = self.database.rows("SELECT status FROM orders WHERE id = ?", order_id)
        if not found:
            raise ToolError("unknown order")
        if found[0][0] not in OPEN_STATUSES:
            raise ToolError("already settled")

    def _note(self, order_id: str, tool: str) -> None:
        """Write down whether the customer was verified when an order was changed."""
        self.database.run(
            "INSERT OR IGNORE INTO changes SELECT o.id, ?, c.verified "
            "FROM orders o JOIN customers c ON c.id = o.customer_id WHERE o.id = ?",
            tool,
            order_id,
        )

    def _settle(self, order_id: str, tool: str, status: str) -> dict[str, Any]:
        self._open_order(order_id)
        self._note(order_id, tool)
        self.database.run("UPDATE orders SET status = ? WHERE id = ?", status, order_id)
        if not self.linked:
            return {"status": status}
        owner = self.database.rows("SELECT customer_id FROM orders WHERE id = ?", order_id)[0][0]
        return {"status": status, **self._next_order(owner)}

    def _next_order(self, customer_id: str) -> dict[str, Any]:
        query = "SELECT id, status FROM orders WHERE customer_id = ? ORDER BY place"
        open_orders = [id for id, status in self.database.rows(query, customer_id) if status in OPEN_STATUSES]
        return {"next_order": open_orders[0] if open_orders else "none"}

    def _pay(self, order_id: str, tool: str, status: str) -> dict[str, Any]:
        result = self._settle(order_id, tool, status)
        total = self.database.rows("SELECT sum(price) FROM items WHERE order_id = ?", order_id)[0][0]
        self.database.run("INSERT INTO refunds VALUES (?, ?, ?)", order_id, tool, total)
        return _known(result | {"amount": total})


def _known(record: dict[str, Any]) -> dict[str, Any]:
    """Only what is on record: an easy case has no cities, dates or items, and shows none."""
    return {key: value for key, value in record.items() if value is not None}
