import json
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.errors import UserError
from opd_agents.tools import Tool, ToolError
from opd_agents.tools.sql import SqlReader

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


def image() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.executescript(
        "CREATE TABLE city (name TEXT, people INT);"
        "CREATE VIEW big AS SELECT name FROM city WHERE people > 5;"
        "INSERT INTO city VALUES ('Évora', 5), ('Turin', 9), (x'ff00', NULL);"
    )
    return connection.serialize()


@pytest.fixture
def reader() -> SqlReader:
    return SqlReader(image(), max_rows=3, max_steps=100_000)


def test_reads(reader: SqlReader) -> None:
    query = Tool.from_function(reader.query)
    assert query({"sql": "SELECT * FROM city ORDER BY people"}) == (
        '{"columns":["name","people"],"rows":[["x\'ff00\'",null],["Évora",5],["Turin",9]]}'
    )
    assert reader.query("SELECT name FROM big;")["rows"] == [["Turin"]]
    assert reader.query("SELECT 9e999, 1.5, 'it''s'")["rows"] == [["inf", 1.5, "it's"]]
    assert reader.list_tables() == (
        "CREATE VIEW big AS SELECT name FROM city WHERE people > 5\nCREATE TABLE city (name TEXT, people INT)"
    )


def test_rows_and_values_are_cut(reader: SqlReader) -> None:
    found = reader.query("SELECT printf('%9000d', 1) FROM city a, city b")
    assert len(found["rows"]) == 3 and found["more"] is True
    assert len(found["rows"][0][0]) == 203
    assert "more" not in reader.query("SELECT * FROM city")


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM city",
        "UPDATE city SET people = 1 RETURNING name",
        "INSERT INTO city VALUES ('x', 1)",
        "CREATE TEMP TABLE x (a)",
        "DROP TABLE city",
        "PRAGMA table_info(city)",
        "PRAGMA query_only = OFF",
        "SELECT * FROM pragma_database_list",
        "ATTACH '/etc/passwd' AS p",
        "VACUUM INTO '/tmp/opd-agents-test.db'",
        "BEGIN",
        "SELECT load_extension('x')",
        "SELECT random()",
        "SELECT CURRENT_TIMESTAMP",
    ],
)
def test_only_reading_is_allowed(reader: SqlReader, sql: str) -> None:
    before = reader.query("SELECT * FROM city")
    with pytest.raises(ToolError, match="only reading is allowed"):
        reader.query(sql)
    assert reader.query("SELECT * FROM city") == before
    assert not Path("/tmp/opd-agents-test.db").exists()


@pytest.mark.parametrize(
    "call",
    [
        "date('now')",
        "datetime(' NOW ')",
        "date('now' || char(0) || 'x')",
        "date(x'6e6f77')",
        "date()",
        "strftime('%s')",
        "julianday('2024-01-01', 'localtime')",
    ],
)
def test_the_clock_cannot_be_read(reader: SqlReader, call: str) -> None:
    with pytest.raises(ToolError, match="not the clock"):
        reader.query(f"SELECT {call}")


def test_dates_can_be_reckoned_with(reader: SqlReader) -> None:
    values = "date('2024-01-31', '+1 day'), julianday('2024-03-01') - julianday('2024-02-01')"
    found = reader.query(f"SELECT {values}, strftime('%Y', '2024-05-05')")
    assert found["rows"] == [["2024-02-01", 29, "2024"]]


@pytest.mark.parametrize(
    "sql",
    [
        f"{ENDLESS} SELECT count(*) FROM c",
        f"{ENDLESS} SELECT hex(zeroblob(4900)) || x FROM c ORDER BY 1",  # as much memory as can be had
        "SELECT count(*) FROM " + ", ".join(f"city {letter}" for letter in "abcdefghijklmnopqrs"),
    ],
)
def test_endless_queries_stop(reader: SqlReader, sql: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ToolError, match="takes too long"):
        reader.query(sql)
    assert time.perf_counter() - start < 10
    assert reader.query("SELECT 1")["rows"] == [[1]]


def test_the_clock_stops_what_the_steps_do_not() -> None:
    reader = SqlReader(image(), max_steps=10**15, timeout=0.2)
    start = time.perf_counter()
    with pytest.raises(ToolError, match="takes too long"):
        reader.query(f"{ENDLESS} SELECT count(*) FROM c")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("", "the query is empty"),
        ("-- nothing", "the query is empty"),
        ("SELECT 1; SELECT 2", "one statement at a time"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM nowhere", "no such table"),
        ("SELECT ?", "bindings"),
        ("SELECT '\0'", "null character"),
        ("SELECT zeroblob(1000000)", "too big"),
        ("SELECT '" + "a" * 20_000 + "'", "too large"),
        ("SELECT " + "(" * 3000 + "1" + ")" * 3000, "overflow"),
        ("SELECT " + "1," * 200 + "1", "too many columns"),
    ],
)
def test_what_is_wrong_is_said(reader: SqlReader, sql: str, problem: str) -> None:
    with pytest.raises(ToolError, match=problem):
        reader.query(sql)


def test_a_file_is_opened_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a ? b#.db"
    path.write_bytes(image())
    reader = SqlReader(path)
    assert reader.query("SELECT count(*) FROM city")["rows"] == [[3]]
    reader.close()
    assert path.read_bytes() == image() and [p.name for p in tmp_path.iterdir()] == [path.name]
    for wrong in (tmp_path / "none.db", tmp_path, b"no database"):
        with pytest.raises(UserError, match="cannot be opened"):
            SqlReader(wrong)
    assert not (tmp_path / "none.db").exists()


WORDS = [
    *("SELECT", "FROM", "WHERE", "city", "name", "people", "*", ",", "(", ")", "'x'", "1", "=", "||", "LIKE"),
    *("'%a%'", "GROUP BY", "ORDER BY", "LIMIT", ";", "--", "date(", "char(", "'now'"),
]


@given(st.text(max_size=300) | st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join))
@settings(max_examples=150, deadline=None)
def test_any_text_is_answered(sql: str) -> None:
    reader = SqlReader(image())
    query = Tool.from_function(reader.query)
    try:
        json.loads(query({"sql": sql}))
    except ToolError as error:
        assert str(error)
    assert reader.query("SELECT count(*) FROM city")["rows"] == [[3]]
    reader.close()
