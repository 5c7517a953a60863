"""The levels: how a case is drawn, what is said about it, and the budgets of an episode."""
# ruff: noqa: SIM905 -- lists of words are read best as words

from __future__ import annotations

import datetime
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from opd_agents.envs.orderdesk.case import OPEN_STATUSES, Case, Customer, Order, Request
from opd_agents.envs.splits import draw_from_split

NAMES = (
    "ana ben cleo dan eva finn gus hana ivan jun kim leo "
    "mia nora omar pia quinn rosa sam tara uma vera will zoe"
).split()
CITIES = "Athens Bergen Cork Dakar Essen Faro Ghent Hobart Lagos Lima Malmo Nantes Oslo Porto Turin".split()
PRODUCTS = "bag bowl chair clock cup desk fan kettle lamp mirror pan rug scarf shelf stool vase".split()
COLOURS = "black blue green red white yellow".split()
SINGLE_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"

RULES = "processing: cancel_order; shipped: recall_order; delivered: refund_order"
EASY_PROMPT = f"Settle each order by its status ({RULES}), then close_ticket."
PROMPT = (
    "You are a clerk at an order desk. Verify the customer before you change anything; if that fails, "
    "change nothing and close the ticket as refused. Read the policy, look orders up before you act, do "
    "only what is asked for, and close the ticket when all is done. Changes cannot be undone. A call that "
    "times out was not executed."
)
EASY_TOOLS = (
    "find_customer list_orders get_order get_policy refund_order cancel_order recall_order close_ticket"
).split()
ALL_TOOLS = [*EASY_TOOLS, "verify_customer", "check_stock", "issue_credit", "exchange_item", "update_address"]


@dataclass(frozen=True, slots=True)
class Level:
    """One level. At most ``max_timeouts`` calls of an episode time out, so that every task can be solved
    within ``max_turns``."""

    name: str
    draw: Callable[[random.Random], Case]
    system_prompt: str
    tools: tuple[str, ...]
    max_turns: int
    max_timeouts: int
    timeout_rate: float
    linked: bool = False  # the desk names the next order, so that no id must be found among several


@functools.lru_cache(maxsize=4096)  # groups, repairs and forks come back to the same task
def draw_case(level: str, split: str, task_id: str) -> Case:
    """The case of a task; no case is ever in two splits."""
    stream = f"OrderDesk-v0/{level}"
    return draw_from_split(stream, split, task_id, LEVELS[level].draw, lambda case: case.signature)


def _draw_easy(rng: random.Random) -> Case:
    ids = iter(rng.sample(SINGLE_CHARACTERS, 12))
    customers = tuple(Customer(next(ids), name) for name in rng.sample(NAMES, 3))
    counts = (rng.choices((1, 2, 3, 4), (0.3, 0.3, 0.25, 0.15))[0], 1, 2)
    orders = tuple(
        Order(next(ids), customer.id, rng.choice(OPEN_STATUSES))
        for customer, count in zip(customers, counts, strict=True)
        for _ in range(count)
    )
    return Case(
        prompt=f"Customer {customers[0].name} asks to settle every order.",
        customers=customers,
        orders=orders,
        requests=tuple(Request("settle", order.id) for order in orders[: counts[0]]),
        policies=(("orders", RULES),),
    )


def _draw_medium(rng: random.Random) -> Case:
    return _draw_full(rng, requests=rng.randint(2, 3), hard=False)


def _draw_hard(rng: random.Random) -> Case:
    return _draw_full(rng, requests=rng.randint(3, 4), hard=True)


def _draw_full(rng: random.Random, requests: int, hard: bool) -> Case:
    today = datetime.date(2025, 1, 1) + datetime.timedelta(rng.randrange(365))
    window = rng.choice((14, 21, 30, 45))
    customers = _draw_customers(rng, namesakes=hard)
    own = requests + rng.randint(1, 2 if hard else 1)  # some orders are nobody's business
    owners = [customers[0].id] * own + [customers[1].id] * 2
    ids = rng.sample(range(1000, 10000), len(owners))
    # Each of the customer's products occurs once: an item names an order, and no two wishes share a stock.
    products = iter(rng.sample(PRODUCTS, 2 * own) + rng.sample(PRODUCTS, 4))
    orders = tuple(
        _draw_order(rng, f"O{id}", owner, [next(products), next(products)], today, window)
        for id, owner in zip(ids, owners, strict=True)
    )
    asked = tuple(
        _draw_request(rng, order, exchange_allowed=hard or number == 0)
        for number, order in enumerate(rng.sample(orders[:own], requests))
    )
    asked = tuple(rng.sample(asked, len(asked)))
    wishes = {str(r.wish) for r in asked if r.kind == "exchange"}
    stock = {sku: rng.randint(1, 9) for order in orders for sku, _ in order.items}
    stock |= {sku: rng.choice((0, 0, 1, 2, 5)) for sku in sorted(wishes)}
    postcode = str(customers[0].postcode)
    if hard and rng.random() < 0.05:
        postcode = str(rng.randint(1000, 9999))
    return Case(
        prompt=_prompt(customers[0], postcode, today, asked, orders, by_item=hard),
        customers=customers,
        orders=orders,
        requests=asked,
        stock=tuple(sorted(stock.items())),
        policies=_policies(window, separate=hard),
        given_postcode=postcode,
        by_item=hard,
        today=today,
        window_days=window,
    )


