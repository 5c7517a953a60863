"""The shop: its pages, and what sending a form changes. Plain data and text, no browser and no server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode, urlsplit

from opd_agents.envs.web.shop.case import CITIES, DELIVERIES, SIZES, Case, Line, Order, Product
from opd_agents.envs.web.shop.view import MOST_TYPED, Button, Field, Form, Link, Text, View

PER_PAGE = 8
SORTS = ("relevance", "cheapest first", "best first")
NOT_CHOSEN = "choose"
HOME, CART, CHECKOUT = Link("home", "/"), Link("cart", "/cart"), Link("checkout", "/checkout")


def clean(text: str) -> str:
    """What the shop makes of anything typed: printable characters, single spaces, so many at most."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MOST_TYPED]


@dataclass(slots=True)
class Store:
    """One customer's visit to the shop. All but ``case`` is what the visit changes."""

    case: Case
    cart: list[Line] = field(default_factory=list)
    customer: dict[str, str] = field(default_factory=dict)  # the checkout form as last sent
    orders: list[Order] = field(default_factory=list)

    # ---- pages ----

    def view(self, address: str) -> View:
        """The page at a path with its query; every path has one."""
        parts = urlsplit(address)
        query = {key: clean(value) for key, value in parse_qsl(parts.query)}
        match parts.path.strip("/").split("/"):
            case [""]:
                return self._home()
            case ["search"] if self.case.has_search:
                return self._results(query)
            case ["product", id] if product := self.case.product(id):
                return self._product(product, query.get("problem", ""))
            case ["cart"]:
                return self._cart()
            case ["checkout"]:
                return self._checkout("problem" in query)
            case ["order"] if self.orders:
                return self._order()
        return View("not found", (Text("there is no such page"), HOME))

    def _home(self) -> View:
        if self.case.has_search:
            return View("shop", (self._search_form({}), CART))
        return View("shop", (*map(self._link, self.case.products), CART))

    def _results(self, query: Mapping[str, str]) -> View:
        found = self._found(query)
        number = _number(query.get("page", ""), 1)
        shown = found[(number - 1) * PER_PAGE : number * PER_PAGE]
        parts: list[Text | Link | Form] = [self._search_form(query), *map(self._link, shown)]
        if not shown:
            parts.append(Text("nothing found"))
        if number * PER_PAGE < len(found):
            parts.append(Link("next page", f"/search?{urlencode({**query, 'page': number + 1})}"))
        return View(f"search {query.get('q', '')}".strip(), (*parts, HOME, CART))

    def _found(self, query: Mapping[str, str]) -> list[Product]:
        words = set(query.get("q", "").lower().split())
        most = _number(query.get("most", ""), 10**6)
        found = [p for p in self.case.products if words <= p.words and p.price <= most]
        match query.get("sort"):
            case "cheapest first":
                found.sort(key=lambda product: product.price)
            case "best first":
                found.sort(key=lambda product: -product.stars)
        return found

    def _search_form(self, query: Mapping[str, str]) -> Form:
        fields = [Field("q", "search", query.get("q", ""))]
        if self.case.has_details:
            sort = query.get("sort", "")
            fields.append(Field("most", "most euros", query.get("most", "")))
            fields.append(Field("sort", "sort", sort if sort in SORTS else SORTS[0], SORTS))
        return Form("/search", "get", (*fields, Button("search")))

    def _link(self, product: Product) -> Link:
        facts = [product.name]
        if self.case.has_search:
            facts.append(f"{product.price} euros")
        if self.case.has_details:
            stars = "1 star" if product.stars == 1 else f"{product.stars} stars"
            facts.append(stars if product.stock else "sold out")
        return Link(", ".join(facts), f"/product/{product.id}")

    def _product(self, product: Product, problem: str) -> View:
        fields: list[Field] = []
        if self.case.has_sizes:
            fields.append(Field("size", "size", SIZES[0], SIZES))
            fields.append(Field("quantity", "quantity", "1"))
        parts: list[Text | Link | Form] = []
        if problem:
            parts.append(Text(f"quantity must be 1 to {product.stock}", alert=True))
        parts.append(Text(f"{product.price} euros" + (f", {product.stock} left" if fields else "")))
        if product.stock:
            parts.append(Form(f"/add/{product.id}", "post", (*fields, Button("add to cart"))))
        else:
            parts.append(Text("sold out"))
        return View(product.name, (*parts, HOME, CART))

    def _cart(self) -> View:
        parts: list[Text | Link | Form] = []
        for number, line in enumerate(self.cart):
            name = self._name(line)
            parts.append(Text(line.text(name)))
            parts.append(Form(f"/remove/{number}", "post", (Button(f"remove {name}"),)))
        return View("cart", (*parts, *([CHECKOUT] if self.cart else [Text("the cart is empty")]), HOME))

    def _checkout(self, problem: bool) -> View:
        parts: list[Text | Link | Form] = [Text(line.text(self._name(line))) for line in self.cart]
        if not self.cart:
            return View("checkout", (Text("the cart is empty"), HOME))
        if problem:
            parts.extend(Text(text, alert=True) for text in self._problems())
        parts.append(Form("/order", "post", (*self._customer_fields(), Button("order"))))
        return View("checkout", (*parts, CART))

    def _customer_fields(self) -> list[Field]:
        given = self.customer
        fields = [Field("name", "name", given.get("name", ""))]
        if self.case.has_search:
            cities = (NOT_CHOSEN, *CITIES)
            fields.append(Field("city", "city", given.get("city", NOT_CHOSEN), cities))
        if self.case.has_details:
            fields.append(Field("postcode", "postcode", given.get("postcode", "")))
            fields.append(Field("delivery", "delivery", given.get("delivery", DELIVERIES[0]), DELIVERIES))
            fields.append(Field("gift", "gift wrap", given.get("gift", ""), box=True))
        return fields

    def _order(self) -> View:
        order = self.orders[-1]
        bought = [Text(line.text(self._name(line))) for line in order.lines]
        given = ["gift wrap" if key == "gift" else value for key, value in order.customer if value]
        return View("thank you", (*bought, Text(f"for {', '.join(given)}"), HOME))

    def _name(self, line: Line) -> str:
        product = self.case.product(line.product)
        return product.name if product else line.product

    # ---- forms ----

    def send(self, path: str, data: Mapping[str, str]) -> str:
        """What sending a form to ``path`` does; returns the path of the page to show then."""
        data = {key: clean(value) for key, value in data.items()}
        match path.strip("/").split("/"):
            case ["add", id] if product := self.case.product(id):
                return self._add(product, data)
            case ["remove", number]:
                del self.cart[_number(number, 0) : _number(number, 0) + 1]
                return "/cart"
            case ["order"]:
                return self._place(data)
        return "/"

    def _add(self, product: Product, data: Mapping[str, str]) -> str:
        size = data.get("size", SIZES[0]) if self.case.has_sizes else ""
        same = [line for line in self.cart if (line.product, line.size) == (product.id, size)]
        others = sum(line.quantity for line in self.cart if line.product == product.id)
        quantity = _number(data.get("quantity", "1"), 0)
        if not 1 <= quantity <= product.stock - others or (size and size not in SIZES):
            return f"/product/{product.id}?problem=quantity"
        if same:
            place = self.cart.index(same[0])
            self.cart[place] = dataclasses.replace(same[0], quantity=same[0].quantity + quantity)
        else:
            self.cart.append(Line(product.id, quantity, size))
        return "/cart"

    def _place(self, data: Mapping[str, str]) -> str:
        self.customer = {field.name: data.get(field.name, "") for field in self._customer_fields()}
        if self._problems() or not self.cart:
            return "/checkout?problem=form"
        self.orders.append(Order(in_order(self.cart), tuple(self.customer.items())))
        self.cart, self.customer = [], {}
        return "/order"

    def _problems(self) -> list[str]:
        given, problems = self.customer, []
        if not given.get("name"):
            problems.append("name is missing")
        if self.case.has_search and given.get("city") not in CITIES:
            problems.append("city is missing")
        if self.case.has_details:
            postcode = given.get("postcode", "")
            if not (len(postcode) == 4 and postcode.isascii() and postcode.isdecimal()):
                problems.append("postcode must have 4 digits")
            if given.get("delivery") not in DELIVERIES:
                problems.append("delivery is missing")
        return problems


def in_order(lines: list[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: (line.product, line.size)))


def _number(text: str, default: int) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else default
