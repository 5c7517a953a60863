import collections
import datetime
import json
import random
import re
import time
from typing import Any

import pytest

from opd_agents.envs import make
from opd_agents.envs.orderdesk import OrderDesk
from opd_agents.envs.orderdesk.case import OPEN_STATUSES, Case, Customer, Order, Request, resolve
from opd_agents.envs.orderdesk.levels import LEVELS, NAMES, draw_case
from opd_agents.errors import UnknownName, UserError
from opd_agents.testing import check_agent_env
from opd_agents.tools import random_call

ID = "opd_agents/OrderDesk-v0"
RIGHT_STATUS = {"processing": "cancelled", "shipped": "recalled", "delivered": "refunded"}


def action(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))


def started(
    task_id: int = 0, level: str = "easy", split: str = "train", seed: int = 0, **kwargs: Any
) -> OrderDesk:
    env = OrderDesk(level, **{"timeout_rate": 0.0, **kwargs})
    env.reset(seed=seed, options={"split": split, "task_id": str(task_id)})
    return env


def finish(env: OrderDesk) -> dict[str, Any]:
    info: dict[str, Any] = {}
    while not env.over:
        info = env.step(env.expert_action())[4]
    return info


@pytest.mark.parametrize("level", LEVELS)
def test_keeps_the_environment_contract(level: str) -> None:
    check_agent_env(ID, level=level, n_tasks=5)


@pytest.mark.parametrize(("level", "low", "high"), [("easy", 7.4, 8.8), ("medium", 8, 12), ("hard", 13, 20)])
def test_the_expert_solves_every_task_in_the_expected_length(level: str, low: float, high: float) -> None:
    env = make(ID, level=level)
    turns, timeouts = [], 0
    for i in range(300):
        env.reset(seed=i, options={"split": ("train", "validation", "test")[i % 3], "task_id": str(i)})
        while not env.over:
            info = env.step(env.expert_action())[4]
            timeouts += info["tool_error"] == "timeout"
            assert info["tool_error"] in (None, "timeout")
        assert info["success"], env.task
        turns.append(env.turn)
    assert low < sum(turns) / 300 < high
    rate = LEVELS[level].timeout_rate
    assert 0.7 * rate < timeouts / sum(turns) < 1.3 * rate


def test_the_expert_copes_with_the_most_time_outs_possible() -> None:
    longest = max(range(60), key=lambda i: len(started(i).case.requests))
    env = started(longest, timeout_rate=1.0)
    assert len(env.case.requests) == 4
    assert finish(env)["success"] and env.turn == 15 and env.max_turns == 16


def test_easy_texts_are_these() -> None:
    env = started(3)
    exchanges = [("", env.reset(options={"split": "train", "task_id": "3"})[0])]
    while not env.over:
        exchanges.append((env.expert_action(), env.step(env.expert_action())[0]))
    texts = [re.sub(r"(?<=\")[0-9a-z](?=\")", "ID", f"{a}{o}") for a, o in exchanges]
    name = env.case.customers[0].name
    assert texts[:3] == [
        f"Customer {name} asks to settle every order.",
        f'{{"name":"find_customer","arguments":{{"name":"{name}"}}}}{{"customer_id":"ID"}}',
        '{"name":"list_orders","arguments":{"customer_id":"ID"}}{"next_order":"ID"}',
    ]
    status = env.case.orders[0].status
    assert texts[3] == (
        f'{{"name":"get_order","arguments":{{"order_id":"ID"}}}}{{"order_id":"ID","status":"{status}"}}'
    )
    assert texts[4].endswith(f'{{"status":"{RIGHT_STATUS[status]}","next_order":"ID"}}')
    assert texts[-2].endswith('"next_order":"none"}')
    assert texts[-1] == '{"name":"close_ticket","arguments":{}}{"ticket":"closed"}'


def test_easy_goal_is_the_rule_applied_to_every_order_and_nothing_else() -> None:
    """The verifier against the database itself, without the expert's own notion of a solution."""
    for i in range(50):
        env = started(i)
        before = dict(env.database.rows("SELECT id, status FROM orders"))
        mine = [o.id for o in env.case.orders if o.customer_id == env.case.customers[0].id]
        assert finish(env)["success"]
        after = dict(env.database.rows("SELECT id, status FROM orders"))
        assert after == {id: RIGHT_STATUS[s] if id in mine else s for id, s in before.items()}
        refunded = {id for (id,) in env.database.rows("SELECT order_id FROM refunds")}
        assert refunded == {id for id in mine if before[id] == "delivered"}
        assert env.database.rows("SELECT status, resolution FROM ticket") == [("closed", "done")]


