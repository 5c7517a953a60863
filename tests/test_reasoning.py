import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinking import byte_tokenizer, chat_of

from opd_agents.chat import Chat, compact_template
from opd_agents.envs.actions import BadAction, parse_action
from opd_agents.errors import ConfigError
from opd_agents.types import Message, SpanKind

CALL = '<tool_call>{"name":"get","arguments":{"id":7}}</tool_call>'
BLOCK = "<tool_call>\n" + CALL[11:-12] + "\n</tool_call>"
THINK = ("<think>", "</think>")
# template, its variables, markers, how it closes a thought, whether a generation prompt opens one
PUBLISHED = [
    ("qwen3", {}, THINK, "\n</think>\n\n", False),
    ("qwen3", {"enable_thinking": False}, THINK, "\n</think>\n\n", False),
    ("qwen3_5_think", {}, THINK, "\n</think>\n\n", True),
    ("qwen3_5_think", {"enable_thinking": False}, THINK, "\n</think>\n\n", False),
    ("qwen3_5_nothink", {}, THINK, "\n</think>\n\n", False),
    ("qwen3_6", {}, THINK, "\n</think>\n\n", True),
    ("glm4moe", {}, THINK, "</think>\n", False),
    ("deepseek_r1_distill", {}, THINK, "\n</think>\n\n", True),
    ("deepseekv3", {}, THINK, "\n</think>\n\n", True),
    ("nemotron_3_nano", {}, THINK, "\n</think>\n", True),
    ("lfm2_2_5", {}, THINK, "</think>", False),
    ("gptoss", {}, ("<|channel|>analysis<|message|>", "<|end|>"), "<|end|><|start|>assistant", False),
    ("gemma4", {"enable_thinking": True}, ("<|channel>thought", "<channel|>"), "\n<channel|>", False),
    ("gemma4_v2", {}, ("<|channel>thought", "<channel|>"), "<channel|>", False),
    ("muse_glimmer", {}, (" to=self<|message|>", "<|eom|>"), "<|eom|><|start|>assistant", False),
]
MAGISTRAL = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}[INST]{{ m.content }}[/INST]{%- else -%}"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for part in m.content -%}"
    "{%- if part.type == 'thinking' -%}[THINK]{{ part.thinking }}[/THINK]{%- else -%}{{ part.text }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
)


def written(chat, text, *, ended=True):
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    return (*ids, chat.tokenizer.eos_token_id) if ended else tuple(ids)


def parsed(chat, text, *, ended=True, **options):
    return chat.parse(written(chat, text, ended=ended), ended=ended, **options)


def pieces(chat, text, **options):
    """(kind, text) of every span."""
    ids = written(chat, text, ended=options.get("ended", True))
    spans = parsed(chat, text, **options).spans
    return [(span.kind, chat.tokenizer.decode(ids[span.start : span.stop])) for span in spans]


@pytest.fixture(scope="module")
def qwen3():
    return chat_of("qwen3")


@pytest.fixture(scope="module")
def opened():
    return chat_of("qwen3_5_think", syntax="hermes")


@pytest.mark.parametrize(("name", "kwargs", "markers", "closing", "opens"), PUBLISHED)
def test_the_form_of_thought_is_found_in_published_templates(name, kwargs, markers, closing, opens):
    eos = "<|return|>" if name == "gptoss" else "<|im_end|>"
    chat = chat_of(name, kwargs=kwargs, eos=eos, syntax="hermes")  # that of Muse's words is not known
    thought = chat.thought
    assert (thought.open, thought.close) == markers and thought.closing == closing
    assert thought.opened == opens
    prompt = chat.tokenizer.decode(chat.prompt_ids([Message("user", "hi")], (), ""))
    assert thought.opens(prompt) == opens


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "llama3_2", "gemma3", "phi3_5", "cohere2", "lfm2"]
)
def test_templates_that_do_not_think_have_no_form(name):
    assert chat_of(name).thought is None
    with pytest.raises(ConfigError, match=r"thinking_budget.*marks no thought.*remove it"):
        chat_of(name, thinking_budget=8)


