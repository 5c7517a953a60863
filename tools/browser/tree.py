"""From Chromium's accessibility tree to nodes: what matters to someone who reads and acts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_agents.tools.browser.nodes import Node

# The names of Chromium on the left, where they differ from ARIA's or say more than a reader needs.
ROLES = {
    "RootWebArea": "page",
    "StaticText": "text",
    "graphics-symbol": "shape",
    "graphics-object": "shape",
    "SvgRoot": "image",
    "Canvas": "canvas",
    "Date": "date",
    "DateTime": "datetime",
    "InputTime": "time",
    "ColorWell": "color",
    "DisclosureTriangle": "button",
}
# Each has one box, one value: what is drawn inside is Chromium's own.
FIELDS = {"textbox", "searchbox", "date", "datetime", "time", "color", "spinbutton", "slider"}
ACTABLE = {"button", "link", "checkbox", "radio", "switch", "option", "tab", "menuitem", "treeitem"}
ACTABLE |= {"menuitemcheckbox", "menuitemradio", "combobox"}
LABELLED = FIELDS | {"combobox", "listbox"}
# Where things stand together: kept without a name too. All other containers only show what is in them.
GROUPS = {"dialog", "alertdialog", "alert", "row", "listitem", "tabpanel", "menu", "tree"}
PLAIN = {"generic", "none", "paragraph"}  # say nothing about what they hold
SKIPPED = {"InlineTextBox", "ListMarker", "LineBreak"}
STATES = ("checked", "selected", "expanded", "pressed", "disabled", "readonly", "invalid")


@dataclass(frozen=True, slots=True)
class Tree:
    """A page as nodes; ``elements`` are the DOM's own ids (backend node ids) of those numbered 1, 2, ..."""

    nodes: tuple[Node, ...]
    elements: tuple[int, ...]


@dataclass(slots=True)
class _Part:
    """A node before it is numbered and placed."""

    node: Node
    element: int | None = None  # its backend node id, if it can be acted on
    parts: list[_Part] = field(default_factory=list)


def read_tree(
    accessibility: Sequence[Mapping[str, Any]],
    clickable: Collection[int] = (),
    lists: Collection[int] = (),
    values: Mapping[int, str] | None = None,
) -> Tree:
    """The nodes of ``Accessibility.getFullAXTree``, and by backend node ids what it does not tell.

    ``clickable`` are elements that listen to clicks, whatever their role; ``lists`` are those with options of
    the browser's own, ``<select>``; ``values`` are the values of fields such as dates.
    """
    if not accessibility:
        return Tree((), ())
    by_id = {node["nodeId"]: node for node in accessibility}
    labels = frozenset(_squeezed(_plain(node, "name")) for node in accessibility if _role(node) in LABELLED)
    reader = _Reader(by_id, frozenset(clickable), frozenset(lists), values or {}, labels)
    parts = reader.read(accessibility[0])
    nodes: list[Node] = []
    elements: list[int] = []
    for part, depth in _walk(parts, 0):
        if part.element is not None:
            elements.append(part.element)
        number = None if part.element is None else len(elements)
        nodes.append(replace(part.node, id=number, depth=depth))
    return Tree(tuple(nodes), tuple(elements))


def join_frames(
    trees: Sequence[Sequence[Mapping[str, Any]]], frames: Mapping[int, int]
) -> Sequence[Mapping[str, Any]]:
    """The accessibility trees of a page, which is the first, and of the frames in it as one tree; ``frames``
    tells of each frame's element (its backend node id) which tree is in it."""
    if len(trees) == 1:
        return trees[0]
    joined = []
    for place, tree in enumerate(trees):
        for node in tree:
            inside = frames.get(node.get("backendDOMNodeId", -1))
            children = [f"{place}/{id}" for id in node.get("childIds", ())]
            if inside is not None and trees[inside]:
                children = [f"{inside}/{trees[inside][0]['nodeId']}"]
            joined.append({**node, "nodeId": f"{place}/{node['nodeId']}", "childIds": children})
    return joined


def _walk(parts: Sequence[_Part], depth: int) -> Iterator[tuple[_Part, int]]:
    for part in parts:
        yield part, depth
        # What is on the page stands at the margin: the page itself is the first line.
        yield from _walk(part.parts, depth + (part.node.role != "page"))


