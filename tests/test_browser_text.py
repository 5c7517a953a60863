"""What the browser tool makes of a page's tree, without a browser."""

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_agents.errors import MissingPart
from opd_agents.tools import ToolError
from opd_agents.tools.browser import Node, open_page, render
from opd_agents.tools.browser.nodes import MOST_CHARS, find
from opd_agents.tools.browser.tree import read_tree


def test_a_page_is_rendered_a_line_a_node() -> None:
    nodes = [
        Node("page", "P"), Node("text", 'say "x"\n[9] link'), Node("link", "go", 1),
        Node("textbox", id=2, value="", depth=1, states=("disabled", "invalid")),
        Node("combobox", "c", 3, "b", options=("a", "b")),
    ]  # fmt: skip
    assert render(nodes) == (
        'page "P"\n"say \\"x\\"\\n[9] link"\n[1] link "go"\n  [2] textbox = "" disabled invalid\n'
        '[3] combobox "c" = "b" of "a", "b"'
    )


@given(st.lists(st.text(max_size=30), min_size=1, max_size=40), st.integers(60, 400))
def test_rendering_keeps_to_its_length_and_says_what_it_left_out(texts: list[str], most: int) -> None:
    whole = render([Node("text", text) for text in texts], 10**6)
    short = render([Node("text", text) for text in texts], most)
    lines = whole.split("\n")
    if len(whole) <= most:
        assert short == whole
    else:
        *kept, last = short.split("\n")
        assert len(short) <= most and kept == lines[: len(kept)]
        assert last == f"... {len(lines) - len(kept)} more lines"


def test_long_names_and_lists_are_cut() -> None:
    assert render([Node("text", "x" * 5000)]) == f'"{"x" * MOST_CHARS}..."'
    line = render([Node("combobox", "c", 1, "0", options=tuple(map(str, range(50))))])
    assert line.endswith('"19", ... 30 more')


def test_only_what_is_there_and_enabled_can_be_acted_on() -> None:
    nodes = [Node("page"), Node("link", "a", 1), Node("button", "b", 2, states=("disabled",))]
    assert find(nodes, 1) is nodes[1]
    for id, problem in ((2, "it is disabled"), (3, r"\[1\] to \[2\]"), (0, "no such"), (-1, "no such")):
        with pytest.raises(ToolError, match=problem):
            find(nodes, id)
    with pytest.raises(ToolError, match="the page has none"):
        find([Node("page")], 1)


def test_a_tree_that_changed_while_it_was_read_is_read_anyway() -> None:
    def raw(id: str, role: str, name: str, *children: str) -> dict[str, Any]:
        spoken = {"role": {"value": role}, "name": {"value": name}}
        return {"nodeId": id, "ignored": False, "backendDOMNodeId": int(id), "childIds": children, **spoken}

    tree = read_tree([raw("1", "RootWebArea", "P", "2", "99"), raw("2", "button", "", "3"),
                      raw("3", "StaticText", " go ")])  # fmt: skip
    assert tree.nodes == (Node("page", "P"), Node("button", "go", 1)) and tree.elements == (2,)
    assert read_tree([]).nodes == ()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_agents.tools.browser import chromium

    monkeypatch.setattr(chromium, "_shared", None)
    monkeypatch.setitem(sys.modules, "playwright.async_api", None)
    with pytest.raises(MissingPart, match=r"pip install 'opd-agents\[web\]'"):
        open_page()
