"""The client of API models: against a server that misbehaves as real ones do."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from api_server import PASSING, USELESS, ApiServer

from opd_agents.api import ApiClient, Request
from opd_agents.api.store import Store
from opd_agents.config import Endpoint
from opd_agents.errors import BudgetSpent, ConfigError
from opd_agents.types import ToolCall, ToolSpec

SCORE = {
    "type": "object", "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["score"], "additionalProperties": False,
}  # fmt: skip
ADD = ToolSpec(
    "add", "Adds.", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
)
PRICES = {"input": 1.0, "output": 4.0}


def ask(text="x", **changes):
    return Request(({"role": "user", "content": str(text)},), **changes)


def client(server, store=None, **settings):
    settings = {"key": None, "timeout": 2.0, "base_url": server.url} | settings
    return ApiClient("oracle", Endpoint(**settings), store=store)


@pytest.fixture
def quick(monkeypatch):
    """Backs off for milliseconds."""
    monkeypatch.setattr("opd_agents.api.attempts.FIRST_WAIT", 0.005)


def test_replies_come_in_order_and_equal_requests_are_asked_once(tmp_path):
    with ApiServer(lambda body: body["messages"][-1]["content"]) as server:
        one = client(server, tmp_path / "answers.sqlite")
        replies = one.ask([ask(i % 40) for i in range(80)])
        assert [reply.text for reply in replies] == [str(i % 40) for i in range(80)]
        assert sum(server.told.values()) == 40
        assert [reply.cached for reply in replies] == [False] * 40 + [True] * 40
        one.ask([ask(0, sample=1), ask(0, temperature=1.0)])
        assert sum(server.told.values()) == 42  # other draws, other requests
        one.close()


def test_a_rerun_is_free_and_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-123")
    with ApiServer(key="secret-123") as server:
        first = client(server, tmp_path / "answers.sqlite", key="SOME_KEY", prices=PRICES)
        before = first.ask([ask(i) for i in range(5)])
        first.close()
    monkeypatch.delenv("SOME_KEY")
    again = client(server, tmp_path / "answers.sqlite", key="SOME_KEY", prices=PRICES)
    after = again.ask([ask(i) for i in range(5)])
    assert [(r.text, r.prompt_tokens) for r in after] == [(r.text, r.prompt_tokens) for r in before]
    assert again.counts["cached"] == 5 and again.counts["paid"] == 0
    assert again.counts["cost"] == first.counts["cost"] == first.counts["paid"] > 0
    again.close()


def test_what_passes_is_retried_and_counted(tmp_path, quick):
    with ApiServer(plan=PASSING) as server:
        one = client(server, timeout=0.3, concurrency=1)
        assert one.ask([ask()])[0].text == "yes"
        counts = one.counts
    kinds = {"rate_limit": 1, "server_error": 1, "timeout": 1, "connection": 2}
    assert {kind: counts[f"retries/{kind}"] for kind in kinds} == kinds
    assert counts["requests"] == 1
    one.close()


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("rate_limit", "rate_limit"),
        ("server_error", "server_error"),
        ("hang", "timeout"),
        ("cut", "connection"),
    ],
)
def test_what_never_passes_is_a_failure_that_is_asked_again_later(tmp_path, quick, fault, failure):
    with ApiServer(plan=[fault] * 3) as server:
        one = client(server, tmp_path / "answers.sqlite", retries=2, timeout=0.3)
        reply = one.ask([ask()])[0]
        assert reply.failure == failure and reply.detail
        assert one.counts[f"failures/{failure}"] == 1 and one.counts[f"retries/{failure}"] == 2
        assert one.ask([ask()])[0].text == "yes"
        one.close()


@pytest.mark.parametrize(
    ("fault", "failure"),
    [("bad_body", "bad_body"), ("empty", "empty"), ("refusal", "refusal"), ("huge", "too_large")],
)
def test_a_useless_answer_is_paid_for_once(tmp_path, fault, failure):
    with ApiServer(plan=[fault]) as server:
        one = client(server, tmp_path / "answers.sqlite")
        for _ in range(2):
            assert one.ask([ask()])[0].failure == failure
        assert server.seen == {fault: 1}
        assert one.counts[f"failures/{failure}"] == 2 and one.counts["cached"] == 1
        one.close()


@pytest.mark.parametrize("fault", ["bad_json", "wrong_schema"])
def test_json_that_was_not_asked_for_is_asked_for_once_more(tmp_path, fault):
    with ApiServer(plan=[fault, None, fault, fault]) as server:
        one = client(server, tmp_path / "answers.sqlite", concurrency=1)
        mended, failed = one.ask([ask(1, schema=SCORE)])[0], one.ask([ask(2, schema=SCORE)])[0]
        assert mended.data == {"score": 0} and mended.failure is None
        assert failed.data is None and failed.failure == fault
        assert one.counts[f"retries/{fault}"] == 2 and one.counts[f"failures/{fault}"] == 1
        assert "not what was asked for" in server.bodies[1]["messages"][-1]["content"]
        assert mended.prompt_tokens > failed.prompt_tokens // 2  # both answers are paid for
        assert sum(server.told.values()) == 4
        one.ask([ask(1, schema=SCORE), ask(2, schema=SCORE)])
        assert sum(server.told.values()) == 4  # the answers that were no use are stored, too
        one.close()


def test_the_endpoint_says_how_long_to_wait(tmp_path, quick):
    with ApiServer(plan=["rate_limit"], retry_after="1") as server:
        one = client(server)
        started = time.monotonic()
        one.ask([ask()])
        assert time.monotonic() - started >= 1.0
        one.close()
    with ApiServer(plan=["rate_limit"], retry_after="86400") as server:
        one = client(server)
        assert one.ask([ask()])[0].failure == "rate_limit"  # nobody waits for a day
        one.close()


def test_no_more_at_once_or_a_minute_than_allowed(tmp_path, monkeypatch):
    with ApiServer(delay=0.03) as server:
        one = client(server, concurrency=3)
        one.ask([ask(i) for i in range(20)])
        assert server.most_running == 3
        one.close()
    monkeypatch.setattr("opd_agents.api.limits.MINUTE", 0.4)
    for limit in ({"requests_per_minute": 4}, {"tokens_per_minute": 100}):
        with ApiServer() as server:
            one = client(server, **limit)
            started = time.monotonic()
            one.ask([ask(i, max_tokens=15) for i in range(12)])
            assert 0.8 <= time.monotonic() - started < 3
            one.close()


def test_the_budget_is_overspent_by_requests_in_flight_at_most(tmp_path):
    for budget in ({"max_tokens": 200}, {"max_cost": 5e-4, "prices": PRICES}):
        store = tmp_path / f"{min(budget)}.sqlite"
        with ApiServer(delay=0.01) as server:
            one = client(server, store, concurrency=4, **budget)
            with pytest.raises(BudgetSpent, match="endpoint's max_"):
                one.ask([ask(i) for i in range(200)])
            one.close()
            each, rows = 16, sqlite3.connect(store).execute("SELECT COUNT(*) FROM answers").fetchone()[0]
            most = 200 / each if "max_tokens" in budget else 5e-4 / ((8 + 4 * 8) / 1e6)
            assert sum(server.told.values()) == rows <= most + 4
            again = client(server, store, concurrency=4, **budget)  # of the file, not a process
            with pytest.raises(BudgetSpent):
                again.ask([ask("another")])
            assert sum(server.told.values()) == rows
            again.close()


def test_a_used_up_quota_stops_at_once(tmp_path):
    with ApiServer(plan=["quota"] * 50) as server:
        one = client(server, concurrency=2)
        with pytest.raises(BudgetSpent, match="quota is used up"):
            one.ask([ask(i) for i in range(50)])
        assert sum(server.seen.values()) <= 2
        one.close()


def test_what_no_retry_heals_is_the_users_to_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "wrong-key-777")
    with ApiServer(key="right") as server:
        one = client(server, key="SOME_KEY")
        with pytest.raises(ConfigError, match="SOME_KEY") as caught:
            one.ask([ask(i) for i in range(50)])
        assert "wrong-key-777" not in str(caught.value)
        one.close()
        monkeypatch.delenv("SOME_KEY")
        with pytest.raises(ConfigError, match="SOME_KEY is not set"):
            client(server, key="SOME_KEY")
    with ApiServer(plan=["bad_request", None, "bad_request"]) as server:
        one = client(server, concurrency=1)
        with pytest.raises(ConfigError, match=r"structured.*native_tools"):
            one.ask([ask()])
        one.close()
        assert one.ask([ask(1)])[0].text == "yes"
        assert one.ask([ask(2)])[0].failure == "bad_request"  # one that is too long, say
        one.close()


@pytest.mark.parametrize("given", ["sk-abc-123", "abc123", "OPENAI_API_KEY=sk"])
def test_a_key_itself_is_refused_unshown(given):
    with pytest.raises(ValueError, match="never a key itself") as caught:
        Endpoint(key=given)
    assert "input_value" not in str(caught.value).replace(f"input_value='{given}'", "")


def test_tools_are_offered_natively_or_in_words(tmp_path):
    action = '{"name": "add", "arguments": {"n": 2}}'
    history = (
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"n": 1}'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    )  # fmt: skip
    for native in (True, False):
        with ApiServer(lambda body: action) as server:
            one = client(server, native_tools=native)
            assert one.ask([Request(history, (ADD,))])[0].calls == (ToolCall("add", {"n": 2}),)
            roles = [message["role"] for message in server.bodies[0]["messages"]]
            assert ("tools" in server.bodies[0]) == native
            assert roles == (
                ["user", "assistant", "tool"] if native else ["system", "user", "assistant", "user"]
            )
            assert native or '"name": "add"' in server.bodies[0]["messages"][0]["content"]
            one.close()


def test_a_schema_is_asked_for_in_words_where_the_endpoint_has_none(tmp_path):
    said = 'Sure:\n```json\n{"score": 3}\n```'
    with ApiServer(lambda body: said) as server:
        one = client(server, structured=False)
        assert one.ask([ask(schema=SCORE)])[0].data == {"score": 3}
        assert '"maximum": 9' in server.bodies[0]["messages"][0]["content"]
        assert "response_format" not in server.bodies[0]
        one.close()


def test_fields_of_the_body_come_from_the_config(tmp_path):
    with ApiServer() as server:
        one = client(server, body={"max_tokens": None, "max_completion_tokens": 7, "temperature": None})
        one.ask([ask()])
        assert server.bodies[0].keys() == {"model", "messages", "max_completion_tokens"}
        one.close()


def test_a_thousand_requests_to_a_bad_endpoint(tmp_path, quick, monkeypatch):
    """All faults at once: each is counted, every request has its reply, nothing is paid for twice."""
    monkeypatch.setattr("opd_agents.api.connection.MOST_BYTES", 400_000)  # 10 MB take long on a busy machine
    faults = dict.fromkeys((*PASSING, *USELESS), 0.02) | {"hang": 0.002, "huge": 0.003}
    with ApiServer(faults=faults, seed=3) as server:
        one = client(server, tmp_path / "answers.sqlite", timeout=8.0, concurrency=32)
        requests = [ask(i, schema=SCORE if i % 2 else None) for i in range(1000)]
        replies = one.ask(requests)
        counts, seen = one.counts, dict(server.seen)
        assert max(server.told.values()) == 1
        assert {*PASSING, *USELESS} <= seen.keys()
        retried = {kind: counts[f"retries/{kind}"] for kind in ("rate_limit", "server_error", "timeout")}
        assert retried == {kind: seen["hang" if kind == "timeout" else kind] for kind in retried}
        assert counts["retries/connection"] == seen["cut"] + seen["refused_connection"]
        for fault in ("refusal", "empty", "bad_body", "huge"):
            kind = "too_large" if fault == "huge" else fault
            assert counts[f"failures/{kind}"] == seen[fault] == sum(r.failure == kind for r in replies)
        assert 0 < counts["retries/bad_json"] < seen["bad_json"]  # half of the answers have no schema
        texts = ("yes", '{"score":', '{"other": 1}')
        for i, reply in enumerate(replies):
            assert reply.failure or (reply.data == {"score": 0} if i % 2 else reply.text in texts)
        told = sum(server.told.values())
        assert [r.failure for r in one.ask(requests)] == [r.failure for r in replies]
        assert sum(server.told.values()) == told
        one.close()


def test_what_was_answered_before_an_interrupt_is_kept(tmp_path):
    store = tmp_path / "answers.sqlite"
    with ApiServer(delay=0.01) as server:
        one = client(server, store, concurrency=4)

        def interrupt():
            while sum(server.told.values()) < 50:
                time.sleep(0.005)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background job ignores it
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            one.ask([ask(i) for i in range(1000)])
        signal.signal(signal.SIGINT, before)
        kept = sqlite3.connect(store).execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        time.sleep(0.1)
        told = sum(server.told.values())
        assert 0 < told - 4 <= kept < 1000
        one.ask([ask(i) for i in range(kept)])
        assert sum(server.told.values()) <= told + 4  # those that were on their way
        one.close()


def test_a_servers_thoughts_are_no_answer(tmp_path):
    with ApiServer(lambda body: "<think>{hm}</think>\nThe end.") as server:
        one = client(server)
        assert one.ask([ask()])[0].text == "The end."
        one.close()


def test_a_file_that_another_process_is_making_is_waited_for(tmp_path):
    path = tmp_path / "answers.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # by which SQLite refuses a change of mode without waiting
    done = threading.Timer(0.2, other.execute, ("ROLLBACK",))
    done.start()
    with closing(Store(path)) as store:
        assert store.spent == (0, 0.0)
    done.join()
    other.close()


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "answers.sqlite").write_text("my notes, which are longer than a header" * 10)
    one = ApiClient("m", Endpoint(key=None), store=tmp_path / "answers.sqlite")
    with pytest.raises(ConfigError, match=r"endpoint\.cache"):
        one.ask([ask()])


def test_the_transcript_is_what_was_asked_and_answered(tmp_path):
    with ApiServer(plan=["bad_json"]) as server:
        one = client(server)
        one.ask([ask("hello", schema=SCORE)])
        first, second = one.take_transcript()
        assert first["request"]["messages"][0]["content"] == "hello"
        assert first["answer"]["text"] == '{"score":'
        assert json.loads(second["answer"]["text"]) == {"score": 0}
        assert one.take_transcript() == []
        one.close()


ASKING = """
import sys
from pathlib import Path
from opd_agents.api import ApiClient, Request
from opd_agents.api.store import Store
from opd_agents.config import Endpoint
url, store = sys.argv[1:]
endpoint = Endpoint(base_url=url, key=None, concurrency=8, timeout=10)
client = ApiClient("oracle", endpoint, store=Path(store))
replies = client.ask([Request(({"role": "user", "content": str(i)},)) for i in range(1200)])
print(sum(reply.text == "yes" for reply in replies), client.counts["cached"])
client.close()
"""


def test_a_killed_process_loses_no_answer_and_pays_for_none_twice(tmp_path):
    store = tmp_path / "answers.sqlite"
    with ApiServer(faults={"rate_limit": 0.05, "server_error": 0.05, "cut": 0.05}, delay=0.01) as server:
        command = [sys.executable, "-c", ASKING, server.url, str(store)]
        stored = []
        for moment in (150, 500):  # answers after which it is killed
            process = subprocess.Popen(command)
            deadline = time.monotonic() + 60
            while sum(server.told.values()) < moment and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            stored.append(sqlite3.connect(store).execute("SELECT COUNT(*) FROM answers").fetchone()[0])
            assert stored[-1] >= sum(server.told.values()) - 8 * len(stored) > 0  # all but those in flight
        right, cached = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert right == "1200" and float(cached) == stored[-1]
    assert len(server.told) == 1200 and sum(server.told.values()) <= 1200 + 2 * 8
    tokens = sqlite3.connect(store).execute("SELECT tokens FROM spent").fetchone()[0]
    assert tokens >= 1200 * 16