@dataclass(frozen=True, slots=True)
class _Reader:
    by_id: Mapping[str, Mapping[str, Any]]
    clickable: frozenset[int]
    lists: frozenset[int]
    values: Mapping[int, str]
    labels: frozenset[str]  # what fields are called

    def read(self, raw: Mapping[str, Any]) -> list[_Part]:
        """The parts that ``raw`` shows as: itself with what is in it, or only what is in it."""
        role = _role(raw)
        if role in SKIPPED:
            return []
        element = raw.get("backendDOMNodeId")
        if raw["ignored"] or element is None:
            return self._inside(raw)
        name = _squeezed(_plain(raw, "name"))
        if role == "text":
            return [_Part(Node("text", name))] if name else []
        properties = {item["name"]: item["value"].get("value") for item in raw.get("properties", ())}
        states = tuple(state for state in STATES if _holds(properties.get(state)))
        if role in FIELDS or element in self.lists or properties.get("editable"):
            node = self._field(raw, role, name, element)
            return [_Part(replace(node, states=states), element)]
        # A label stands beside its field, which has its name already.
        acts = (role in ACTABLE or element in self.clickable) and role not in ("page", "LabelText")
        inside = self._inside(raw)
        if role == "LabelText":
            inside = [
                part for part in inside if part.node.name not in self.labels or part.element is not None
            ]
        if acts or name or role in GROUPS:
            inside, name = _without_said(inside, name)
        if role == "row" and all(part.node.role in ("cell", "columnheader", "rowheader") for part in inside):
            inside, name = _one_line(inside, name)
        if acts or role == "page" or name or (role in GROUPS and inside):
            role = "clickable" if role in PLAIN and acts else role
            return [_Part(Node(role, name, states=states), element if acts else None, inside)]
        return inside

    def _field(self, raw: Mapping[str, Any], role: str, name: str, element: int) -> Node:
        if element not in self.lists:
            role = role if role in FIELDS else "textbox"
            return Node(role, name, value=_plain(raw, "value") or self.values.get(element, ""))
        options = list(self._options(raw))
        value = ", ".join(_squeezed(_plain(option, "name")) for option in options if _is_selected(option))
        return Node(role, name, value=value, options=tuple(_squeezed(_plain(o, "name")) for o in options))

    def _options(self, raw: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        for child in self._children(raw):
            if _plain(child, "role") == "option":
                yield child
            else:
                yield from self._options(child)

    def _inside(self, raw: Mapping[str, Any]) -> list[_Part]:
        """What is in ``raw``; texts that follow each other, such as around a bold word, are one."""
        parts: list[_Part] = []
        run = ""
        for child in self._children(raw):
            if _plain(child, "role") == "StaticText" and not child["ignored"]:
                run += _plain(child, "name")
                continue
            if below := self.read(child):
                parts += [*_text(run), *below]
                run = ""
        return parts + _text(run)

    def _children(self, raw: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        # Ids without a node occur: a page may change while its tree is read.
        return (self.by_id[id] for id in raw.get("childIds", ()) if id in self.by_id)


def _text(run: str) -> list[_Part]:
    text = _squeezed(run)
    return [_Part(Node("text", text))] if text else []


def _without_said(parts: list[_Part], name: str) -> tuple[list[_Part], str]:
    """``parts`` without the texts that ``name`` says; a thing without a name is called by its only text."""
    if not name and len(parts) == 1 and parts[0].node.role == "text":
        return [], parts[0].node.name
    return [part for part in parts if part.node.role != "text" or part.node.name not in name], name


def _one_line(cells: list[_Part], name: str) -> tuple[list[_Part], str]:
    """A table's row of mere text in one line."""
    if any(cell.parts or cell.element is not None for cell in cells):
        return cells, name
    return [], " | ".join(cell.node.name for cell in cells)


def _role(raw: Mapping[str, Any]) -> str:
    role = _plain(raw, "role")
    return ROLES.get(role, role)


def _plain(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key, {}).get("value")
    return "" if value is None else str(value)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _holds(value: Any) -> bool:
    return value not in (None, False, "false", "")


def _is_selected(raw: Mapping[str, Any]) -> bool:
    return any(p["name"] == "selected" and _holds(p["value"].get("value")) for p in raw.get("properties", ()))