def test_wrong_action_for_the_status_is_executed_irreversible_and_fails() -> None:
    task = next(i for i in range(50) if started(i).case.orders[0].status == "shipped")
    env = started(task)
    order_id = env.case.orders[0].id
    assert env.step(action("refund_order", order_id=order_id))[0].startswith('{"status":"refunded",')
    observation, *_, info = env.step(action("recall_order", order_id=order_id))
    assert (observation, info["tool_error"]) == ('{"error":"already settled"}', "already settled")
    asked = []
    while not env.over:
        asked.append(json.loads(env.expert_action()))
        info = env.step(env.expert_action())[4]
    assert order_id not in [call["arguments"].get("order_id") for call in asked]  # nothing to be mended there
    assert [call["name"] for call in asked][-1] == "close_ticket" and not info["success"]


@pytest.mark.parametrize(
    ("level", "name"), [("easy", "cancel_order"), ("hard", "cancel_order"), ("hard", "update_address")]
)
def test_collateral_changes_fail(level: str, name: str) -> None:
    env = started(1, level)
    other = next(o for o in env.case.orders if o.customer_id != env.case.customers[0].id)
    arguments = {"order_id": other.id} | ({"city": "Paris"} if name == "update_address" else {})
    env.step(action(name, **arguments))
    assert not finish(env)["success"]


@pytest.mark.parametrize("skipped", ["settle", "close"])
def test_unfinished_work_fails(skipped: str) -> None:
    env = started(2)
    info = {"success": True}
    while not env.over:
        wanted = env.expert_action()
        if skipped == "settle" and re.search("refund|cancel|recall", wanted):
            wanted = action("close_ticket")
        if skipped == "close" and "close_ticket" in wanted:
            wanted = action("get_policy")
        info = env.step(wanted)[4]
    assert not info.get("success")


def test_text_costs_a_turn_and_points_to_close_ticket() -> None:
    env = started()
    observation, reward, terminated, _, info = env.step("All done, dear customer!")
    assert "close_ticket" in observation and info["messages"][0].role == "user"
    assert (env.turn, reward, terminated) == (1, 0.0, False)
    assert finish(env)["success"]


def test_time_outs_execute_nothing_and_follow_the_seed() -> None:
    env = started(5, timeout_rate=1.0)
    digest = env.state_digest()
    observation, *_, info = env.step(action("cancel_order", order_id=env.case.orders[0].id))
    assert observation == '{"error":"timeout"}' and info["tool_error"] == "timeout"
    assert env.state_digest() == digest

    def pattern(seed: int) -> list[bool]:
        noisy = started(5, timeout_rate=0.5, seed=seed)
        return ["timeout" in noisy.step(action("get_policy"))[0] for _ in range(8)]

    assert pattern(1) == pattern(1)
    assert len({tuple(pattern(seed)) for seed in range(8)}) > 3


def test_the_seed_moves_no_content() -> None:
    for level in LEVELS:
        digests = {started(4, level, seed=seed).state_digest() for seed in range(3)}
        assert len(digests) == 1


def test_splits_are_disjoint_by_content() -> None:
    for level in LEVELS:
        drawn = {
            split: {draw_case(level, split, str(i)).signature for i in range(150)}
            for split in OrderDesk.split_sizes
        }
        assert not drawn["train"] & drawn["test"] and not drawn["train"] & drawn["validation"]
        assert not drawn["validation"] & drawn["test"]
        assert all(len(signatures) > 145 for signatures in drawn.values())


def test_disjointness_is_not_an_accident_of_few_samples() -> None:
    """Drawn freely, tasks of the easy level coincide: without the rule they would do so between splits."""
    rng = random.Random(0)
    drawn = [LEVELS["easy"].draw(rng).signature for _ in range(12_000)]
    assert len(set(drawn)) < len(drawn)
    test = {draw_case("easy", "test", str(i)).signature for i in range(1500)}
    train = {draw_case("easy", "train", str(i)).signature for i in range(4000)}
    assert not test & train


def test_tasks_do_not_depend_on_the_process() -> None:
    """A pinned task: a change here changes every split, so it needs a new version of the environment."""
    case = draw_case("easy", "test", "17")
    assert case.prompt == "Customer nora asks to settle every order."
    assert [(o.id, o.status) for o in case.orders[:2]] == [("r", "delivered"), ("t", "shipped")]


def test_easy_ids_are_single_characters_and_lists_are_balanced() -> None:
    cases = [draw_case("easy", "train", str(i)) for i in range(400)]
    ids = [o.id for case in cases for o in case.orders] + [c.id for case in cases for c in case.customers]
    assert {len(id) for id in ids} == {1} and len(set(ids)) == 36
    assert {len(case.requests) for case in cases} == {1, 2, 3, 4}
    statuses = collections.Counter(o.status for case in cases for o in case.orders)
    assert set(statuses) == set(OPEN_STATUSES) and max(statuses.values()) < 1.2 * min(statuses.values())
    assert len(set(NAMES)) == 24


