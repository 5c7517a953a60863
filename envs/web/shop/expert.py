"""The scripted expert: reads the page, knows the wish, does the next sensible thing from wherever it is."""

from __future__ import annotations

from collections.abc import Sequence

from opd_agents.envs.web.shop.case import Case, Line
from opd_agents.envs.web.shop.store import SORTS, Store
from opd_agents.tools.browser import Node
from opd_agents.types import ToolCall


def next_call(store: Store, nodes: Sequence[Node]) -> ToolCall:
    """The next call towards the wanted order, given what the page shows and what is in the cart."""
    case, page = store.case, _Page(nodes)
    wanted = case.wanted.lines
    for line in store.cart:
        if line not in wanted:
            name = _name(case, line)
            return page.click(f"remove {name}") if page.title == "cart" else page.towards("cart")
    for line, query in zip(wanted, case.queries, strict=True):
        if line not in store.cart:
            return _get(case, line, query, page)
    if page.title == "checkout":
        return page.fill_in(dict(case.wanted.customer), "order")
    return page.click("checkout") if page.title == "cart" else page.towards("cart")


def _get(case: Case, line: Line, query: str, page: _Page) -> ToolCall:
    """Find a product and put so many into the cart."""
    name = _name(case, line)
    if page.title == name:
        return page.fill_in({"size": line.size, "quantity": str(line.quantity)}, "add to cart")
    for node in page.nodes:
        if node.role == "link" and node.name.split(",")[0] == name:
            return ToolCall("click", {"id": node.id})
    if page.has("search"):
        if page.title == f"search {query}" and page.has("next page"):
            return page.click("next page")
        return page.fill_in({"search": query, "most euros": "", "sort": SORTS[1]}, "search")
    return page.towards("home")


def _name(case: Case, line: Line) -> str:
    product = case.product(line.product)
    return product.name if product else line.product


class _Page:
    """What the expert sees of a page."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.title, self.nodes = nodes[0].name, nodes

    def has(self, name: str) -> bool:
        return any(node.id is not None and node.name == name for node in self.nodes)

    def click(self, name: str) -> ToolCall:
        found = (n for n in self.nodes if n.role in ("link", "button") and n.name == name)
        return ToolCall("click", {"id": next(found).id})

    def towards(self, place: str) -> ToolCall:
        """Every page links to the cart or to home, and home to the cart."""
        return self.click(place if self.has(place) else "cart" if self.has("cart") else "home")

    def fill_in(self, values: dict[str, str], button: str) -> ToolCall:
        """Make the first field right that is not yet; when all are, press the button."""
        for node in self.nodes:
            value = values.get("gift" if node.name == "gift wrap" else node.name)
            if value is None:
                continue
            if node.role == "textbox" and node.value != value:
                return ToolCall("fill", {"id": node.id, "text": value})
            if node.role == "combobox" and node.value != value:
                return ToolCall("select", {"id": node.id, "option": value})
            if node.role == "checkbox" and ("checked" in node.states) != bool(value):
                return ToolCall("click", {"id": node.id})
        return self.click(button)
