"""The content of one task: the files of an office, what is asked for, and what must hold in the end."""
# ruff: noqa: SIM905 -- lists of words are read best as words

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from opd_agents.envs.splits import draw_from_split

# Every other name is the beginning of the next, so that a search for one finds both.
NAMES = (
    "ana anabel ben benno carl carla dan dana eva evan jo joel kim kimba leo leon mar maria rob robin "
    "sam samir tom tomas vic victor"
).split()
ITEMS = "bag bowl chair clock cup desk fan kettle lamp mirror pan rug scarf shelf stool vase".split()
FOLDERS = "attic barn cellar depot loft north office safe south store vault west".split()

Kind: TypeAlias = Literal["note", "archive", "correct", "delete", "remind", "list"]
STATE_ASKED: dict[Kind, str] = {
    "note": "open", "archive": "paid", "delete": "paid", "remind": "open", "list": "open"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bill:
    number: int
    client: str
    item: str
    amount: int
    state: str  # open or paid

    @property
    def path(self) -> str:
        return f"bills/{self.number}.txt"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of one client's bills; ``bill`` and ``amount`` are what "correct" is about."""

    kind: Kind
    client: str
    bill: Bill | None = None
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Level:
    """One level; ``bills`` of a client, at least and at most. ``terse``: a bill is one line, and folders are
    named in the request; else a file of rules may have to be read for them."""

    name: str
    clients: int
    bills: tuple[int, int]
    requests: int
    kinds: tuple[Kind, ...]
    terse: bool
    rules: bool
    max_turns: int


@dataclass(frozen=True, slots=True)
class Office:
    """One task."""

    bills: tuple[Bill, ...]
    requests: tuple[Request, ...]
    archive: str  # the folder of paid bills
    reminders: str
    level: Level

    @property
    def prompt(self) -> str:
        asked = [_words(request, self) for request in self.requests]
        if len(asked) == 1:
            return f"{asked[0][0].upper()}{asked[0][1:]}."
        return " ".join(f"({number}) {text}." for number, text in enumerate(asked, 1))

    def files(self) -> dict[str, str]:
        """All files as the task begins."""
        files = {bill.path: bill_text(bill, self.level.terse) for bill in self.bills}
        if self.level.rules:
            files["rules.txt"] = f"archive: {self.archive}\nreminders: {self.reminders}\n"
        return files

    def meant(self, request: Request) -> list[Bill]:
        """The bills that a request is about, in the order of their numbers."""
        if request.bill is not None:
            return [request.bill]
        asked = STATE_ASKED[request.kind]
        found = [bill for bill in self.bills if (bill.client, bill.state) == (request.client, asked)]
        return sorted(found, key=lambda bill: bill.number)

    def goal(self) -> tuple[dict[str, str], list[str]]:
        """The files and the notes that must be there in the end."""
        files, notes = self.files(), []
        for request in self.requests:
            bills = self.meant(request)
            for bill in bills:
                if request.kind == "correct":
                    new = Bill(bill.number, bill.client, bill.item, request.amount, bill.state)
                    files[bill.path] = bill_text(new, self.level.terse)
                if request.kind == "remind":
                    files[f"{self.reminders}/{bill.number}.txt"] = files[bill.path]
                if request.kind == "archive":
                    files[f"{self.archive}/{bill.number}.txt"] = files[bill.path]
                if request.kind in ("archive", "delete"):
                    del files[bill.path]
            if request.kind == "note":
                notes.append(f"{request.client} {sum(bill.amount for bill in bills)}")
            if request.kind == "list":
                files[f"lists/{request.client}.txt"] = "\n".join(str(bill.number) for bill in bills)
        return files, notes


def bill_text(bill: Bill, terse: bool) -> str:
    if terse:
        return f"{bill.client} {bill.item} {bill.amount} {bill.state}"
    return f"client: {bill.client}\nitem: {bill.item}\namount: {bill.amount}\nstate: {bill.state}\n"


@functools.lru_cache(maxsize=4096)  # groups, repairs and forks come back to the same task
def draw_office(level: str, split: str, task_id: str) -> Office:
    """The office of a task; none is ever in two splits."""

    def content(office: Office) -> str:
        return json.dumps([office.prompt, office.files()])

    stream = f"FileDesk-v0/{level}"
    return draw_from_split(stream, split, task_id, lambda rng: _draw(LEVELS[level], rng), content)


def _draw(level: Level, rng: random.Random) -> Office:
    start = rng.randrange(len(NAMES) // 2) * 2
    clients = (NAMES[start:] + NAMES[:start])[: level.clients]
    archive, reminders = rng.sample(FOLDERS, 2) if level.rules else ("archive", "reminders")
    bills = tuple(_draw_bills(level, clients, rng))
    asked = rng.sample(clients, level.requests)
    owned = [[bill for bill in bills if bill.client == client] for client in asked]
    requests = tuple(_draw_request(own, level.kinds, rng) for own in owned)
    return Office(bills, requests, archive, reminders, level)


def _draw_bills(level: Level, clients: list[str], rng: random.Random) -> Iterator[Bill]:
    numbers = iter(rng.sample(range(10, 100), 90))
    for client in clients:
        for item in rng.sample(ITEMS, rng.randint(*level.bills)):
            yield Bill(next(numbers), client, item, rng.randrange(10, 100), rng.choice(("open", "paid")))


def _draw_request(own: list[Bill], kinds: tuple[Kind, ...], rng: random.Random) -> Request:
    """One request about the bills of one client."""
    states = {bill.state for bill in own}
    kind = rng.choice([kind for kind in kinds if STATE_ASKED.get(kind) in {None, *states}])
    bill = rng.choice(own)
    if kind != "correct":
        return Request(kind, bill.client)
    return Request(kind, bill.client, bill, rng.choice([n for n in range(10, 100) if n != bill.amount]))


def _words(request: Request, office: Office) -> str:
    client, told = request.client, not office.level.rules
    match request.kind:
        case "note":
            return f'note the total of the open bills of {client} as "{client} TOTAL"'
        case "archive":
            return f"move the paid bills of {client} to {office.archive if told else 'the archive'}"
        case "correct" if request.bill:
            return f"the {request.bill.item} of {client} costs {request.amount}: correct the bill"
        case "delete":
            return f"delete the paid bills of {client}"
        case "remind":
            return f"copy the open bills of {client} to {office.reminders if told else 'the reminders'}"
        case _:
            where = f"lists/{client}.txt"
            return f"write the numbers of the open bills of {client} to {where}, one a line, rising"


ALL_KINDS: tuple[Kind, ...] = ("note", "archive", "correct", "delete", "remind", "list")
LEVELS = {
    level.name: level
    for level in (
        Level("easy", 4, (1, 1), 1, ("note", "archive", "correct", "delete"), True, False, 8),
        Level("medium", 5, (1, 3), 2, ALL_KINDS, False, False, 32),
        Level("hard", 8, (2, 4), 3, ALL_KINDS, False, True, 64),
    )
}
