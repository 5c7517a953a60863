"""OrderDesk with a customer to talk to, who tells what is asked and changes their mind."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from dataclasses import dataclass
from typing import Any

from opd_agents.envs.orderdesk.case import Case, Order, Request, resolve
from opd_agents.envs.orderdesk.env import OrderDesk
from opd_agents.envs.orderdesk.levels import CITIES, draw_case, order_text, wish_text
from opd_agents.types import Task

OPENING = "Hello, I need help with my orders."
PUZZLED = "Sorry, ask me for my name, my postcode, what I want, or if there is anything else."
ALL_SAID = "No, that is all."
ADVICE = (
    " The customer is here to talk to: write them a text. Ask for the name, the postcode if you need it, and "
    "what they want; ask if there is anything else until that is all, for they may change their mind; only "
    "then change an order, as they want it."
)
QUESTIONS = {  # what the scripted expert asks
    "name": "What is your name?",
    "postcode": "What is your postcode?",
    "wish": "What do you want?",
    "more": "Anything else?",
}
ABOUT = {  # the words by which the customer knows what a text asks
    "name": {"name", "names", "who"},
    "postcode": {"postcode", "postcodes", "postal", "zip"},
    "more": {"else", "more", "anything", "other", "all", "further"},
    "wish": {"help", "order", "orders", "want", "wish", "need", "request"},
}


@dataclass(frozen=True, slots=True)
class Script:
    """What the customer says, wish by wish, and the requests that hold when all is said."""

    case: Case  # with the requests that hold
    wishes: tuple[str, ...]


class OrderDeskDialogue(OrderDesk):
    """The order desk, but the customer says nothing unasked.

    A text is a turn of the conversation: the customer answers what it asks, by its words and always alike,
    gives one more wish each time that it asks for more, and may take an earlier wish back; then that is all.
    An episode succeeds if the final database is the one that policy leads to for the wishes that hold in the
    end. ``close_ticket`` ends it. Levels, noise and tools are OrderDesk's.
    """

    def __init__(
        self, level: str = "easy", timeout_rate: float | None = None, max_turns: int | None = None
    ) -> None:
        """``timeout_rate`` (in [0, 1]) defaults to the level's, ``max_turns`` to the level's and 10 more."""
        super().__init__(level, timeout_rate, max_turns)
        if max_turns is None:
            self.max_turns += 10
        self.system_prompt += ADVICE
        self._told: set[str] = set()  # facts that the customer has given, and "all" once that was said
        self._wishes_told = 0

    @property
    def script(self) -> Script:
        """What the customer of the present task says."""
        return draw_script(self.level.name, self.task.split, self.task.id)

    @property
    def case(self) -> Case:
        return self.script.case

    def begin(self, task: Task) -> str:
        super().begin(task)
        self._told, self._wishes_told = set(), 0
        return OPENING if self.case.today is None else f"Today is {self.case.today}. {OPENING}"

    def on_text(self, text: str) -> str:
        words = set(re.findall(r"[a-z]+", text[:2000].lower()))
        asked = [topic for topic, hints in ABOUT.items() if words & hints]
        if "more" in asked:
            asked = [topic for topic in asked if topic != "wish"]  # "what else" asks for one thing
        if not asked and "?" in text:
            asked = ["wish"]
        return " ".join(map(self._answer, asked)) or PUZZLED

    def _answer(self, topic: str) -> str:
        customer, wishes = self.case.customers[0], self.script.wishes
        match topic:
            case "name":
                self._told.add("name")
                return f"I am {customer.name}{f' of {customer.city}' if self.case.by_item else ''}."
            case "postcode":
                self._told.add("postcode")
                return f"My postcode is {self.case.given_postcode or 'no secret, but you need none'}."
            case "wish":
                self._wishes_told = max(self._wishes_told, 1)
                return " ".join(wishes[: self._wishes_told])
            case _ if self._wishes_told < len(wishes):
                self._wishes_told += 1
                return wishes[self._wishes_told - 1]
            case _:
                self._told.add("all")
                return ALL_SAID

    def expert_action(self) -> str:
        facts = ["name"] if self.case.given_postcode is None else ["name", "postcode"]
        for fact in facts:
            if fact not in self._told:
                return QUESTIONS[fact]
        if self._wishes_told == 0:
            return QUESTIONS["wish"]
        return super().expert_action() if "all" in self._told else QUESTIONS["more"]

    def get_state(self) -> Any:
        return super().get_state(), self._told, self._wishes_told

    def set_state(self, state: Any) -> None:
        desk, self._told, self._wishes_told = state
        super().set_state(desk)

    def digest_text(self) -> str:
        return f"{super().digest_text()} {sorted(self._told)} {self._wishes_told}"


@functools.lru_cache(maxsize=4096)  # groups, repairs and forks come back to the same task
def draw_script(level: str, split: str, task_id: str) -> Script:
    """The script of a task, over the case of OrderDesk's task of that id: so no script is in two splits."""
    case = draw_case(level, split, task_id)
    rng = random.Random(f"OrderDeskDialogue-v0/{level}/{split}/{task_id}")
    requests = list(case.requests)
    wishes = [f"Please {wish_text(request, case.orders, case.by_item)}." for request in requests]
    if len(requests) > 1 and rng.random() < 0.5:
        place = rng.randrange(len(requests))
        order = next(order for order in case.orders if order.id == requests[place].order_id)
        change = _second_thought(case, requests[place], order, rng)
        requests[place : place + 1] = [change] if change else []
        wishes.append(
            f"No, {wish_text(change, case.orders, case.by_item)} instead."
            if change
            else f"No, leave {order_text(order.id, case.orders, case.by_item)} as it is."
        )
    return Script(dataclasses.replace(case, requests=tuple(requests)), tuple(wishes))


def _second_thought(case: Case, request: Request, order: Order, rng: random.Random) -> Request | None:
    """Another request about the same order, one that changes what is to be done if there is such a one; None:
    that the order be left as it is."""
    thoughts: list[Request | None] = [None]
    if order.city is not None:  # on record only where orders can be moved
        cities = [city for city in CITIES if city not in (order.city, request.wish)]
        thoughts.append(Request("move", order.id, wish=rng.choice(cities)))
        if request.kind != "settle":
            thoughts.append(Request("settle", order.id))
    outcome = resolve(case, request, order)
    differing = [thought for thought in thoughts if (thought and resolve(case, thought, order)) != outcome]
    return rng.choice(differing or thoughts)
