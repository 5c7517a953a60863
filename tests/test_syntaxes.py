"""Every tool-call syntax: what published templates write, what models get wrong, what environments do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rolling import rolled
from toy_envs import Counter
from transformers.utils.chat_template_utils import _compile_jinja_template

from opd_agents.chat import Chat, build_word_tokenizer
from opd_agents.chat.syntaxes import SYNTAXES, Found, detect_syntax, find_syntax
from opd_agents.envs.actions import CALL_MARKERS, BadAction, format_calls, parse_action
from opd_agents.episode import Episode, Limits
from opd_agents.errors import ConfigError
from opd_agents.policies import Action
from opd_agents.tools import Tool
from opd_agents.types import Actor, SpanKind, StopReason, Task, ToolCall, ToolSpec

ALL = list(SYNTAXES.values())
EVERY = pytest.mark.parametrize("syntax", ALL, ids=[syntax.name for syntax in ALL])
BARS = str.maketrans("|_", "｜▁")  # noqa: RUF001  # DeepSeek's

GET = ToolCall("get_order", {"order_id": "A7", "limit": 3, "price": 1.5, "tags": ["a", 1], "by": {"k": "é"}})
FLAGS = ToolCall("set_flags", {"on": True, "off": False, "none": None, "text": "two\nlines"})
LINE = ToolCall("say", {"text": "It is", "times": 2, "loud": True})
CLOSE = ToolCall("close", {})
CODE = ToolCall("python", {"code": "print(1)\n"})


def written(template, calls, *, json_text=False):
    """What a published template writes for an assistant turn with ``calls``."""
    import trl  # only its data is read

    path = __import__("pathlib").Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    functions = [
        {
            "name": c.name,
            "arguments": json.dumps(c.arguments, ensure_ascii=False) if json_text else c.arguments,
        }
        for c in calls
    ]
    messages = [
        {"role": "user", "content": "Hi."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": one} for one in functions],
        },
    ]
    compiled = _compile_jinja_template(path.read_text(encoding="utf-8"))
    common = {"tools": None, "bos_token": "", "eos_token": ""}
    start = compiled.render(messages=messages[:1], add_generation_prompt=False, **common)
    text = compiled.render(messages=messages, add_generation_prompt=False, **common)
    assert text.startswith(start)
    return text[len(start) :]


GOLDEN = [
    ("qwen", "qwen2_5", [GET, FLAGS, CLOSE]),
    ("qwen", "qwen3", [GET, FLAGS, CLOSE]),
    ("qwen", "qwen3_instruct_2507", [GET, FLAGS, CLOSE]),
    ("qwen_xml", "qwen3_5_think", [GET, CLOSE]),  # it writes True, where 3.6 writes true
    ("qwen_xml", "qwen3_6", [GET, FLAGS, CLOSE]),
    ("qwen_xml", "qwen3_8", [GET, FLAGS, CLOSE]),
    ("qwen_xml", "nemotron_3_nano", [GET, CLOSE]),
    ("glm", "glm4moe", [GET, FLAGS, CLOSE]),
    ("deepseek", "deepseekv3", [GET, FLAGS, CLOSE]),
    ("llama_json", "llama3_1", [GET]),
    ("llama_json", "llama3_2", [FLAGS]),
    ("gpt_oss", "gptoss", [GET]),
    ("lfm", "lfm2_v2", [GET, FLAGS, CLOSE]),
    ("lfm", "lfm2_2_5", [LINE, CLOSE]),  # it writes quotes in a text as they are, which is no Python
]
AROUND = {  # what templates write around the calls: header, an empty thought, the end
    "deepseekv3": ("<|Assistant|>".translate(BARS), "<|end_of_sentence|>".translate(BARS)),
    "glm4moe": ("<|assistant|>\n<think></think>\n", ""),
    "gptoss": ("<|start|>assistant", "<|call|>"),
    "llama3_1": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "llama3_2": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "nemotron_3_nano": ("<|im_start|>assistant\n<think></think>\n", "\n<|im_end|>\n"),
}
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(("name", "template", "calls"), GOLDEN, ids=[one[1] for one in GOLDEN])
def test_rendered_calls_are_what_the_published_template_writes(name, template, calls):
    text = written(template, calls, json_text=template == "deepseekv3")
    before, after = AROUND.get(template, ("<|im_start|>assistant\n", "<|im_end|>\n"))
    assert text.startswith(before) and text.endswith(after)
    turn = text[len(before) : len(text) - len(after)].removeprefix(THOUGHT)
    assert turn == SYNTAXES[name].render(calls)
    assert SYNTAXES[name].parse(turn) == Found(tuple(calls), SYNTAXES[name].parse(turn).ranges, None)


@pytest.mark.parametrize(("name", "template", "calls"), GOLDEN, ids=[one[1] for one in GOLDEN])
def test_the_syntax_of_a_template_is_found(name, template, calls):
    text = written(template, calls, json_text=template == "deepseekv3")
    before, after = AROUND.get(template, ("<|im_start|>assistant\n", "<|im_end|>\n"))
    assert detect_syntax(text[len(before) : len(text) - len(after)], calls) is SYNTAXES[name]


def test_the_projects_own_template_is_hermes_and_prose_is_no_syntax():
    assert detect_syntax(SYNTAXES["hermes"].render([GET, CLOSE]), [GET, CLOSE]) is SYNTAXES["hermes"]
    assert detect_syntax(format_calls([GET]), [GET]) is SYNTAXES["json"]
    assert detect_syntax("I will close it.", [CLOSE]) is None
    assert detect_syntax('{"name": "f", "arguments": {"a": 1}}', [ToolCall("f", {"a": True})]) is None


@EVERY
@pytest.mark.parametrize("calls", [(GET,), (CLOSE,), (GET, FLAGS, CLOSE), (CODE, CODE)], ids=len)
def test_calls_read_back_and_reach_the_environment(syntax, calls):
    text = syntax.render(calls)
    found = syntax.parse(text)
    assert found.calls == calls and found.error is None
    assert all(text[a:b] for a, b in found.ranges)
    assert parse_action(syntax.action(text, found)) == calls


WRAPPED = [
    s for s in ALL if s.name not in ("llama_json", "pythonic", "json", "gpt_oss", "mistral", "mistral_args")
]


@pytest.mark.parametrize("syntax", WRAPPED, ids=[one.name for one in WRAPPED])
def test_calls_may_stand_in_prose(syntax):
    text = f"Let me look.\n{syntax.render([CODE])}\nWait."
    found = syntax.parse(text)
    assert found.calls == (CODE,)
    (start, stop) = found.ranges[0]
    assert text[:start] == "Let me look.\n" and text[stop:] == "\nWait."


@EVERY
@pytest.mark.parametrize(
    "text",
    [
        "Your order was refunded.",
        "a < b, [1] and f(x)",
        "Usage: tool [ARGS] <name>",
        "It's ```code``` here\n```\nx\n```",
    ],
)
def test_prose_is_no_call_and_reaches_the_environment_unchanged(syntax, text):
    found = syntax.parse(text)
    assert found == Found((), (), None)
    assert syntax.action(text, found) == text and parse_action(text) == ()


WRONG = [
    ("qwen", '<tool_call>\n{"name": "f", "arguments": {"a": 1}', "invalid JSON"),
    ("qwen_xml", '<tool_call>{"name":"f","arguments":{}}</tool_call>', "no <function= after <tool_call>"),
    ("qwen_xml", "<function=f>\n</function>\n</tool_call>", "without <tool_call>"),
    ("qwen_xml", "<tool_call><function=f></tool_call>", "no </function>"),
    ("qwen_xml", "<tool_call><function=f><parameter=a>1</function></tool_call>", "no </parameter>"),
    ("qwen_xml", "<tool_call><function=></function></tool_call>", "no name"),
    (
        "qwen_xml",
        "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
        "duplicate parameter 'a'",
    ),
    (
        "qwen_xml",
        "<tool_call><function=f><parameter=a>\n1\n<parameter=b>\n2</parameter></function></tool_call>",
        "<parameter= inside a value",
    ),
    ("qwen_xml", "<tool_call><function=f><parameter=a>NaN</parameter></function></tool_call>", "finite"),
    ("glm", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1\n</tool_call>", "no </arg_value>"),
    ("glm", "<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>", "no </tool_call>"),
    ("glm", '<tool_call>{"name":"f"}</tool_call>', "no name"),
    ("glm", "f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>", "<arg_key> without"),
    (
        "glm",
        "<tool_call>f\n<arg_key>a</arg_key><arg_value>{'a':1,}</arg_value>"
        "<arg_key>a</arg_key><arg_value>2</arg_value></tool_call>",
        "duplicate key 'a'",
    ),
    ("deepseek", "<|tool_calls_begin|><|tool_calls_end|>".translate(BARS), "no <"),
    ("deepseek", "<|tool_call_begin|>function<|tool_sep|>f".translate(BARS), "without"),
    (
        "deepseek",
        "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>f\n```json\n[]\n```<|tool_call_end|>".translate(BARS),
        "must be a JSON object",
    ),
    ("mistral", "[TOOL_CALLS] []", "no call in the list"),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": "{}"}]', "must be a JSON object"),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', "no [ARGS]"),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": 1} Done.', "text after the call"),
    ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {}}', "no name"),
    ("llama_json", '{"name": "f", "parameters": {"a": 1}', "invalid JSON"),
    ("llama_json", '{"name": "f", "parameters": "7"}', "must be a JSON object"),
    ("llama_json", '{"name": "f", "parameters": {}} Done.', "text after the call"),
    ("llama_json", '<|python_tag|>brave_search.call(query="x")', "invalid JSON"),
    ("llama_json", '{"type": "tool", "name": "f", "parameters": {}}', "'type'"),
    ("pythonic", "[f(a=1), g(b=", "no list of calls"),
    ("pythonic", "[f(1)]", "named arguments"),
    ("pythonic", "[f(a=1, a=2)]", "duplicate name 'a'"),
    ("pythonic", "[f(a=open('x'))]", "must be a literal"),
    ("pythonic", "[f(a=x)]", "must be a literal"),
    ("pythonic", "[f(a=1e999)]", "JSON compliant"),
    ("pythonic", "[f(a=(1, 2))]", "must be a literal"),
    ("pythonic", "[f(a={1: 2})]", "must be texts"),
    ("pythonic", "[f(a=f'{x}')]", "must be a literal"),
    ("pythonic", "[f(a=1) for f in g]", "must stand in a list"),
    ("pythonic", "[f(a=" + "[" * 5000 + "]" * 5000 + ")]", "nest"),
    ("pythonic", "[f(a=" + "-" * 90_000 + "1)]", "nested too deep"),
    ("pythonic", "[f" + ".a" * 40_000 + "()]", "nested too deep"),
    ("lfm", "<|tool_call_start|>[f(a=1)]", "no <|tool_call_end|>"),
    ("lfm", "[f(a=1)]<|tool_call_end|>", "invalid JSON"),
    ("gpt_oss", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{", "invalid JSON"),
    ("gpt_oss", "<|channel|>commentary to=browser.f<|message|>{}", "unknown recipient"),
    ("gpt_oss", "<|channel|>commentary to=functions.f code<|message|>{}", "commentary channel"),
    ("gpt_oss", "<|channel|>final<|message|>Hi.<|channel|>", "inside a message"),
    ("gpt_oss", "<|channel|>commentary to=functions.f", "no message header"),
    ("gpt_oss", ' to=functions.f<|channel|>commentary json<|message|>{"a":1} Hi.', "no <|call|>"),
    ("gpt_oss", '<|channel|>final<|message|>{"name":"f","arguments":{}}', "JSON in words to the user"),
    ("gpt_oss", "<|channel|>thoughts<|message|>Hm.", "no message header"),
    ("json", '{"name": "f", "parameters": {"a": 1}}', "unknown key 'parameters'"),
    ("json", '{"name": "f", "arguments": {"a": 1, "a": 2}}', "duplicate key 'a'"),
    ("json", '{"name": "f", "arguments": {"a": NaN}}', "finite"),
    ("json", "[]", "empty list"),
    ("code", "```python\nprint(1)", "no closing ```"),
    ("code", "````python\nprint(1)\n```", "no closing ````"),
    ("code", "```python\n```", "no code"),
    ("code", "```\nx\n```python\ny\n```", "inside another block"),
    ("code", "  ```python\nx\n  ```", "start of a line"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "problem"), WRONG)
def test_what_is_not_exactly_a_call_is_refused_with_what_was_wrong(name, text, problem):
    syntax = SYNTAXES[name]
    found = syntax.parse(text)
    assert found.calls == () and found.ranges is not None
    assert problem in (found.error or "")
    with pytest.raises(BadAction) as refusal:
        parse_action(syntax.action(text, found))
    if not (syntax.native or found.bare):
        assert problem in str(refusal.value) and syntax.form in str(refusal.value)


@EVERY
def test_an_environment_refuses_the_markup_of_every_other_syntax_too(syntax):
    for other in ALL:
        for marker in other.markers:
            found = syntax.parse(f"Well, {marker}")
            assert found.calls == ()
            with pytest.raises(BadAction):
                parse_action(syntax.action(f"Well, {marker}", found))


def test_environments_know_the_markers_of_every_syntax():
    assert set(CALL_MARKERS) == {marker for syntax in ALL for marker in syntax.markers}


@EVERY
@pytest.mark.parametrize("text", ["", " \n"])
def test_silence_is_answered_with_how_to_write_a_call(syntax, text):
    with pytest.raises(BadAction, match="empty action") as refusal:
        parse_action(syntax.action(text, syntax.parse(text)))
    assert syntax.native or syntax.form in str(refusal.value)


def test_gpt_oss_says_its_final_channel_to_the_user_and_thinks_on_analysis():
    syntax = SYNTAXES["gpt_oss"]
    thought = "<|channel|>analysis<|message|>The user greets.<|end|><|start|>assistant"
    text = f"{thought}<|channel|>final<|message|>Hi there.<|return|>"
    found = syntax.parse(text)
    assert found == Found((), (), None, content="Hi there.") and syntax.action(text, found) == "Hi there."
    call = "<|channel|>commentary to=functions.close <|constrain|>json<|message|>{}<|call|>"
    found = syntax.parse(thought + call)
    assert found.calls == (CLOSE,)
    assert [(thought + call)[a:b] for a, b in found.ranges] == ["<|start|>assistant" + call]


def test_mistral_and_deepseek_read_both_their_forms():
    newer = SYNTAXES["mistral"].parse('[TOOL_CALLS]close[ARGS]{}[TOOL_CALLS]get[ARGS] {"a": 1}')
    assert newer.calls == (CLOSE, ToolCall("get", {"a": 1}))
    with_id = SYNTAXES["mistral_args"].parse(
        '[TOOL_CALLS][{"name": "close", "arguments": {}, "id": "a1b2c3d4e"}]'
    )
    assert with_id.calls == (CLOSE,)
    v31 = '<|tool_calls_begin|><|tool_call_begin|>get<|tool_sep|>{"a":1}<|tool_call_end|><|tool_calls_end|>'
    assert SYNTAXES["deepseek"].parse(v31.replace("tool_call", "tool▁call").translate(BARS)).calls == (
        newer.calls[1],
    )


def test_llama_reads_tagged_and_several_calls_and_the_type_that_it_was_shown():
    syntax = SYNTAXES["llama_json"]
    one = '{"type": "function", "name": "close", "parameters": {}}'
    assert syntax.parse(f"<|python_tag|>{one}").calls == (CLOSE,)
    assert syntax.parse(f"{one}; {one}").calls == (CLOSE, CLOSE)


def test_code_of_any_tool_and_with_fences_in_it():
    syntax = find_syntax("code:run.source")
    assert syntax.name == "code:run.source"
    call = ToolCall("run", {"source": 'doc = """\n```python\nx\n```\n"""'})
    assert syntax.parse(f"Now:\n{syntax.render([call])}\nDone.").calls == (call,)
    assert syntax.parse("```bash\nls\n```\nand\n```py\nx\n```").calls == (ToolCall("run", {"source": "x"}),)


def test_an_unknown_syntax_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"no syntax 'qwen_xm'.*auto, hermes.*qwen_xml.*code:TOOL.ARGUMENT"):
        find_syntax("qwen_xm")


# ---- a rollout in every syntax ----


class Coder(Counter):
    """Has one tool, which takes a text: the digits to add."""

    def __init__(self) -> None:
        super().__init__()
        self._tools = {"python": Tool.from_function(self.python)}

    def python(self, code: str) -> dict[str, int]:
        """Run code."""
        return self.add(int(code))


class Writes:
    """Writes given texts token by token, the third one without an end."""

    def __init__(self, chat, texts):
        self.chat, self.texts = chat, texts

    def act(self, histories):
        number = len(histories[0].turns)
        ids = self.chat.tokenizer.encode(self.texts[number], add_special_tokens=False)
        if number == 2:
            return [Action(Actor.STUDENT, StopReason.LENGTH, tuple(ids), (0.0,) * len(ids))]
        ids = (*ids, min(self.chat.end_ids))
        return [Action(Actor.STUDENT, StopReason.END, ids, (0.0,) * len(ids))]


@EVERY
def test_a_rollout_runs_calls_answers_broken_ones_and_counts_their_turns(syntax):
    seven = ToolCall("python", {"code": "7"})
    call = syntax.render([seven])
    chat = Chat(
        build_word_tokenizer([call, "I am done."]), kwargs={"include_tools": False}, syntax=syntax.name
    )
    texts = [call, call[:-2], call, f"{call} {call[:-2]}", "I am done."]
    limits = Limits(max_tokens_per_turn=2000, max_context_tokens=20_000)
    task = Task("4", "train")  # its target is 7
    episode = Episode("e", "Coder", 0, task, (0, 0, 0))
    (one,) = rolled([episode], Writes(chat, texts), chat, limits=limits, make=lambda name: Coder())
    assert one.error is None and one.success and len(one.turns) == len(texts)
    valid, broken, cut, half, said = one.turns
    assert json.loads(valid.observation) == {"value": 7} and valid.calls == (seven,)
    assert [span.kind for span in valid.spans] == [SpanKind.CALL, SpanKind.SPECIAL]
    for turn in (broken, cut, half):
        assert turn.calls == () and turn.parse_error and "error" in json.loads(turn.observation)
    assert "cut off" in cut.parse_error
    if not (syntax.native or syntax is SYNTAXES["json"]):
        assert json.loads(broken.observation)["error"].endswith(f"send {syntax.form}, complete")
    assert said.action == said.text == "I am done." and said.parse_error is None


# ---- values that the markup does not type ----

TYPED = ToolSpec(
    "get_order",
    "",
    {
        "properties": {
            "order_id": {"type": "string"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "kind": {"$ref": "#/$defs/Kind"},
            "limit": {"type": "integer"},
            "flag": {"type": "boolean"},
        },
        "$defs": {"Kind": {"type": "string", "enum": ["7", "8"]}},
    },
)


def untyped(name, values):
    """The raw text of parameters, as a model writes it."""
    if name == "glm":
        pairs = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items())
        return f"<tool_call>get_order\n{pairs}</tool_call>"
    pairs = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function=get_order>\n{pairs}</function>\n</tool_call>"


@pytest.mark.parametrize("name", ["qwen_xml", "glm"])
def test_the_tools_schema_says_whether_a_number_is_a_text(name):
    text = untyped(name, {"order_id": "007", "kind": "7", "limit": "7", "note": "null", "flag": "True"})
    (typed,) = SYNTAXES[name].parse(text, [TYPED]).calls
    assert typed.arguments == {"order_id": "007", "kind": "7", "limit": 7, "note": None, "flag": True}
    text = untyped(name, {"order_id": "7", "limit": "many", "note": "[1]"})
    assert SYNTAXES[name].parse(text, [TYPED]).calls[0].arguments == {
        "order_id": "7",
        "limit": "many",
        "note": "[1]",
    }
    assert SYNTAXES[name].parse(text).calls[0].arguments == {"order_id": 7, "limit": "many", "note": [1]}


@pytest.mark.parametrize("name", ["qwen_xml", "glm"])
@given(
    text=st.text(st.characters(codec="utf-8"))
    | st.sampled_from(['"7"', "null", "None", "</parameter>", "<tool_call>"])
)
def test_a_text_reads_back_with_and_without_its_schema(name, text):
    call = ToolCall("get_order", {"order_id": text, "note": text})
    rendered = SYNTAXES[name].render([call])
    assert SYNTAXES[name].parse(rendered).calls == (call,)
    assert SYNTAXES[name].parse(rendered, [TYPED]).calls == (call,)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"properties": 7}, {"properties": {"a": True}}, {"properties": {"a": {"type": 7}}},
     {"properties": {"a": {"anyOf": [{}, {"type": "string"}]}}}, {"properties": {"a": {"$ref": "#/$defs/X"}}},
     {"properties": {"a": {"$ref": "x"}}, "$defs": {"x": {"$ref": "x"}}}],
)  # fmt: skip
def test_a_schema_that_says_no_type_is_no_error(parameters):
    text = SYNTAXES["glm"].render([ToolCall("f", {"a": 7})])
    assert SYNTAXES["glm"].parse(text, [ToolSpec("f", "", parameters)]).calls == (ToolCall("f", {"a": 7}),)
