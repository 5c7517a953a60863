"""The shop: as text, in a real browser, and that both are the same."""

import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_agents.envs import AgentEnv, format_calls, make
from opd_agents.envs.web.shop import Shop, ShopText, server
from opd_agents.envs.web.shop.case import Case, Line
from opd_agents.envs.web.shop.levels import LEVELS, draw_case
from opd_agents.envs.web.shop.store import Store, clean
from opd_agents.envs.web.shop.view import Text
from opd_agents.errors import UnknownName, UserError
from opd_agents.testing import check_agent_env
from opd_agents.tools import random_call

TEXT, WEB = "opd_agents/ShopText-v0", "opd_agents/Shop-v0"
PATHS = (
    "/", "/cart", "/checkout", "/order", "/nope", "/product/p1", "/product/p0?problem=x", "/add/p1",
    "/search", "/search?q=mug", "/search?q=&page=2", "/search?q=red&sort=best+first",
    "/search?most=40&page=99999999",
)  # fmt: skip
TYPED = (
    "ana",
    "2",
    "0",
    "-1",
    "1234",
    "é😀x",
    "a&b=<c>\"'",
    "  x \n y\t",
    "\ud800",
    "٣",
    "x" * 100,
    "%41+",
    "",
)
real = pytest.mark.real("chromium", "playwright")


def action(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def started(env: AgentEnv, task_id: int = 0, split: str = "train") -> str:
    return env.reset(seed=0, options={"split": split, "task_id": str(task_id)})[0]


def finish(env: AgentEnv) -> dict[str, Any]:
    info: dict[str, Any] = {}
    while not env.over:
        info = env.step(env.expert_action())[4]
    return info


def some_action(env: AgentEnv, rng: random.Random, text: str) -> str:
    """The expert's, or one that wanders, types or is nonsense."""
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            return env.expert_action()
        case 4:
            return action("back")
        case 5:
            return action("goto", path=rng.choice(PATHS))
        case 6 | 7:
            return action("fill", id=rng.randint(1, 6), text=rng.choice(TYPED))
        case _:
            return format_calls([random_call(env.tools, rng, re.findall(r"[\w.-]+", text))])


# ---- the shop itself ----


@pytest.mark.parametrize("level", LEVELS)
def test_keeps_the_environment_contract(level: str) -> None:
    check_agent_env(TEXT, level=level, n_tasks=4)


@pytest.mark.parametrize(("level", "low", "high"), [("easy", 5, 5), ("medium", 8.5, 10), ("hard", 18, 21)])
def test_the_expert_buys_what_is_wanted(level: str, low: float, high: float) -> None:
    env, turns = make(TEXT, level=level), []
    for i in range(60):
        started(env, i, ("train", "validation", "test")[i % 3])
        info = finish(env)
        assert info["success"] and info["tool_error"] is None, env.task
        turns.append(env.turn)
    assert low <= sum(turns) / 60 <= high and max(turns) <= 0.7 * env.max_turns


@pytest.mark.parametrize("level", LEVELS)
def test_the_expert_finds_its_way_from_anywhere(level: str) -> None:
    env, rescued = make(TEXT, level=level, max_turns=200), 0
    for i in range(20):
        rng, text = random.Random(i), started(env, i)
        for _ in range(12):
            if not env.over:
                text = env.step(some_action(env, rng, text))[0]
        if not env.over:
            rescued += 1
            assert finish(env)["success"], (level, i)
    assert rescued >= 10


def test_a_wrong_order_fails_and_ends_the_episode() -> None:
    env = make(TEXT)
    started(env)
    while "order" not in [node.name for node in env.nodes]:  # type: ignore[attr-defined]
        env.step(env.expert_action())
    env.step(action("fill", id=1, text="somebody"))
    _, reward, terminated, _, info = env.step(action("click", id=2))
    assert (reward, terminated, info["success"]) == (0.0, True, False)


def test_a_text_orders_nothing() -> None:
    env = make(TEXT)
    started(env)
    observation, _, terminated, *_ = env.step("I have bought it.")
    assert observation == "Please order it in the shop." and not terminated


def test_what_the_checkout_asks_for_must_be_given() -> None:
    store = Store(draw_case("hard", "train", "0"))
    assert store.view(store.send("/order", {})).parts[0].text == "the cart is empty"  # type: ignore[union-attr]
    id = next(product.id for product in store.case.products if product.stock)
    assert store.send(f"/add/{id}", {"size": "small", "quantity": "1"}) == "/cart"
    given = {"name": " ", "city": "Atlantis", "postcode": "12a4", "delivery": "standard"}
    parts = store.view(store.send("/order", given)).parts
    alerts = [part.text for part in parts if isinstance(part, Text) and part.alert]
    assert alerts == ["name is missing", "city is missing", "postcode must have 4 digits"]
    assert not store.orders
    store.send("/order", {**given, "name": " Ana  Berg ", "city": "Lima", "postcode": "1234"})
    assert dict(store.orders[0].customer)["name"] == "Ana Berg" and store.cart == []


@pytest.mark.parametrize("quantity", ["0", "-1", "99", "", "x", "1.5", "²", "٣", "9" * 50])
def test_only_what_is_in_stock_is_sold(quantity: str) -> None:
    store = Store(draw_case("medium", "train", "0"))
    assert store.send("/add/p0", {"size": "small", "quantity": quantity}).endswith("problem=quantity")
    assert store.cart == []


def test_the_stock_counts_what_is_in_the_cart() -> None:
    store = Store(draw_case("medium", "train", "0"))
    stock = store.case.products[0].stock
    store.send("/add/p0", {"size": "small", "quantity": str(stock)})
    assert store.send("/add/p0", {"size": "large", "quantity": "1"}).endswith("problem=quantity")
    assert store.cart == [Line("p0", stock, "small")]
    store.send("/remove/7", {})
    assert len(store.cart) == 1
    store.send("/remove/0", {})
    assert store.cart == []


@pytest.mark.parametrize("level", LEVELS)
def test_a_task_says_all_that_its_order_needs_and_is_in_one_split(level: str) -> None:
    seen: dict[Case, str] = {}
    for split in ("train", "validation", "test"):
        for i in range(100):
            case = draw_case(level, split, str(i))
            assert seen.setdefault(case, split) == split
            for key, value in case.wanted.customer:
                assert value in case.prompt or key == "gift"
            for line, query in zip(case.wanted.lines, case.queries, strict=True):
                assert query in case.prompt and line.size in case.prompt
                assert case.product(line.product).stock >= line.quantity  # type: ignore[union-attr]
    assert len(seen) > 290


def test_cheapest_is_one_product() -> None:
    for i in range(100):
        case = draw_case("hard", "test", str(i))
        for text in re.findall(r"of the (.+?), size", case.prompt):
            words, _, rest = text.partition(" with at least ")
            order, (colour, kind) = words.split(" ")[:-2], words.split(" ")[-2:]
            fits = [
                product for product in case.products
                if {colour, kind} <= product.words and product.stock and product.stars >= int(rest[:1] or 1)
            ]  # fmt: skip
            pick = {"cheapest": min, "most expensive": max}[" ".join(order)]
            assert pick(fits, key=lambda p: p.price).id in [line.product for line in case.wanted.lines]


def test_content_is_the_same_in_every_process() -> None:
    code = (
        "from opd_agents.envs.web.shop.levels import LEVELS, draw_case; import zlib\n"
        "print([zlib.crc32(repr(draw_case(l, 'test', '5')).encode()) for l in LEVELS])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": h},
        ).stdout
        for h in "12"
    }
    assert len(runs) == 1 and runs.pop().startswith("[")