def test_the_projects_own_template_does_not_think(desk_chat):
    assert desk_chat.thought is None and desk_chat.thinking is None
    assert Chat(byte_tokenizer(), template=compact_template()).thought is None


def test_thought_in_parts_of_the_content_is_found():
    thought = Chat(byte_tokenizer(), template=MAGISTRAL).thought
    assert (thought.open, thought.close, thought.closing) == ("[THINK]", "[/THINK]", "[/THINK]")


@pytest.mark.parametrize(
    ("context", "reasoning"),
    [("<|im_start|>assistant\n<think>\n", "so"), ("<tool_response>7</tool_response>", None)],
)
def test_the_end_of_the_context_says_whether_a_thought_is_open(context, reasoning):
    """DeepSeek's and Gemma's generation prompts differ between a user's message and a tool's answer."""
    chat = chat_of("qwen3_5_think", syntax="hermes")
    ids = chat.tokenizer.encode(context)
    action = parsed(chat, "so</think>Yes" if reasoning else "Yes", context_ids=ids)
    assert (action.reasoning, action.action) == (reasoning, "Yes") and action.error is None


def test_a_thought_is_kept_from_the_environment(qwen3):
    text = f"<think>\nI need 7.\n</think>\n\n{BLOCK}"
    action = parsed(qwen3, text)
    assert action.action == '{"name":"get","arguments":{"id":7}}' and action.error is None
    assert action.text == text and action.reasoning == "I need 7."
    assert pieces(qwen3, text) == [
        (SpanKind.THINK, "<think>\nI need 7.\n</think>"),
        (SpanKind.TEXT, "\n\n"),
        (SpanKind.CALL, BLOCK),
        (SpanKind.SPECIAL, "<|im_end|>"),
    ]
    said = parsed(qwen3, "<think>\nhm\n</think>\n\nWhich order?")
    assert (said.action, said.calls, said.reasoning) == ("Which order?", (), "hm")
    assert parsed(qwen3, "Which order?").reasoning is None
    assert parsed(qwen3, "<think>\n\n</think>\n\nOk").reasoning == ""


@pytest.mark.parametrize("marked", [True, False])
def test_markers_are_known_by_their_text(marked):
    chat = chat_of("qwen3", marked=marked)
    ids = written(chat, "<think>é</think>Yes")
    action = chat.parse(ids, ended=True)
    kinds = {span.kind: chat.tokenizer.decode(ids[span.start : span.stop]) for span in action.spans}
    assert kinds[SpanKind.THINK] == "<think>é</think>" and action.action == "Yes"


def test_a_thought_opened_by_the_generation_prompt(opened):
    text = f"I need 7.\n</think>\n\n{BLOCK}"
    action = parsed(opened, text)
    assert action.reasoning == "I need 7." and [call.name for call in action.calls] == ["get"]
    assert pieces(opened, text)[0] == (SpanKind.THINK, "I need 7.\n</think>")


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{BLOCK}",  # never closed
        f"{BLOCK}<think>Done?",
        f"<think>{CALL}</think><think>",
        f"Hello <think>a</think> {CALL} <think> b",
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_an_action_that_stops_inside_a_thought_is_nothing_but_an_error(qwen3, text, ended):
    action = parsed(qwen3, text, ended=ended)
    assert action.calls == () and "inside a thought" in action.error
    with pytest.raises(BadAction, match="inside a thought"):
        parse_action(action.action)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"<think>{CALL}</think>Done.", "Done."),
        (f"{CALL}</think>Done.", "Done."),  # the marker that opens it was left out
        (f"a <think>{CALL}</think> b <think>c</think> d", "a b d"),
        (f"<think>a<think>{CALL}</think>Done.", "Done."),
        (f"<think>a</think>{CALL}</think>Done.", "Done."),
    ],
)
def test_a_call_inside_a_thought_is_never_a_call(qwen3, text, said):
    action = parsed(qwen3, text)
    assert action.calls == () and action.action == said and action.error is None
    assert SpanKind.CALL not in {span.kind for span in action.spans}


