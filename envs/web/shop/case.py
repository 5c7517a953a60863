"""The content of one task: what the shop sells, and what is to be bought for whom."""

from __future__ import annotations

from dataclasses import dataclass

SIZES = ("small", "medium", "large")
CITIES = ("Athens", "Bergen", "Cork", "Dakar", "Essen", "Faro", "Ghent", "Lima")
DELIVERIES = ("standard", "express")


@dataclass(frozen=True, slots=True)
class Product:
    id: str
    name: str  # no two products have the same
    price: int  # in euros
    stars: int  # 1 to 5
    stock: int  # 0: sold out

    @property
    def words(self) -> frozenset[str]:
        """What it is found by."""
        return frozenset(self.name.split())


@dataclass(frozen=True, slots=True)
class Line:
    """So many of one product, in a cart or an order."""

    product: str  # its id
    quantity: int = 1
    size: str = ""  # "" where the shop has no sizes

    def text(self, name: str) -> str:
        return f"{self.quantity} {name}" + (f", {self.size}" if self.size else "")


@dataclass(frozen=True, slots=True)
class Order:
    lines: tuple[Line, ...]  # sorted by product: equal orders are equal
    customer: tuple[tuple[str, str], ...]  # what the checkout asked for, such as ("name", "Ana Berg")


@dataclass(frozen=True, slots=True)
class Case:
    """One task."""

    prompt: str
    products: tuple[Product, ...]
    wanted: Order
    queries: tuple[str, ...]  # by which each line of ``wanted`` is best looked for
    has_search: bool = True  # otherwise the home page shows all products
    has_sizes: bool = True
    has_details: bool = True  # prices and stars are shown, results can be narrowed

    def product(self, id: str) -> Product | None:
        return next((product for product in self.products if product.id == id), None)