@pytest.mark.real("playwright")
def test_wrong_options_are_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'easy'"):
        make(TEXT, level="eassy")
    for id, options in ((TEXT, {"max_turns": 0}), (WEB, {"timeout": -1.0})):
        with pytest.raises(UserError, match="must be"):
            make(id, **options)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_what_is_typed_is_plain(text: str) -> None:
    cleaned = clean(text)
    assert cleaned.isprintable() and "  " not in cleaned and len(cleaned) <= 100 and clean(cleaned) == cleaned


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
TOOLS = st.sampled_from(["click", "fill", "select", "goto", "back", "scroll", "x"])
KEYS = st.sampled_from(["id", "text", "option", "path", "direction", "y"])
ACTIONS = st.text(max_size=200) | st.builds(
    lambda name, arguments: json.dumps({"name": name, "arguments": arguments}),
    TOOLS,
    st.dictionaries(
        KEYS, JSON | st.integers(-(10**40), 10**40) | st.sampled_from([*PATHS, *TYPED]), max_size=3
    ),
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(list(LEVELS)), st.lists(ACTIONS, max_size=8))
def test_every_action_gets_an_observation(level: str, actions: list[str]) -> None:
    env = make(TEXT, level=level)
    started(env)
    for each in actions:
        if not env.over:
            assert env.step(each)[0]


# ---- in a real browser ----