def test_snapshot_copies_the_database() -> None:
    env = started(1, "hard")
    for _ in range(8):
        env.step(env.expert_action())
    twin = env.fork()
    digest = env.state_digest()
    assert finish(twin)["success"]
    assert env.state_digest() == digest != twin.state_digest()
    saved = env.snapshot()
    assert finish(env)["success"]
    env.restore(saved)
    assert env.state_digest() == digest and env.expert_action() == env.fork().expert_action()
    assert env.database.image()[:15] == b"SQLite format 3"


def test_the_expert_recovers_from_what_can_be_mended() -> None:
    """After random reads and refused calls of another agent it still succeeds; it never loops or crashes."""
    reads = ("find_customer", "list_orders", "get_order", "get_policy", "check_stock")
    for level in LEVELS:
        for i in range(20):
            rng = random.Random(i)
            env = started(i, level, max_turns=60)
            words = [o.id for o in env.case.orders] + [c.id for c in env.case.customers] + ["ana", "x"]
            tools = [tool for tool in env.tools if tool.name in reads]
            for _ in range(5):
                call = random_call(tools, rng, words)
                env.step(action(call.name, **call.arguments))
            assert finish(env)["success"]
            env = started(i, level, max_turns=60)
            for _ in range(5):
                call = random_call([t for t in env.tools if t.name != "close_ticket"], rng, words)
                env.step(action(call.name, **call.arguments))
            finish(env)
            assert env.database.rows("SELECT status FROM ticket") == [("closed",)] and env.turn < 40


# ---- the policy of the medium and hard levels, rule by rule ----


def full_case(request: Request, **changes: Any) -> Case:
    today = datetime.date(2025, 6, 30)
    order = Order(
        request.order_id,
        "C1",
        changes.pop("status", "delivered"),
        (("lamp-red", 20), ("cup-blue", 5)),
        "Oslo",
        today - datetime.timedelta(changes.pop("days", 3)),
    )
    values: dict[str, Any] = {
        "prompt": "",
        "customers": (Customer("C1", "ana", "Oslo", "1234", verified=False),),
        "orders": (order,),
        "requests": (request,),
        "stock": (("lamp-blue", changes.pop("count", 2)), ("lamp-red", 1)),
        "given_postcode": "1234",
        "today": today,
        "window_days": 30,
    }
    return Case(**values | changes)


@pytest.mark.parametrize(
    ("request_", "changes", "tool"),
    [
        (Request("settle", "O1"), {"status": "processing"}, "cancel_order"),
        (Request("settle", "O1"), {"status": "shipped"}, "recall_order"),
        (Request("settle", "O1"), {"days": 30}, "refund_order"),
        (Request("settle", "O1"), {"days": 31}, "issue_credit"),
        (Request("exchange", "O1", "lamp-red", "lamp-blue"), {}, "exchange_item"),
        (Request("exchange", "O1", "lamp-red", "lamp-blue"), {"count": 0}, "refund_order"),
        (Request("exchange", "O1", "lamp-red", "lamp-blue"), {"count": 0, "days": 40}, "issue_credit"),
        (Request("exchange", "O1", "lamp-red", "lamp-blue"), {"status": "shipped"}, "recall_order"),
        (Request("move", "O1", wish="Lima"), {"status": "processing"}, "update_address"),
        (Request("move", "O1", wish="Lima"), {"status": "shipped"}, "recall_order"),
        (Request("move", "O1", wish="Lima"), {}, None),
    ],
)
def test_policy(request_: Request, changes: dict[str, Any], tool: str | None) -> None:
    case = full_case(request_, **changes)
    outcome = resolve(case, request_, case.orders[0])
    assert (outcome and outcome[0]) == tool


def desk_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> OrderDesk:
    monkeypatch.setattr("opd_agents.envs.orderdesk.env.draw_case", lambda *task: case)
    return started(0, "medium")


def test_an_exchange_moves_stock_and_item(monkeypatch: pytest.MonkeyPatch) -> None:
    env = desk_for(full_case(Request("exchange", "O1", "lamp-red", "lamp-blue")), monkeypatch)
    assert finish(env)["success"]
    assert env.database.rows("SELECT * FROM stock") == [("lamp-blue", 1), ("lamp-red", 2)]
    assert env.database.rows("SELECT sku FROM items") == [("cup-blue",), ("lamp-blue",)]
    assert env.database.rows("SELECT * FROM changes") == [("O1", "exchange_item", 1)]


