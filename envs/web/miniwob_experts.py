"""Scripted experts: from the instruction and the page as text to the next call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opd_agents.types import ToolCall

ELEMENT = re.compile(r'\s*\[(\d+)\] (\w+)(?: ("(?:[^"\\]|\\.)*"))?(?: = ("(?:[^"\\]|\\.)*"))?(.*)')
CLICKED = {"button", "clickable", "link", "tab", "image", "shape", "checkbox", "radio"}
FIELDS = {"textbox", "spinbutton", "searchbox", "combobox", "listbox", "date", "time"}


@dataclass(frozen=True, slots=True)
class Element:
    """What can be acted on, read from its line of the page."""

    id: int
    role: str
    name: str
    value: str
    chosen: bool  # checked, selected or expanded


def elements(page: str) -> list[Element]:
    """The elements of a page as ``render`` writes it."""
    found = []
    for match in filter(None, map(ELEMENT.match, page.splitlines())):
        id, role, name, value, rest = match.groups()
        chosen = bool({"checked", "selected", "expanded"} & set(rest.split()))
        found.append(Element(int(id), role, json.loads(name or '""'), json.loads(value or '""'), chosen))
    return found


def click(page: str, name: str) -> ToolCall:
    """Click what is called ``name``; without such a thing, whatever comes first."""
    parts = [part for part in elements(page) if part.role in CLICKED]
    named = [part for part in parts if part.name.casefold() == name.casefold()]
    exact = [part for part in named if part.name == name]
    return ToolCall("click", {"id": [*exact, *named, *parts][0].id})


def fill(page: str, texts: list[str]) -> ToolCall:
    """Fill the fields in their order, then click the last button."""
    parts = elements(page)
    fields = [part for part in parts if part.role in FIELDS]
    for part, text in zip(fields, texts, strict=False):
        if part.value not in (text, "•" * len(text)):  # a password is shown as dots
            return ToolCall("fill", {"id": part.id, "text": text})
    return ToolCall("click", {"id": [part for part in parts if part.role == "button"][-1].id})


def quoted(instruction: str) -> list[str]:
    return re.findall('"([^"]*)"', instruction)


def click_quoted(instruction: str, page: str) -> ToolCall:
    return click(page, quoted(instruction)[0])


def click_last(instruction: str, page: str) -> ToolCall:
    """Click "Tab #2" of "Click on Tab #2.", "ONE" of "Click button ONE."."""
    return click(page, re.findall(r"(Tab #\d+|\w+)\.$", instruction)[0])


def click_only(instruction: str, page: str) -> ToolCall:
    return click(page, "Click Me!")


def click_colour(instruction: str, page: str) -> ToolCall:
    wanted = instruction.split()[-3]
    same = {"cyan": "aqua", "grey": "gray"}.get(wanted, wanted)
    return click(page, f"{same} color")


def close_dialog(instruction: str, page: str) -> ToolCall:
    wanted = (quoted(instruction) or ["x"])[0]
    return click(page, "Close" if wanted == "x" else wanted)


def choose(instruction: str, page: str) -> ToolCall:
    """Check or choose what "Select a, b and click Submit." names, then submit."""
    wanted = instruction.removeprefix("Select ").rsplit(" and click", 1)[0].split(", ")
    for part in elements(page):
        if part.role in ("checkbox", "radio") and part.name in wanted and not part.chosen:
            return ToolCall("click", {"id": part.id})
    return click(page, "Submit")


def choose_from_list(instruction: str, page: str) -> ToolCall:
    """Choose what "Select a, b from the scroll list and click Submit." names, then submit."""
    wanted = instruction.removeprefix("Select ").split(" from the")[0].split(", ")
    box = next(part for part in elements(page) if part.role in ("combobox", "listbox"))
    for option in wanted:
        if option not in box.value.split(", "):
            return ToolCall("select", {"id": box.id, "option": option})
    return click(page, "Submit")


def fill_quoted(instruction: str, page: str) -> ToolCall:
    return fill(page, quoted(instruction))


def fill_twice(instruction: str, page: str) -> ToolCall:
    return fill(page, quoted(instruction) * 2)


def fill_in_case(instruction: str, page: str) -> ToolCall:
    text = quoted(instruction)[0]
    return fill(page, [text.upper() if "upper case" in instruction else text.lower()])


def fill_sum(instruction: str, page: str) -> ToolCall:
    first, sign, second = re.findall(r"(\d+) ([-+x]) (\d+) =", page)[0]
    left, right = int(first), int(second)
    return fill(page, [str({"+": left + right, "-": left - right, "x": left * right}[sign])])


def fill_date(instruction: str, page: str) -> ToolCall:
    """12/31/2016 in the instruction is 2016-12-31 in the field."""
    month, day, year = re.findall(r"(\d+)/(\d+)/(\d+)", instruction)[0]
    return fill(page, [f"{year}-{month}-{day}"])


def focus_field(instruction: str, page: str) -> ToolCall:
    place = re.findall(r"(\d+)\w\w ", instruction)
    fields = [part for part in elements(page) if part.role in FIELDS]
    return ToolCall("click", {"id": fields[int(place[0]) - 1 if place else 0].id})


def click_coordinate(instruction: str, page: str) -> ToolCall:
    wanted = re.findall(r"\(-?\d+,-?\d+\)", instruction)[0]
    return ToolCall("click", {"id": next(part.id for part in elements(page) if wanted in part.name)})


EXPERTS: Mapping[str, Callable[[str, str], ToolCall]] = {
    "choose-list": choose_from_list,
    "click-button": click_quoted,
    "click-checkboxes": choose,
    "click-checkboxes-large": choose,
    "click-checkboxes-transfer": choose,
    "click-color": click_colour,
    "click-dialog": close_dialog,
    "click-dialog-2": close_dialog,
    "click-link": click_quoted,
    "click-option": choose,
    "click-scroll-list": choose_from_list,
    "click-tab": click_last,
    "click-test": click_only,
    "click-test-2": click_last,
    "click-test-transfer": click_last,
    "enter-date": fill_date,
    "enter-password": fill_twice,
    "enter-text": fill_quoted,
    "enter-text-2": fill_in_case,
    "enter-text-dynamic": fill_quoted,
    "focus-text": focus_field,
    "focus-text-2": focus_field,
    "grid-coordinate": click_coordinate,
    "login-user": fill_quoted,
    "simple-arithmetic": fill_sum,
    "unicode-test": click_quoted,
}