@pytest.fixture(scope="module")
def web() -> Iterator[dict[str, AgentEnv]]:
    envs = {level: make(WEB, level=level, max_turns=30, timeout=20.0) for level in LEVELS}
    yield envs
    for env in envs.values():
        env.close()


def assert_same(web: AgentEnv, text: AgentEnv, task_id: int, steps: int) -> None:
    rng = random.Random(task_id)
    seen = started(text, task_id)
    assert started(web, task_id) == seen
    done = []
    while not text.over and len(done) < steps:
        done.append(some_action(text, rng, seen))
        one, other = web.step(done[-1]), text.step(done[-1])
        seen = other[0]
        assert one[:4] == other[:4], done
        assert web.state_digest() == text.state_digest(), done


@real
def test_keeps_the_environment_contract_in_the_browser() -> None:
    env = make(WEB, timeout=20.0)
    env.split_sizes = {"train": 2}  # a page costs a tenth of a second
    check_agent_env(env, n_tasks=1)
    env.close()


@real
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("level", LEVELS)
def test_keeps_the_environment_contract_in_the_browser_on_all_levels(level: str) -> None:
    check_agent_env(WEB, n_tasks=2, level=level, timeout=20.0)


@real
@pytest.mark.parametrize("level", LEVELS)
def test_both_shops_are_the_same_step_by_step(web: dict[str, AgentEnv], level: str) -> None:
    text = make(TEXT, level=level, max_turns=30)
    for task_id in range(3):
        assert_same(web[level], text, task_id, steps=20)


@real
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("level", LEVELS)
def test_both_shops_are_the_same_in_many_episodes(web: dict[str, AgentEnv], level: str) -> None:
    text = make(TEXT, level=level, max_turns=30)
    for task_id in range(100, 160):
        assert_same(web[level], text, task_id, steps=30)


@real
@pytest.mark.parametrize("level", LEVELS)
def test_the_expert_buys_in_the_browser_too(web: dict[str, AgentEnv], level: str) -> None:
    started(web[level], 7, "test")
    assert finish(web[level])["success"]


@real
def test_a_fork_replays_in_a_tab_of_its_own(web: dict[str, AgentEnv]) -> None:
    env = web["medium"]
    started(env, 3)
    for _ in range(6):
        env.step(env.expert_action())
    saved, digest = env.snapshot(), env.state_digest()
    twin = env.fork(reseed=1)
    assert finish(twin)["success"] and env.state_digest() == digest
    twin.close()
    env.step(action("goto", path="/"))
    assert env.state_digest() != digest
    env.restore(saved)
    assert env.state_digest() == digest and finish(env)["success"]


@real
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=1, max_size=4))
def test_every_action_gets_the_same_observation_in_the_browser(
    web: dict[str, AgentEnv], actions: list[str]
) -> None:
    text = make(TEXT, level="medium", max_turns=30)
    assert started(web["medium"]) == started(text)
    for each in actions:
        if not text.over:
            assert web["medium"].step(each)[:4] == text.step(each)[:4]


@real
def test_a_server_that_dies_is_an_observation_and_the_next_episode_goes_on() -> None:
    env = make(WEB, timeout=5.0)
    started(env)
    server.shared().close()
    observation, reward, terminated, _, info = env.step(action("click", id=1))
    assert observation == '{"error":"the page cannot be loaded (ERR_CONNECTION_REFUSED)"}'
    assert info["tool_error"] and not terminated and reward == 0
    started(env, 1)
    assert finish(env)["success"]
    env.close()
    env.close()


@real
def test_a_page_that_never_loads_is_an_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(WEB, timeout=1.0)
    assert isinstance(env, Shop)
    before = started(env)
    asked, release, view = threading.Event(), threading.Event(), Store.view

    def slow(store: Store, address: str) -> Any:
        asked.set()
        release.wait(20)
        return view(store, address)

    monkeypatch.setattr(Store, "view", slow)
    observation = env.step(action("goto", path="/cart"))[0]
    assert asked.is_set() and observation == '{"error":"the page did not load within 1 s"}'
    monkeypatch.undo()
    release.set()
    assert env.step(action("scroll", direction="down"))[0] == before.split("\n", 1)[1]
    assert finish(env)["success"]
    env.close()


@real
def test_nothing_is_left_of_a_closed_environment() -> None:
    env = make(WEB)
    started(env)
    stores = server.shared().stores
    held = set(stores)
    started(env, 1)
    assert len(stores) == len(held)
    env.close()
    assert len(stores) == len(held) - 1


def test_only_the_state_is_in_a_snapshot() -> None:
    env = make(TEXT, level="hard")
    started(env)
    assert isinstance(env, ShopText) and len(env.snapshot().state) < 500
