"""A page of the shop as data, and the two things made of it: HTML for a browser, nodes for an agent."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from opd_agents.tools.browser import Node

MOST_TYPED = 100  # characters in a field
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:40em;margin:2em auto;padding:0 1em;color:#222}"
    "header{font-size:1.6em;font-weight:600}p{margin:.4em 0}a{color:#0645ad}"
    "label{display:inline-block;margin-right:.5em}[role=alert]{color:#b00020}"
    "input,select,button{font:inherit;padding:.2em .5em}"
)


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    alert: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    label: str
    path: str


@dataclass(frozen=True, slots=True)
class Field:
    """Something to fill in: any text, one of ``options`` if there are some, or "on" and "" for a box to
    check."""

    name: str  # its key in the form's data
    label: str
    value: str = ""
    options: tuple[str, ...] = ()
    box: bool = False


@dataclass(frozen=True, slots=True)
class Button:
    label: str


@dataclass(frozen=True, slots=True)
class Form:
    path: str
    method: Literal["get", "post"]
    parts: tuple[Field | Button, ...]


Control: TypeAlias = Link | Field | Button


@dataclass(frozen=True, slots=True)
class View:
    title: str
    parts: tuple[Text | Link | Form, ...]

    def controls(self) -> list[tuple[Control, Form | None]]:
        """What can be acted on, in the order of the page, with the form that it is in."""
        return [(item, form) for item, form in self.items() if not isinstance(item, Text)]

    def items(self) -> Iterator[tuple[Text | Control, Form | None]]:
        for part in self.parts:
            if isinstance(part, Form):
                yield from ((item, part) for item in part.parts)
            else:
                yield part, None


def to_nodes(view: View, typed: Mapping[str, str]) -> list[Node]:
    """What an agent sees; ``typed`` holds by its id as a text what was entered into a field."""
    nodes, id = [Node("page", view.title)], 0
    for item, _ in view.items():
        if isinstance(item, Text):
            nodes.append(Node("alert" if item.alert else "text", item.text))
            continue
        id += 1
        match item:
            case Link(label):
                nodes.append(Node("link", label, id))
            case Button(label):
                nodes.append(Node("button", label, id))
            case Field(box=True):
                checked = ("checked",) if typed.get(str(id), item.value) else ()
                nodes.append(Node("checkbox", item.label, id, states=checked))
            case Field(options=options):
                role = "combobox" if options else "textbox"
                nodes.append(Node(role, item.label, id, typed.get(str(id), item.value), options=options))
    return nodes


def to_html(view: View, prefix: str) -> str:
    """The page as a browser gets it; ``prefix`` stands before every path."""
    body = "\n".join(_part(part, prefix) for part in view.parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{_safe(view.title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style>\n'
        f'<header aria-hidden="true">{_safe(view.title)}</header>\n{body}\n</html>\n'
    )


def _part(part: Text | Link | Form, prefix: str) -> str:
    match part:
        case Text(text, alert):
            return f"<p{' role=alert' if alert else ''}>{_safe(text)}</p>"
        case Link(label, path):
            return f'<p><a href="{_safe(prefix + path)}">{_safe(label)}</a></p>'
        case Form(path, method, parts):
            items = "\n".join(f"<p>{_item(item)}</p>" for item in parts)
            # Going back must show the shop's own values, not those that the browser remembers.
            opening = f'<form action="{_safe(prefix + path)}" method="{method}" autocomplete="off">'
            return f"{opening}\n{items}\n</form>"


def _item(item: Field | Button) -> str:
    if isinstance(item, Button):
        return f"<button>{_safe(item.label)}</button>"
    name, label = _safe(item.name), _safe(item.label)
    if item.box:
        checked = " checked" if item.value else ""
        return f'<label><input type="checkbox" name="{name}"{checked}> {label}</label>'
    if item.options:
        choices = "".join(
            f"<option{' selected' if option == item.value else ''}>{_safe(option)}</option>"
            for option in item.options
        )
        return f'<label>{label} <select name="{name}">{choices}</select></label>'
    return (
        f'<label>{label} <input name="{name}" value="{_safe(item.value)}" maxlength="{MOST_TYPED}"></label>'
    )


def _safe(text: str) -> str:
    return html.escape(text)