def _draw_customers(rng: random.Random, namesakes: bool) -> tuple[Customer, ...]:
    names = rng.sample(NAMES, 3)
    if namesakes:
        names[1] = names[0]
    ids, postcodes = rng.sample(range(100, 1000), 3), rng.sample(range(1000, 10000), 3)
    cities = rng.sample(CITIES, 3)
    return tuple(
        Customer(f"C{id}", name, city, str(postcode), verified=False)
        for id, name, city, postcode in zip(ids, names, cities, postcodes, strict=True)
    )


def _draw_order(
    rng: random.Random, id: str, owner: str, products: list[str], today: datetime.date, window: int
) -> Order:
    status = rng.choices(OPEN_STATUSES, (1, 1, 2))[0]
    bought = products[: rng.randint(1, 2)]
    items = [(f"{product}-{rng.choice(COLOURS)}", rng.randint(5, 90)) for product in bought]
    delivered_on = None
    if status == "delivered":  # never about the last day, where a window can be read two ways
        days = rng.randint(1, window - 1) if rng.random() < 0.6 else rng.randint(window + 2, window + 30)
        delivered_on = today - datetime.timedelta(days)
    return Order(id, owner, status, tuple(items), rng.choice(CITIES), delivered_on)


def _draw_request(rng: random.Random, order: Order, exchange_allowed: bool) -> Request:
    draw = rng.random()
    if exchange_allowed and draw < (0.7 if order.status == "delivered" else 0.2):
        sku = rng.choice(order.items)[0]
        product, colour = sku.split("-")
        wish = rng.choice([other for other in COLOURS if other != colour])
        return Request("exchange", order.id, sku, f"{product}-{wish}")
    if draw > 0.7:
        return Request("move", order.id, wish=rng.choice([city for city in CITIES if city != order.city]))
    return Request("settle", order.id)


def _prompt(
    customer: Customer,
    postcode: str,
    today: datetime.date,
    requests: tuple[Request, ...],
    orders: tuple[Order, ...],
    by_item: bool,
) -> str:
    asked = (wish_text(request, orders, by_item) for request in requests)
    wishes = "; ".join(f"({number}) {wish}" for number, wish in enumerate(asked, 1))
    who = f"{customer.name} of {customer.city}" if by_item else customer.name
    return f"Today is {today}. Customer {who}, postcode {postcode}, asks: {wishes}."


def wish_text(request: Request, orders: tuple[Order, ...], by_item: bool) -> str:
    """A request as the customer words it; ``by_item``: without the order's id."""
    order = order_text(request.order_id, orders, by_item)
    match request.kind:
        case "settle":
            return f"take back {order}"
        case "exchange":
            item = f"the {request.sku}" if by_item else f"the {request.sku} of {order}"
            return f"exchange {item} for a {request.wish}"
        case "move":
            return f"send {order} to {request.wish}"


def order_text(id: str, orders: tuple[Order, ...], by_item: bool) -> str:
    """What the customer calls an order."""
    if not by_item:
        return f"order {id}"
    return f"the order with the {next(order.items[0][0] for order in orders if order.id == id)}"


def _policies(window: int, separate: bool) -> tuple[tuple[str, str], ...]:
    """By topic, or all in one."""
    texts = {
        "addresses": "Send elsewhere: processing: update_address; shipped: recall_order; "
        "delivered: change nothing.",
        "exchanges": "Exchange: delivered and the new item in stock: exchange_item; "
        "otherwise take back the order.",
        "returns": "Take back: processing: cancel_order; shipped: recall_order; "
        f"delivered: refund_order until {window} days after delivery, later issue_credit.",
    }
    return tuple(texts.items()) if separate else (("orders", " ".join(texts.values())),)


LEVELS = {
    level.name: level
    for level in (
        Level("easy", _draw_easy, EASY_PROMPT, tuple(EASY_TOOLS), 16, 4, 0.08, linked=True),
        Level("medium", _draw_medium, PROMPT, tuple(ALL_TOOLS), 24, 6, 0.05),
        Level("hard", _draw_hard, PROMPT, tuple(ALL_TOOLS), 40, 8, 0.05),
    )
}
