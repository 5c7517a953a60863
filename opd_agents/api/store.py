"""What an endpoint has answered, by the content of the request, and what that cost: one SQLite file.

An answer is in the file before anything is made of it, so that a killed process loses none and pays for none
twice (the file is written ahead: WAL). Several processes may share it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opd_agents.api.wire import Answer
from opd_agents.errors import ConfigError
from opd_agents.types import from_dict, to_json

VERSION = 1
TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY, tokens INTEGER NOT NULL, cost REAL NOT NULL);
INSERT OR IGNORE INTO spent VALUES (0, 0, 0.0);
"""
WAIT = 60.0  # s, for another process that writes


class Spent(NamedTuple):
    """Ever, for all that is in a file: ``tokens``, prompts included, and ``cost`` in the currency of the
    prices."""

    tokens: int
    cost: float


class Store:
    """The answers in the file ``path``, or in memory. For the thread that made it. Raises ConfigError for a
    file that is something else."""

    def __init__(self, path: Path | None) -> None:
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path or ":memory:", timeout=WAIT, isolation_level=None)
            found = self._file.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, VERSION):
                raise sqlite3.DatabaseError(f"version {found}")
            _write_ahead(self._file)
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"{path} is no cache of answers ({error}). Give another file as `endpoint.cache`."
            ) from None

    def get(self, key: str) -> Answer | None:
        row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else from_dict(Answer, json.loads(row[0]))

    def put(self, key: str, answer: Answer, cost: float) -> None:
        """Both are on disk, as far as a killed process is concerned, when this returns."""
        self._file.execute("BEGIN IMMEDIATE")
        try:
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, to_json(answer)))
            self._file.execute("UPDATE spent SET tokens = tokens + ?, cost = cost + ?", (answer.tokens, cost))
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")

    @property
    def spent(self) -> Spent:
        return Spent(*self._file.execute("SELECT tokens, cost FROM spent").fetchone())

    def close(self) -> None:
        self._file.close()


def _write_ahead(file: sqlite3.Connection) -> None:
    """SQLite's own time-out does not cover a change of mode: of two processes that open a new file at once,
    one would fail."""
    until = time.monotonic() + WAIT
    while True:
        try:
            file.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def key_of(base_url: str, body: Mapping[str, Any], sample: int) -> str:
    """The content of a request, its model included; nothing of it names a secret."""
    text = json.dumps([base_url, body, sample], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
