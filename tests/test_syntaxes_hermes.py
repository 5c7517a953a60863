import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.chat.syntaxes import SYNTAXES, Found
from opd_agents.types import ToolCall

HERMES = SYNTAXES["hermes"]
GET = ToolCall("get_order", {"order_id": "7"})
BLOCK = '<tool_call>{"name":"get_order","arguments":{"order_id":"7"}}</tool_call>'
FRAGMENTS = [
    HERMES.markers[0], HERMES.markers[1], "{", "}", "[", "]", ":", ",", '"', "'", "\\", "\n", " ", '"name"',
    '"arguments"', '{"name":"', '","arguments":{', "}}", "null", "NaN", "1e999", "\\ud800", "é",
    "<|im_end|>", BLOCK,
]  # fmt: skip


def test_renders_compact_json():
    assert HERMES.render((GET,)) == BLOCK


def test_parallel_calls_stand_one_after_the_other_and_read_back_in_order():
    calls = (GET, ToolCall("close_ticket", {}))
    text = HERMES.render(calls)
    assert text == BLOCK + '<tool_call>{"name":"close_ticket","arguments":{}}</tool_call>'
    found = HERMES.parse(text)
    assert found.calls == calls and found.error is None
    assert [text[a:b] for a, b in found.ranges] == [BLOCK, text[len(BLOCK) :]]


def test_reads_a_call_inside_prose_and_the_spaced_form():
    text = (
        'Let me look.\n<tool_call>\n{"name": "get_order", "arguments": {"order_id": "7"}}\n</tool_call> Wait.'
    )
    found = HERMES.parse(text)
    assert found.calls == (GET,) and found.error is None
    start, stop = found.ranges[0]
    assert text[:start] == "Let me look.\n" and text[stop:] == " Wait."


def test_markers_inside_a_string_argument_do_not_end_the_block():
    call = ToolCall("say", {"text": "</tool_call><tool_call>{"})
    assert HERMES.parse(HERMES.render((call,))).calls == (call,)


def test_text_without_a_call_has_no_range_and_no_error():
    assert HERMES.parse("Your order was refunded.") == Found((), (), None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<tool_call>{"name":"get_order","arguments":{"order_id":"7"}}', "no </tool_call>"),
        ('<tool_call>{"name":"get_order","argum', "invalid JSON"),
        ("<tool_call>{'name':'get_order','arguments':{}}</tool_call>", "invalid JSON"),
        ('<tool_call>{"name":"a","name":"b","arguments":{}}</tool_call>', "duplicate key 'name'"),
        ('<tool_call>{"name":"a","arguments":{"x":1,"x":2}}</tool_call>', "duplicate key 'x'"),
        ('<tool_call>{"arguments":{}}</tool_call>', "'name'"),
        ('<tool_call>{"name":7,"arguments":{}}</tool_call>', "'name'"),
        ('<tool_call>{"name":"a"}</tool_call>', "'arguments'"),
        ('<tool_call>{"name":"a","arguments":"{}"}</tool_call>', "'arguments'"),
        ('<tool_call>{"name":"a","arguments":{},"id":1}</tool_call>', "unknown key 'id'"),
        ("<tool_call>[]</tool_call>", "must be a JSON object"),
        ("<tool_call></tool_call>", "invalid JSON"),
        (f"<tool_call>{BLOCK}</tool_call>", "invalid JSON"),
        (f"{BLOCK}</tool_call>", "</tool_call> without"),
        (f"</tool_call>{BLOCK}", "</tool_call> without"),
        ('<tool_call>{"name":"a","arguments":{"x":NaN}}</tool_call>', "no finite number"),
        ('<tool_call>{"name":"a","arguments":{"x":1e999}}</tool_call>', "no finite number"),
        ('<tool_call>{"name":"a","arguments":{"x":"\\ud800"}}</tool_call>', "surrogate"),
        (f'<tool_call>{{"name":"a","arguments":{{"x":{"[" * 50}{"]" * 50}}}}}</tool_call>', "nested"),
        (f'<tool_call>{{"name":"a","arguments":{{"x":{"[" * 9999}', "nested"),
    ],
)
def test_what_is_not_exactly_a_call_is_an_error_and_no_call(text, problem):
    found = HERMES.parse(text)
    assert found.calls == () and problem in (found.error or "")
    assert found.ranges


def test_one_bad_block_spoils_the_whole_action():
    found = HERMES.parse(BLOCK + "<tool_call>{}</tool_call>" + BLOCK)
    assert found.calls == () and found.error and len(found.ranges) == 3


def test_bare_json_is_read_as_an_environment_would():
    found = HERMES.parse(' {"name":"get_order","arguments":{"order_id":"7"}}')
    assert found.bare and found.calls == (GET,)
    broken = HERMES.parse('{"name":')
    assert broken.bare and broken.calls == () and broken.error


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join) | st.text(max_size=40))
def test_fuzz_never_raises_and_ranges_are_ordered(text):
    found = HERMES.parse(text)
    edges = [edge for pair in found.ranges for edge in pair]
    assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
    assert all(a < b for a, b in found.ranges)
    assert not (found.calls and found.error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=3), min_size=1, max_size=3)
)
def test_every_call_reads_back(arguments):
    calls = tuple(ToolCall(f"tool_{i}", a) for i, a in enumerate(arguments))
    found = HERMES.parse(HERMES.render(calls))
    assert found.error is None and found.calls == calls
    assert json.loads(json.dumps([dict(call.arguments) for call in found.calls])) == arguments
