"""SQL that can only read: a SQLite database as tools."""

from __future__ import annotations

import functools
import sqlite3
import time
from pathlib import Path
from typing import Annotated, Any

import pydantic

from opd_agents.errors import UserError
from opd_agents.tools.base import ToolError

MAX_LENGTH = 10_000  # bytes of a value or a query; what a query can fill memory with, row by row
MAX_CELL = 200  # characters of a value as shown
STEP = 1_000  # instructions of SQLite's virtual machine between two looks at the limits

_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
# An observation must be the same at replay, so nothing may be random or read the clock.
_REFUSED_FUNCTIONS = {
    *("random", "randomblob", "load_extension", "fts3_tokenizer", "last_insert_rowid", "changes"),
    *("total_changes", "current_date", "current_time", "current_timestamp"),
}
_DATES = ("date", "time", "datetime", "julianday", "strftime", "unixepoch")
_CLOCK = {"now", "subsec", "subsecond", "localtime", "utc"}


class SqlReader:
    """A SQLite database that can be asked but not changed; ``query`` and ``list_tables`` are the tools.

    ``database`` is a file, or an image of one (``Connection.serialize()``). A query stops after
    ``max_steps`` instructions of SQLite's virtual machine, about 20 a row, which is the same limit on every
    machine, and at the latest after ``timeout`` seconds. No value may be longer than 10,000 bytes. One thread
    at a time. Raises UserError for a database that cannot be opened.
    """

    def __init__(
        self,
        database: str | Path | bytes,
        *,
        max_rows: int = 20,
        max_steps: int = 1_000_000,
        timeout: float = 10.0,
    ) -> None:
        self.max_rows, self.max_steps, self.timeout = max_rows, max_steps, timeout
        self._connection = _open(database)
        self._steps, self._deadline = 0, 0.0
        self._connection.set_progress_handler(self._exhausted, STEP)
        self._connection.set_authorizer(_authorize)

    def query(self, sql: Annotated[str, pydantic.Field(description="one SELECT")]) -> dict[str, Any]:
        """Read from the database."""
        self._steps, self._deadline = 0, time.monotonic() + self.timeout
        try:
            cursor = self._connection.execute(sql)
            rows = cursor.fetchmany(self.max_rows + 1)
            names = [column[0] for column in cursor.description or ()]
            cursor.close()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ToolError(_explained(error)) from None
        if not names:
            raise ToolError("the query is empty")
        shown = [[_shown(value) for value in row] for row in rows[: self.max_rows]]
        more = {"more": True} if len(rows) > self.max_rows else {}
        return {"columns": [name[:MAX_CELL] for name in names], "rows": shown, **more}

    def list_tables(self) -> str:
        """Show how the tables are made."""
        query = "SELECT sql FROM sqlite_master WHERE type IN ('table', 'view') AND sql <> '' ORDER BY name"
        return "\n".join(sql for (sql,) in self._connection.execute(query))

    def close(self) -> None:
        self._connection.close()

    def _exhausted(self) -> bool:
        self._steps += STEP
        return self._steps > self.max_steps or time.monotonic() > self._deadline


def _open(database: str | Path | bytes) -> sqlite3.Connection:
    uri = ":memory:" if isinstance(database, bytes) else f"{Path(database).absolute().as_uri()}?mode=ro"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        if isinstance(database, bytes):
            connection.deserialize(database)
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error as error:
        raise UserError(f"SqlReader: the database {database!r:.80} cannot be opened: {error}.") from error
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, MAX_LENGTH),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_LENGTH),
        (sqlite3.SQLITE_LIMIT_COLUMN, 100),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100),  # a match is one instruction, however long it takes
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    ):
        connection.setlimit(limit, value)
    calendar = sqlite3.connect(":memory:", check_same_thread=False)
    for name in _DATES:
        connection.create_function(name, -1, functools.partial(_date, calendar, name))
    return connection


def _authorize(action: int, _table: str | None, function: str | None, *_place: str | None) -> int:
    refused = action == sqlite3.SQLITE_FUNCTION and str(function).lower() in _REFUSED_FUNCTIONS
    return sqlite3.SQLITE_DENY if refused or action not in _ALLOWED else sqlite3.SQLITE_OK


def _date(calendar: sqlite3.Connection, name: str, *arguments: Any) -> Any:
    """SQLite's own function of dates, asked elsewhere, for there is no way to forbid only its clock."""
    given = arguments[name == "strftime" :]
    words = {str(argument).partition("\0")[0].strip().lower() for argument in given}
    if not words or words & _CLOCK or any(isinstance(argument, bytes) for argument in given):
        raise ValueError
    places = ", ".join("?" * len(arguments))
    return calendar.execute(f"SELECT {name}({places})", arguments).fetchone()[0]


def _explained(error: Exception) -> str:
    text = str(error)
    if text == "interrupted":
        return "the query takes too long; ask for less"
    if "authoriz" in text or "prohibited" in text:
        return "only reading is allowed: one SELECT without random or clock functions"
    if text.startswith("user-defined function"):
        return "a date function needs a date, not the clock"
    return text


def _shown(value: Any) -> Any:
    if isinstance(value, bytes):
        value = f"x'{value.hex()}'"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return f"{value[:MAX_CELL]}..." if isinstance(value, str) and len(value) > MAX_CELL else value
