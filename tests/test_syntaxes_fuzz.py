"""No text makes a reader raise or guess: truncated, nested, repeated, in prose, wrongly quoted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.chat.syntaxes import SYNTAXES
from opd_agents.envs.actions import BadAction, parse_action
from opd_agents.types import ToolCall

ALL = list(SYNTAXES.values())
EVERY = pytest.mark.parametrize("syntax", ALL, ids=[syntax.name for syntax in ALL])

GET = ToolCall("get_order", {"order_id": "A7", "n": 3, "l": ["a", {"b": None}]})
CODE = ToolCall("python", {"code": "print('hi')"})
MARKUP = sorted(
    {marker for syntax in ALL for marker in syntax.markers}
    | {"</parameter>", "</function>", "</arg_key>", "</arg_value>", "[ARGS]", "```python\n", "\n```\n"}
    | {"<|start|>assistant", "<|end|>", "functions.f", "commentary", "final", "analysis", "json"}
)  # fmt: skip
PIECES = [
    *MARKUP, "{", "}", "[", "]", "(", ")", "=", ":", ";", ",", '"', "'", "\\", "\n", " ", "f", "get_order>",
    '{"name":"f","arguments":{}}', '{"name": "f", "parameters": {"a": 1}}', "[f(a=1)]", "null", "NaN",
    "1e999", "-", "**", "\\ud800", "\ud800", "é", "\0", "\x15", "<think>", '"a":1,"a":1', "[[[[", "'''", "#",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=16).map("".join) | st.text(max_size=30)


def check(syntax, text):
    """What holds for every text."""
    found = syntax.parse(text)
    edges = [edge for pair in found.ranges for edge in pair]
    assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
    assert all(a < b for a, b in found.ranges)
    assert not (found.calls and found.error)
    assert len(found.ranges) >= bool(found.calls)
    json.dumps([dict(call.arguments) for call in found.calls], allow_nan=False, ensure_ascii=False).encode()
    action = syntax.action(text, found)
    if found.error:
        found.error.encode()
        with pytest.raises(BadAction):
            parse_action(action)
    else:
        try:
            assert parse_action(action) == found.calls
        except BadAction:
            assert not found.calls
    return found


@EVERY
@settings(max_examples=250, deadline=None, derandomize=True)
@given(TEXTS)
def test_no_text_raises_and_what_the_environment_runs_is_what_was_read(syntax, text):
    check(syntax, text)


@EVERY
@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_call_is_the_call_or_an_error_or_no_call_at_all(syntax, data):
    calls = (CODE, CODE) if syntax.name == "code" else (GET, CODE)
    text = syntax.render(calls)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 8)))
    found = check(syntax, text[:start] + data.draw(st.sampled_from(["", *PIECES])) + text[stop:])
    assert len(found.calls) <= len(calls)
    assert sum(call not in calls for call in found.calls) <= 1


@EVERY
@pytest.mark.parametrize("calls", [(CODE,), (GET,), (GET, CODE)], ids=["code", "get", "both"])
def test_truncated_at_any_character_it_is_never_the_call(syntax, calls):
    text = syntax.render(calls)
    for stop in range(len(text)):
        found = check(syntax, text[:stop])
        # the first of two, whole, is a call: that the turn was cut off, its missing end token tells the chat
        assert found.calls in ((), calls[:1]) and found.calls != calls


@EVERY
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(MARKUP), min_size=1, max_size=4).map("".join))
def test_markup_inside_a_text_argument_is_only_text(syntax, markup):
    calls = (
        ToolCall("python", {"code": markup}),
        ToolCall("say", {"text": markup, "more": [markup, {"k": markup}]}),
    )
    for call in calls:
        assert check(syntax, syntax.render((call,))).calls == (call,)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
KEY = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.builds(ToolCall, KEY, st.dictionaries(KEY, JSON, max_size=3)), min_size=1, max_size=3)


@EVERY
@settings(max_examples=60, deadline=None, derandomize=True)
@given(CALLS)
def test_every_call_reads_back(syntax, calls):
    found = check(syntax, syntax.render(calls))
    assert found.error is None and found.calls == tuple(calls)
    assert json.dumps([dict(c.arguments) for c in found.calls]) == json.dumps(
        [dict(c.arguments) for c in calls]
    )