def test_a_thought_cannot_stand_inside_a_call(qwen3):
    text = '<tool_call>{"name":"get",<think>hm</think>"arguments":{"id":7}}</tool_call>'
    action = parsed(qwen3, text)
    assert action.calls == () and "a thought stands inside it" in action.error
    with pytest.raises(BadAction):
        parse_action(action.action)
    bare = parsed(qwen3, '{"name":"get",<think>hm</think>"arguments":{"id":7}}')
    assert bare.calls == ()
    with pytest.raises(BadAction):
        parse_action(bare.action)


@pytest.mark.parametrize("marker", THINK)
def test_a_marker_in_a_calls_argument_belongs_to_the_call(qwen3, marker):
    call = f'<tool_call>{{"name":"say","arguments":{{"text":"{marker}"}}}}</tool_call>'
    for text in (call, f"<think>hm</think>\n{call}", f"Now: {call}"):
        action = parsed(qwen3, text)
        assert [dict(one.arguments) for one in action.calls] == [{"text": marker}], text
    assert parsed(qwen3, f"{call}<think>{CALL}").calls == ()


@pytest.mark.parametrize("name", ["qwen3_5_think", "deepseek_r1_distill", "nemotron_3_nano"])
def test_an_encoded_action_closes_the_thought_that_the_prompt_opens(name):
    chat = chat_of(name, syntax="hermes")
    context_ids = chat.prompt_ids([Message("user", "hi")], (), "")
    for action in ('{"name":"get","arguments":{"id":7}}', "Which order?"):
        read = chat.parse(chat.encode_action(action), ended=True, context_ids=context_ids)
        assert (read.action, read.error, read.reasoning) == (action, None, "")


def test_the_channels_of_gpt_oss():
    chat = chat_of("gptoss", eos="<|return|>")
    end = chat.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in chat.end_ids and chat.tokenizer.eos_token_id in chat.end_ids
    thought = "<|channel|>analysis<|message|>Let me see.<|end|>"
    action = parsed(chat, f"{thought}<|start|>assistant<|channel|>final<|message|>Yes.")
    assert (action.action, action.reasoning, action.error) == ("Yes.", "Let me see.", None)
    assert parsed(chat, "<|channel|>final<|message|>Yes.").action == "Yes."
    assert pieces(chat, thought + "<|start|>assistant")[0] == (SpanKind.THINK, thought)
    call = '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"id":7}'
    ids = (*chat.tokenizer.encode(f"{thought}<|start|>assistant{call}"), *chat.tokenizer.encode("<|call|>"))
    for first, last in ((0, None), (len(chat.tokenizer.encode(thought)), None)):
        action = chat.parse(ids[first:last], ended=True)
        assert action.action == '{"name":"get","arguments":{"id":7}}' and action.error is None
    hidden = f"<|channel|>analysis<|message|>{call}<|end|><|start|>assistant<|channel|>final<|message|>No."
    assert (parsed(chat, hidden).action, parsed(chat, hidden).calls) == ("No.", ())
    cut = parsed(chat, thought[:-7], ended=False)
    assert cut.calls == () and "inside a thought" in cut.error