def test_a_late_return_is_paid_as_credit_and_a_refund_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_case(Request("settle", "O1"), days=31)
    env = desk_for(case, monkeypatch)
    assert finish(env)["success"]
    assert env.database.rows("SELECT * FROM refunds") == [("O1", "issue_credit", 25)]
    env = desk_for(case, monkeypatch)
    env.step(action("verify_customer", customer_id="C1", postcode="1234"))
    assert env.step(action("refund_order", order_id="O1"))[0] == '{"status":"refunded","amount":25}'
    assert not finish(env)["success"]


def test_acting_before_verifying_fails_even_if_verified_later(monkeypatch: pytest.MonkeyPatch) -> None:
    env = desk_for(full_case(Request("settle", "O1")), monkeypatch)
    env.step(action("refund_order", order_id="O1"))
    assert not finish(env)["success"]
    assert env.database.rows("SELECT verified FROM customers") == [(1,)]


def test_an_unverifiable_customer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_case(Request("settle", "O1"), given_postcode="9999")
    env = desk_for(case, monkeypatch)
    assert finish(env)["success"] and env.turn == 3
    assert env.database.rows("SELECT * FROM ticket") == [("closed", "refused")]
    env = desk_for(case, monkeypatch)
    assert env.step(action("verify_customer", customer_id="C1", postcode="9999"))[0] == '{"verified":false}'
    env.step(action("close_ticket"))
    assert env.over and not env.success()


def test_exchanging_what_is_out_of_stock_is_done_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    env = desk_for(full_case(Request("exchange", "O1", "lamp-red", "lamp-blue"), count=0), monkeypatch)
    env.step(action("verify_customer", customer_id="C1", postcode="1234"))
    assert env.step(action("check_stock", sku="lamp-blue"))[0] == '{"sku":"lamp-blue","count":0}'
    env.step(action("exchange_item", order_id="O1", sku="lamp-red", new_sku="lamp-blue"))
    assert env.database.rows("SELECT count FROM stock WHERE sku = 'lamp-blue'") == [(-1,)]
    assert not finish(env)["success"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (action("find_customer", name="nobody"), "no such customer"),
        (action("list_orders", customer_id="C9"), "unknown customer"),
        (action("get_order", order_id="O9"), "unknown order"),
        (action("refund_order", order_id="O9"), "unknown order"),
        (action("check_stock", sku="x"), "unknown item"),
        (action("exchange_item", order_id="O1", sku="x", new_sku="lamp-blue"), "has no item 'x'"),
        (action("exchange_item", order_id="O1", sku="lamp-red", new_sku="x"), "unknown item"),
        (action("get_policy", topic="x"), "no policy on 'x'"),
        (action("close_ticket", resolution="x"), "Input should be 'done' or 'refused'"),
        (action("find_customer", name="a'; DROP TABLE orders; --"), "no such customer"),
    ],
)
def test_foreseeable_mistakes_are_answered(monkeypatch: pytest.MonkeyPatch, call: str, error: str) -> None:
    env = desk_for(full_case(Request("settle", "O1")), monkeypatch)
    digest = env.state_digest()
    assert error in env.step(call)[4]["tool_error"] and env.state_digest() == digest


@pytest.mark.parametrize("level", ["medium", "hard"])
def test_richer_levels_cover_every_tool_and_outcome(level: str) -> None:
    used: collections.Counter[str] = collections.Counter()
    for i in range(200):
        env = started(i, level)
        while not env.over:
            wanted = env.expert_action()
            used[json.loads(wanted)["name"]] += 1
            env.step(wanted)
    offered = {tool.name for tool in env.tools}
    assert offered - set(used) == ({"list_orders"} if level == "medium" else set()) and len(offered) == 13


def test_every_level_offers_at_least_eight_tools_and_a_policy() -> None:
    for level in LEVELS:
        env = started(0, level)
        assert len(env.tools) >= 8
        topic = env.case.policies[0][0]
        assert "policy" in env.step(action("get_policy", topic=topic))[0]


def test_bad_arguments_of_the_environment_are_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'easy'"):
        OrderDesk("eazy")
    with pytest.raises(UserError, match="timeout_rate"):
        OrderDesk(timeout_rate=1.5)
    with pytest.raises(UserError, match="max_turns"):
        OrderDesk(max_turns=0)


def test_it_is_fast_enough_for_training() -> None:
    """A tenth of what one free core does, so that a busy machine passes."""
    env, begin = started(), time.perf_counter()
    for i in range(100):
        env.reset(seed=i, options={"split": "train", "task_id": str(i)})
        finish(env)
        env.restore(env.snapshot())
    assert time.perf_counter() - begin < 1.0
