"""The scripted expert: reads what it needs, does what policy says, closes the case."""

from __future__ import annotations

from collections.abc import Iterator, Set

from opd_agents.envs.orderdesk.case import OPEN_STATUSES, Case, resolve
from opd_agents.envs.orderdesk.database import Database
from opd_agents.types import ToolCall


def solution(case: Case) -> list[ToolCall]:
    """The calls that change the database as policy asks; the goal state is what they lead to."""
    calls = []
    if case.given_postcode is not None:
        calls.append(_verify(case))
    if not case.verifiable:
        return [*calls, ToolCall("close_ticket", {"resolution": "refused"})]
    orders = {order.id: order for order in case.orders}
    for request in case.requests:
        outcome = resolve(case, request, orders[request.order_id])
        if outcome:
            calls.append(ToolCall(*outcome))
    return [*calls, ToolCall("close_ticket", {})]


def next_call(case: Case, database: Database, answered: Set[str]) -> ToolCall:
    """The first call of the plan that is still needed.

    ``answered`` holds the keys (see ``call_key``) of all calls that were answered so far, by whomever they
    were made, so that the expert can take over anywhere: what is read is not read again, and an order that
    is settled, rightly or not, is left alone.
    """
    found = database.rows("SELECT id, status, city FROM orders")
    settled = {id for id, status, _ in found if status not in OPEN_STATUSES}
    cities = {id: city for id, _, city in found}
    for order_id, call in _plan(case):
        if order_id in settled:
            continue
        if call.name == "update_address":
            needed = cities[order_id] != call.arguments["city"]
        else:
            needed = call_key(call) not in answered
        if needed:
            return call
    return solution(case)[-1]


def call_key(call: ToolCall) -> str:
    return f"{call.name}{sorted(call.arguments.items())}"


def _verify(case: Case) -> ToolCall:
    arguments = {"customer_id": case.customers[0].id, "postcode": str(case.given_postcode)}
    return ToolCall("verify_customer", arguments)


def _plan(case: Case) -> Iterator[tuple[str | None, ToolCall]]:
    """Every call from the first to the last, in the order in which a clerk makes them, each with the order
    that it is about."""
    yield None, ToolCall("find_customer", {"name": case.customers[0].name})
    if case.given_postcode is not None:
        yield None, _verify(case)
    if case.verifiable:
        if case.given_postcode is not None:
            yield from ((None, ToolCall("get_policy", {"topic": topic})) for topic, _ in case.policies)
        yield from _order_calls(case)
    yield None, solution(case)[-1]


def _order_calls(case: Case) -> Iterator[tuple[str | None, ToolCall]]:
    customer_id = case.customers[0].id
    own = {order.id: order for order in case.orders if order.customer_id == customer_id}
    if case.by_item or case.given_postcode is None:
        yield None, ToolCall("list_orders", {"customer_id": customer_id})
    if case.by_item:  # which order holds which item shows only once all are read
        yield from ((id, ToolCall("get_order", {"order_id": id})) for id in own)
    for request in case.requests:
        order = own[request.order_id]
        if not case.by_item:
            yield order.id, ToolCall("get_order", {"order_id": order.id})
        if request.kind == "exchange" and order.status == "delivered":
            yield order.id, ToolCall("check_stock", {"sku": request.wish})
        outcome = resolve(case, request, order)
        if outcome:
            yield order.id, ToolCall(*outcome)