def reference(parts, opened):
    """Which parts are thought, one at a time; whether it is closed at the end. Parts are whole markers."""
    inside, hidden, since = opened, [], 0
    for i, part in enumerate(parts):
        if part == THINK[1]:
            hidden += range(since, i + 1) if not inside else [i]
            inside, since = False, i + 1
        elif inside or part == THINK[0]:
            hidden.append(i)
            inside, since = True, i + 1
    return set(hidden), not inside


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from([*THINK, CALL, BLOCK, "Hello. ", "é🙂", "\n"]), max_size=9),
    ended=st.booleans(),
    opens=st.booleans(),
)
def test_fuzz_only_closed_actions_outside_thought_are_calls(qwen3, opened, parts, ended, opens):
    chat = opened if opens else qwen3
    ids = written(chat, "".join(parts), ended=ended)
    action = chat.parse(ids, ended=ended)
    hidden, closed = reference(parts, opens)
    calls = [i for i, part in enumerate(parts) if part in (CALL, BLOCK) and i not in hidden]
    assert len(action.calls) == (len(calls) if closed and ended else 0)
    assert (action.reasoning is not None) == bool(hidden or opens)
    edges = [0, *(edge for span in action.spans for edge in (span.start, span.stop)), len(ids)]
    assert edges[::2] == edges[1::2] and all(span.start < span.stop for span in action.spans)
    thought = "".join(part for i, part in enumerate(parts) if i in hidden)
    spans = [ids[span.start : span.stop] for span in action.spans if span.kind is SpanKind.THINK]
    assert "".join(map(chat.tokenizer.decode, spans)) == thought
    assert not any(marker in action.action for marker in THINK)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    text=st.text(st.sampled_from('ab{}"<think>/\n'), max_size=30),
    forced=st.lists(st.integers(0, 30), unique=True, max_size=6).map(sorted),
)
def test_fuzz_forced_ids_are_spans_of_their_own(qwen3, text, forced):
    ids = written(qwen3, text)
    ranges = [(i, min(i + 2, j)) for i, j in zip(forced, [*forced[1:], 99], strict=False)]
    ranges = [(a, min(b, len(ids))) for a, b in ranges if a < len(ids)]
    plain, spans = qwen3.parse(ids, ended=True).spans, qwen3.parse(ids, ended=True, forced=ranges).spans
    kinds = [span.kind for span in plain for _ in range(span.start, span.stop)]
    put = {i for a, b in ranges for i in range(a, b)}
    expected = [SpanKind.FORCED if i in put else kind for i, kind in enumerate(kinds)]
    assert [span.kind for span in spans for _ in range(span.start, span.stop)] == expected
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop)), len(ids)]
    assert edges[::2] == edges[1::2]


def follow(chat, context, text):
    """What is written where a model says ``text``, whatever comes between."""
    action = chat.thinking.follow(chat.tokenizer.encode(context))
    ids = [action.write(token) for token in chat.tokenizer.encode(text)]
    return ids, action.forced


@pytest.mark.parametrize("text", ["<think>12345</think>Yes, it is so.", "No thought at all, and long."])
def test_nothing_is_forced_within_the_budget(qwen3, text):
    assert follow(chat_of("qwen3", thinking_budget=6), "", text) == (qwen3.tokenizer.encode(text), [])


@pytest.mark.parametrize("marked", [True, False])
def test_a_thought_is_closed_when_its_budget_is_used_up(marked):
    chat = chat_of("qwen3", marked=marked, thinking_budget=4)
    ids, forced = follow(chat, "", "<think>123456789abcdefghijklmnop")
    close = chat.tokenizer.encode("\n</think>\n\n")
    assert chat.tokenizer.decode(ids).startswith("<think>1234\n</think>\n\n")
    start = len(chat.tokenizer.encode("<think>1234"))
    assert forced == [(start, start + len(close))]


def test_the_budget_is_of_the_whole_action():
    chat = chat_of("qwen3_5_think", thinking_budget=4)
    said = "12</think>a<think>3456789abc<think>xyz?"
    ids, forced = follow(chat, "<|im_start|>assistant\n<think>\n", said)
    # The closing marker is itself written inside the thought. A thought after the second is closed at once.
    assert chat.tokenizer.decode(ids) == "12</think>a<think>3\n</think>\n\n89abc<think>\n</think>\n\n"
    assert [chat.tokenizer.decode(ids[a:b]) for a, b in forced] == ["\n</think>\n\n"] * 2


def test_a_budget_follows_channels():
    chat = chat_of("gptoss", eos="<|return|>", thinking_budget=3)
    ids, forced = follow(chat, "<|start|>assistant", "<|channel|>analysis<|message|>abcdefghijklmnopq")
    assert chat.tokenizer.decode(ids[: forced[0][0]]).endswith("<|message|>abc")
    assert chat.tokenizer.decode(ids[slice(*forced[0])]) == "<|end|><|start|>assistant"
