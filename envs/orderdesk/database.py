"""The desk's database: SQLite in memory, filled from a case, copied and compared as a whole."""

from __future__ import annotations

import sqlite3
from typing import Any

from opd_agents.envs.orderdesk.case import Case

SCHEMA = """
PRAGMA page_size = 512;
CREATE TABLE customers (
    id TEXT PRIMARY KEY, name TEXT, city TEXT, postcode TEXT, verified INTEGER
) WITHOUT ROWID;
CREATE TABLE orders (
    id TEXT PRIMARY KEY, customer_id TEXT, status TEXT, city TEXT, delivered_on TEXT, place INTEGER
) WITHOUT ROWID;
CREATE TABLE items (order_id TEXT, sku TEXT, price INTEGER, PRIMARY KEY (order_id, sku)) WITHOUT ROWID;
CREATE TABLE stock (sku TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID;
CREATE TABLE refunds (order_id TEXT PRIMARY KEY, kind TEXT, amount INTEGER) WITHOUT ROWID;
CREATE TABLE policies (topic TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;
CREATE TABLE changes (
    order_id TEXT, tool TEXT, verified INTEGER, PRIMARY KEY (order_id, tool, verified)
) WITHOUT ROWID;
CREATE TABLE ticket (status TEXT, resolution TEXT);
INSERT INTO ticket VALUES ('open', NULL);
"""
TABLES = ("customers", "orders", "items", "stock", "refunds", "policies", "changes", "ticket")


def _template() -> bytes:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(SCHEMA)
    try:
        return connection.serialize()
    finally:
        connection.close()


EMPTY = _template()  # loading it is many times faster than running the schema


class Database:
    """One connection to one in-memory database; ``load`` and ``fill`` replace all of its content."""

    def __init__(self) -> None:
        # Rollouts may step an environment from another thread than the one that made it, one at a time.
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)

    def fill(self, case: Case) -> None:
        """Make this the database in which ``case`` begins."""
        self.load(EMPTY)
        insert = self.connection.executemany
        self.connection.execute("BEGIN")
        insert(
            "INSERT INTO customers VALUES (?, ?, ?, ?, ?)",
            [(c.id, c.name, c.city, c.postcode, c.verified) for c in case.customers],
        )
        insert(
            "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)",
            [
                (o.id, o.customer_id, o.status, o.city, o.delivered_on and o.delivered_on.isoformat(), place)
                for place, o in enumerate(case.orders)
            ],
        )
        insert("INSERT INTO items VALUES (?, ?, ?)", [(o.id, *item) for o in case.orders for item in o.items])
        insert("INSERT INTO stock VALUES (?, ?)", case.stock)
        insert("INSERT INTO policies VALUES (?, ?)", case.policies)
        self.connection.execute("COMMIT")

    def load(self, image: bytes) -> None:
        """Replace the content by a database image of ``image()``."""
        self.connection.deserialize(image)

    def image(self) -> bytes:
        """The whole database, as SQLite would write it to a file."""
        return self.connection.serialize()

    def dump(self) -> list[list[tuple[Any, ...]]]:
        """All rows of all tables, each table sorted by its primary key: equal for equal content."""
        return [self.rows(f"SELECT * FROM {table}") for table in TABLES]

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, values).fetchall()

    def run(self, statement: str, *values: Any) -> None:
        self.connection.execute(statement, values)

    def close(self) -> None:
        self.connection.close()
