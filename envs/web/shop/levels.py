"""The levels: how a shop and a wish are drawn, what is said about them, and how many turns there are."""
# ruff: noqa: SIM905 -- lists of words are read best as words

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from opd_agents.envs.splits import draw_from_split
from opd_agents.envs.web.shop.case import CITIES, DELIVERIES, SIZES, Case, Line, Order, Product
from opd_agents.envs.web.shop.store import in_order

KINDS = "mug lamp bowl chair scarf pen bag clock rug vase".split()
COLOURS = "red blue green black white yellow".split()
STYLES = "plain striped dotted woven glossy matt".split()
FIRST_NAMES = (
    "ana ben cleo dan eva finn gus hana ivan jun kim leo "
    "mia nora omar pia quinn rosa sam tara uma vera will zoe"
).split()
LAST_NAMES = "Berg Cole Diaz Endo Falk Grey Hale Ito Kern Lund Moss Nash".split()

EASY_PROMPT = "Buy it: open it, add it to the cart, check out, fill in the name, order."
PROMPT = (
    "You shop on a web page. Elements are named by their numbers in brackets, which change with every page. "
    "Order exactly what is asked for, once: an order cannot be undone and ends the task."
)


@dataclass(frozen=True, slots=True)
class Level:
    name: str
    draw: Callable[[random.Random], Case]
    system_prompt: str
    max_turns: int


@functools.lru_cache(maxsize=1024)  # groups, repairs and forks come back to the same task
def draw_case(level: str, split: str, task_id: str) -> Case:
    """The content of a task, which is in one split only."""
    return draw_from_split(f"Shop-v0/{level}", split, task_id, LEVELS[level].draw, repr)


def _draw_easy(rng: random.Random) -> Case:
    names = [f"{colour} {kind}" for colour, kind in itertools.product(COLOURS, KINDS)]
    products = _stocked(rng, rng.sample(names, 6))
    name = rng.choice(FIRST_NAMES)
    wanted = rng.choice(products)
    return Case(
        prompt=f"Buy a {wanted.name} for {name}.",
        products=products,
        wanted=Order((Line(wanted.id),), (("name", name),)),
        queries=(wanted.name,),
        has_search=False,
        has_sizes=False,
        has_details=False,
    )


def _draw_medium(rng: random.Random) -> Case:
    names = [f"{colour} {kind}" for colour, kind in itertools.product(COLOURS, KINDS)]
    products = _stocked(rng, rng.sample(names, 36))
    wanted, size = rng.choice(products), rng.choice(SIZES)
    quantity = rng.randint(1, min(3, wanted.stock))
    name, city = _person(rng), rng.choice(CITIES)
    return Case(
        prompt=f"Buy {quantity} {wanted.name}, size {size}, for {name} in {city}.",
        products=products,
        wanted=Order((Line(wanted.id, quantity, size),), (("name", name), ("city", city))),
        queries=(wanted.name,),
        has_details=False,
    )


def _draw_hard(rng: random.Random) -> Case:
    names = [" ".join(words) for words in itertools.product(COLOURS, STYLES, rng.sample(KINDS, 4))]
    products = _stocked(rng, names, sold_out=0.2)
    lines, wishes, queries = [], [], {}
    for group in rng.sample(_groups(products), 2):
        product, wish = _wish(rng, group)
        colour, _, kind = product.name.split()
        size, quantity = rng.choice(SIZES), rng.randint(1, min(3, product.stock))
        lines.append(Line(product.id, quantity, size))
        wishes.append(f"{quantity} of the {wish.format(f'{colour} {kind}')}, size {size}")
        queries[product.id] = f"{colour} {kind}"
    name, city, postcode = _person(rng), rng.choice(CITIES), str(rng.randint(1000, 9999))
    delivery, gift = rng.choice(DELIVERIES), rng.random() < 0.5
    customer = {"name": name, "city": city, "postcode": postcode, "delivery": delivery}
    bought = in_order(lines)
    return Case(
        prompt=f"Buy in one order {' and '.join(wishes)}; nothing that is sold out. For {name}, "
        f"{postcode} {city}, by {delivery} delivery, {'with' if gift else 'without'} gift wrap.",
        products=products,
        wanted=Order(bought, (*customer.items(), ("gift", "on" if gift else ""))),
        queries=tuple(queries[line.product] for line in bought),
    )


def _stocked(rng: random.Random, names: list[str], sold_out: float = 0.0) -> tuple[Product, ...]:
    """Products in a random order, no two at one price: "the cheapest" is always one."""
    rng.shuffle(names)
    prices = rng.sample(range(3, 3 + 3 * len(names)), len(names))
    products = []
    for number, (name, price) in enumerate(zip(names, prices, strict=True)):
        stock = 0 if rng.random() < sold_out else rng.randint(1, 9)
        products.append(Product(f"p{number}", name, price, rng.randint(1, 5), stock))
    return tuple(products)


def _groups(products: tuple[Product, ...]) -> list[list[Product]]:
    """By colour and kind, those of which something is left."""
    groups: dict[tuple[str, str], list[Product]] = {}
    for product in products:
        colour, _, kind = product.name.split()
        groups.setdefault((colour, kind), []).append(product)
    return [group for group in groups.values() if any(product.stock for product in group)]


def _wish(rng: random.Random, group: list[Product]) -> tuple[Product, str]:
    """One product of a group and the words that single it out, around what the group is called."""
    left = sorted((product for product in group if product.stock), key=lambda product: product.price)
    stars = rng.randint(2, 4)
    good = [product for product in left if product.stars >= stars]
    draw = rng.random()
    if good and draw < 0.5:
        return good[0], f"cheapest {{}} with at least {stars} stars"
    if draw < 0.75:
        return left[0], "cheapest {}"
    return left[-1], "most expensive {}"


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES).title()} {rng.choice(LAST_NAMES)}"


LEVELS = {
    level.name: level
    for level in (
        Level("easy", _draw_easy, EASY_PROMPT, 10),
        Level("medium", _draw_medium, PROMPT, 20),
        Level("hard", _draw_hard, PROMPT, 40),
    )
}
