"""Golden tests against the published templates in trl: what a rollout joins is the template's rendering."""

import dataclasses

import pytest
from families import chat, openai, openai_tool, template, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.chat import Chat
from opd_agents.errors import ConfigError
from opd_agents.types import Message, ToolCall, ToolSpec

SYSTEM = "Be kind."
TOOL = ToolSpec("get_order", "Look up an order.", {"type": "object", "properties": {}})
ASK = Message("user", "Settle every order — 5 €, please 🙂.")
GET = ToolCall("get_order", {"order_id": "k7", "deep": {"a": [1, True]}})
CLOSE = ToolCall("close_ticket", {})
LOOK = Message("assistant", "", (GET,))
BOTH = Message("assistant", "Both at once.", (GET, CLOSE))
WHICH = Message("assistant", "Which order?")
DONE = Message("assistant", "Done: é, 🙂 and\n\ntwo lines.")
SEEN = Message("tool", '{"status": "delivered", "note": "a\\nb"}')
GONE = Message("tool", "closed")
LAST = Message("user", "The last one.")
# (assistant turn, what answers it); the last turn ends the conversation
CALLS_ONCE = ((LOOK, (SEEN,)), (WHICH, (LAST,)), (LOOK, (SEEN,)), (DONE, ()))
PARALLEL = ((LOOK, (SEEN,)), (BOTH, (SEEN, GONE)), (WHICH, (LAST,)), (LOOK, (SEEN,)), (DONE, ()))
WORDS = ((WHICH, (LAST,)), (DONE, (LAST,)), (WHICH, ()))
EMPTY = "<think>\n\n</think>\n\n"


def thinking(turns):
    return tuple((dataclasses.replace(m, reasoning=f"Hm {i}."), rest) for i, (m, rest) in enumerate(turns))


def joined(chat, turns, tools=(TOOL,)):
    """The ids of a conversation as rollout and recordings join them."""
    ids, after = chat.prompt_ids([ASK], tools, SYSTEM), "user"
    for message, answers in turns:
        ids += chat.encode_message(message, after=after)
        if answers:
            ids += chat.suffix_ids(answers, ended=True, calls=message.tool_calls)
            after = answers[-1].role
    return ids


def whole(name, turns, tools=(TOOL,), *, json_arguments=False, **kwargs):
    """The text of the whole conversation by transformers alone."""
    messages = [Message("system", SYSTEM), ASK]
    for message, answers in turns:
        messages += [message, *answers]
    return tokenizer(name).apply_chat_template(
        [openai(message, json_arguments=json_arguments) for message in messages],
        tools=[openai_tool(tool) for tool in tools] or None, tokenize=False, **kwargs,
    )  # fmt: skip


def text_of(name, ids):
    return tokenizer(name).decode(ids, skip_special_tokens=False)


def assert_canonical(name, ids, text=None):
    """The ids are those of the whole text, although they were encoded piece by piece."""
    text = text_of(name, ids) if text is None else text
    assert tokenizer(name).encode(text, add_special_tokens=False)[: len(ids)] == list(ids)


@pytest.fixture(autouse=True)
def _new_year(new_year):
    """The clock of transformers stands where Chat's does."""


# ---- what joins to exactly the whole rendering: (template, turns, what the template writes at the end) ----


@pytest.mark.parametrize(
    ("name", "turns", "end"),
    [
        ("qwen2_5", PARALLEL, "\n"),
        ("qwen3_instruct_2507", PARALLEL, "\n"),
        ("llama3_1", CALLS_ONCE, ""),
        ("llama3_2", CALLS_ONCE, ""),
        ("gemma3", WORDS, "\n"),
    ],
)
def test_joined_ids_are_those_of_the_whole_rendering(name, turns, end):
    ids = joined(chat(name), turns)
    text = whole(name, turns)
    assert text_of(name, ids) + end == text
    assert_canonical(name, ids, text)


@pytest.mark.parametrize("settings", [{}, {"enable_thinking": False}], ids=["thinking", "nothink"])
def test_glm_ends_a_turn_with_the_next_roles_token(settings):
    spoken = chat("glm4moe", kwargs=settings)
    ids = joined(spoken, PARALLEL)
    last = spoken.encode_message(DONE)[-1]
    assert text_of("glm4moe", [last]) == "<|user|>"  # which the template does not write at the end
    text = whole("glm4moe", PARALLEL, **settings)
    assert text_of("glm4moe", ids[:-1]) == text
    assert_canonical("glm4moe", ids[:-1], text)
    names = {text_of("glm4moe", [i]) for i in spoken.end_ids}
    assert names == {"<|user|>", "<|observation|>", "<|endoftext|>"}
    assert text_of("glm4moe", spoken.encode_message(LOOK)[-1:]) == "<|observation|>"


def test_glm_suffix_follows_whatever_token_ended_the_action():
    glm = chat("glm4moe")
    user, observation, end = (
        tokenizer("glm4moe").convert_tokens_to_ids(t)
        for t in ("<|user|>", "<|observation|>", "<|endoftext|>")
    )
    answered = glm.suffix_ids([SEEN], ended=True)
    assert text_of("glm4moe", answered).startswith("\n<tool_response>\n")
    assert glm.suffix_ids([SEEN], ended=True, end=observation) == answered
    # an action that went to the user, or to the end of the text, keeps its token; the role is opened anew
    for other in (user, end):
        assert glm.suffix_ids([SEEN], ended=True, end=other) == (observation, *answered)
    assert glm.suffix_ids([SEEN], ended=False) == (observation, *answered)
    assert glm.suffix_ids([LAST], ended=False)[0] == user


# ---- templates that write past turns otherwise than the model wrote them ----


def test_qwen3_without_thinking_breaks_its_own_prefix_at_every_turn():
    off = {"enable_thinking": False}
    spoken = chat("qwen3", kwargs=off)
    ids = joined(spoken, PARALLEL)
    text = text_of("qwen3", ids)
    assert text.count(EMPTY) == len(PARALLEL)  # each generation prompt's block stays in the history
    head, last = text.rsplit(EMPTY, 1)
    assert head.replace(EMPTY, "") + EMPTY + last + "\n" == whole("qwen3", PARALLEL, **off)
    assert_canonical("qwen3", ids)
    before, after = (spoken.prompt_ids(m, [TOOL], SYSTEM) for m in ([ASK], [ASK, LOOK, SEEN]))
    assert after[: len(before)] != before and ids[: len(before)] == before


@pytest.mark.parametrize(
    ("name", "turns"), [("qwen3", PARALLEL), ("qwen3_6", PARALLEL), ("glm4moe", PARALLEL)]
)
def test_reasoning_is_stripped_before_the_last_question_only(name, turns):
    """`append` keeps what was thought; the template drops it from turns before the user's last message."""
    turns = thinking(turns)
    ids = joined(chat(name), turns)
    text = text_of(name, ids)
    for number in range(len(turns)):
        assert f"Hm {number}." in text
        if number <= 2:  # up to the question that LAST answers
            block = (
                f"<think>Hm {number}.</think>"
                if name == "glm4moe"
                else f"<think>\nHm {number}.\n</think>\n\n"
            )
            assert block in text
            text = text.replace(block, "<think></think>" if name == "glm4moe" else "")
    end = "\n" if name != "glm4moe" else ""
    assert text.removesuffix("<|user|>") + end == whole(name, turns)
    assert_canonical(name, ids)


def test_qwen3_writes_an_empty_thought_for_the_last_turn_alone():
    ids = joined(chat("qwen3"), PARALLEL)
    text = text_of("qwen3", ids)
    head, last = text.rsplit(EMPTY, 1)
    assert head.count(EMPTY) == len(PARALLEL) - 1
    assert head.replace(EMPTY, "") + EMPTY + last + "\n" == whole("qwen3", PARALLEL)


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6"])
def test_a_generation_prompt_that_opens_the_thought(name):
    spoken = chat(name)
    assert text_of(name, spoken.prompt_ids([ASK], [TOOL], SYSTEM)).endswith(
        "<|im_start|>assistant\n<think>\n"
    )
    turns = thinking(((LOOK, (SEEN,)), (BOTH, (SEEN, GONE)), (DONE, ())))
    ids = joined(spoken, turns)
    text = whole(name, turns)
    assert text_of(name, ids) + "\n" == text
    assert_canonical(name, ids, text)
    assert text_of(name, spoken.encode_message(DONE)).startswith("\n</think>\n\nDone")


def test_gpt_oss_returns_where_history_only_ends():
    spoken = chat("gptoss")
    ids = joined(spoken, CALLS_ONCE)
    text = text_of("gptoss", ids)
    head, last = text.rsplit("<|return|>", 1)
    assert head.replace("<|return|>", "<|end|>") + "<|return|>" + last == whole("gptoss", CALLS_ONCE)
    assert_canonical("gptoss", ids)
    assert {text_of("gptoss", [i]) for i in spoken.end_ids} == {"<|return|>", "<|call|>"}
    assert "<|start|>functions.get_order to=assistant<|channel|>commentary<|message|>" in text
    assert "Current date: 2025-01-01" in text


def test_gpt_oss_drops_the_analysis_of_turns_before_a_final_answer():
    turns = thinking(CALLS_ONCE)
    text = text_of("gptoss", joined(chat("gptoss"), turns))
    channel = "<|channel|>analysis<|message|>Hm {}.<|end|><|start|>assistant"
    for number in range(len(turns) - 1):
        assert channel.format(number) in text
        text = text.replace(channel.format(number), "")
    head, last = text.rsplit("<|return|>", 1)
    assert head.replace("<|return|>", "<|end|>") + "<|return|>" + last == whole("gptoss", turns)


def test_gpt_oss_needs_the_call_that_an_answer_names():
    spoken = chat("gptoss")
    with pytest.raises(ConfigError, match="names the tool before its answer"):
        spoken.suffix_ids([SEEN], ended=True)
    (call,) = spoken.encode_message(LOOK)[-1:]
    assert text_of("gptoss", [call]) == "<|call|>"
    missing = text_of("gptoss", spoken.suffix_ids([LAST], ended=False))
    assert missing.startswith("<|end|><|start|>user<|message|>")
    assert text_of("gptoss", spoken.suffix_ids([LAST], ended=True)) == missing.removeprefix("<|end|>")
    with pytest.raises(ConfigError, match=r"'<\|call\|>', which ends an action, before its end"):
        spoken.encode_message(BOTH)  # it stops at its first call


def test_deepseek_v3_loses_thoughts_and_the_frame_of_its_second_round_of_tools():
    spoken = chat("deepseekv3")
    once = ((Message("assistant", "", (GET, CLOSE)), (SEEN, GONE)), (WHICH, (LAST,)), (DONE, ()))
    text = text_of("deepseekv3", joined(spoken, thinking(once)))
    for number in (0, 2):  # the answer to a tool's output is written without thinking
        assert f"<think>\nHm {number}.\n</think>\n\n" in text
        text = text.replace(f"<think>\nHm {number}.\n</think>\n\n", "")
    assert text == whole("deepseekv3", once, json_arguments=True)
    call, sees = Message("assistant", "", (GET,)), (SEEN,)
    twice = ((call, sees), (call, sees), (DONE, ()))
    text = text_of("deepseekv3", joined(spoken, twice)).replace("<think>\n\n</think>\n\n", "")
    first, second = text.split("<｜tool▁outputs▁end｜><｜tool▁calls▁begin｜>")  # noqa: RUF001
    second = second.replace("<｜tool▁outputs▁begin｜>", "")  # noqa: RUF001
    assert f"{first}\n{second}" == whole("deepseekv3", twice, json_arguments=True)


def test_deepseek_r1_writes_no_calls_so_they_are_written_in_its_syntax():
    spoken = chat("deepseek_r1_distill")
    text = text_of("deepseek_r1_distill", joined(spoken, thinking(WORDS)))
    for number in range(3):
        text = text.replace(f"<think>\nHm {number}.\n</think>\n\n", "")
    assert text == whole("deepseek_r1_distill", WORDS)
    ids = spoken.encode_message(LOOK)
    parsed = spoken.parse(ids, ended=True)
    assert spoken.syntax.name == "deepseek" and parsed.calls == (GET,)


# ---- the traps one by one ----


def test_the_newline_after_the_end_token_belongs_to_the_suffix():
    spoken = chat("qwen2_5")
    ids = spoken.encode_message(WHICH)
    assert text_of("qwen2_5", ids) == "Which order?<|im_end|>"
    assert text_of("qwen2_5", spoken.suffix_ids([LAST], ended=True)).startswith("\n<|im_start|>user\n")
    assert text_of("qwen2_5", spoken.suffix_ids([LAST], ended=False)).startswith("<|im_end|>\n<|im_start|>")


def test_parallel_answers_are_one_user_turn_in_qwen_and_several_in_llama():
    text = text_of("qwen3", chat("qwen3").suffix_ids([SEEN, GONE], ended=True))
    assert text.count("<|im_start|>user") == 1 and text.count("<tool_response>") == 2
    text = text_of("llama3_1", chat("llama3_1").suffix_ids([SEEN, GONE], ended=True))
    assert text.count("<|start_header_id|>ipython<|end_header_id|>") == 2


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "gemma3", "deepseekv3", "gptoss", "glm4moe"])
def test_bos_is_written_once(name):
    spoken, begin = chat(name), tokenizer(name).bos_token_id
    ids = spoken.prompt_ids([ASK], [], SYSTEM)
    assert begin is None or begin not in spoken.suffix_ids([LAST], ended=True) + spoken.encode_message(DONE)
    assert ids.count(begin) == (name in ("llama3_1", "llama3_2", "gemma3", "deepseekv3"))


def test_a_sampled_call_stays_as_it_was_where_the_template_would_serialise_it_anew():
    spoken = chat("qwen2_5")
    sampled = '<tool_call>\n{"name":"close_ticket",  "arguments": {}}\n</tool_call>'
    ids = (*tokenizer("qwen2_5").encode(sampled), tokenizer("qwen2_5").eos_token_id)
    assert spoken.parse(ids, ended=True).calls == (CLOSE,)
    history = spoken.prompt_ids([ASK], [TOOL], SYSTEM) + ids + spoken.suffix_ids([GONE], ended=True)
    anew = spoken.prompt_ids([ASK, spoken.read_message(ids, ended=True), GONE], [TOOL], SYSTEM)
    assert sampled in text_of("qwen2_5", history) and sampled not in text_of("qwen2_5", anew)
    assert '<tool_call>\n{"name": "close_ticket", "arguments": {}}\n</tool_call>' in text_of("qwen2_5", anew)


def test_what_a_template_cannot_write_stands_in_the_chats_syntax():
    llama = chat("llama3_1")  # which refuses two calls at once
    ids = llama.encode_message(BOTH)
    assert llama.syntax.name == "llama_json" and ids[-1] == tokenizer("llama3_1").eos_token_id
    assert "Both at once." in text_of("llama3_1", ids) and "close_ticket" in text_of("llama3_1", ids)
    message = llama.read_message(llama.encode_message(Message("assistant", "", (GET, CLOSE))), ended=True)
    assert message.tool_calls == () and "close_ticket" in message.content  # a conversation that it renders
    llama.prompt_ids([ASK, message, SEEN, GONE], [TOOL], SYSTEM)


@pytest.mark.parametrize(
    ("name", "message"),
    [(name, message) for name in ("qwen3", "qwen3_6", "glm4moe") for message in (LOOK, BOTH, DONE)]
    + [("gptoss", LOOK), ("gptoss", DONE), ("qwen2_5", BOTH), ("llama3_2", LOOK), ("deepseekv3", BOTH)],
)
def test_an_encoded_message_reads_back(name, message):
    spoken = chat(name)
    if name in ("qwen3", "qwen3_6", "glm4moe", "deepseekv3", "gptoss"):
        message = dataclasses.replace(message, reasoning="Hm.")
    assert spoken.read_message(spoken.encode_message(message), ended=True) == message


def test_the_clock_of_a_template_stands_still():
    def system(name, **kwargs):
        spoken = Chat(tokenizer(name), kwargs=kwargs)
        return text_of(name, spoken.prompt_ids([ASK], [], SYSTEM))

    assert "Today Date: 01 Jan 2025" in system("llama3_2")
    assert "Today Date: 30 Jun 2026" in system("llama3_2", today="2026-06-30")
    assert "Today Date: yesterday" in system("llama3_1", date_string="yesterday")
    assert "Current date: 2026-06-30" in system("gptoss", today="2026-06-30")
    assert chat("llama3_2").fingerprint != chat("llama3_2", kwargs={"today": "2026-06-30"}).fingerprint
    with pytest.raises(ConfigError, match=r"chat\.kwargs\.today: 'soon' is no date"):
        system("llama3_2", today="soon")


@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("qwen2_5", "qwen"), ("qwen3", "qwen"), ("qwen3_6", "qwen_xml"), ("llama3_1", "llama_json"),
        ("glm4moe", "glm"), ("gptoss", "gpt_oss"), ("deepseekv3", "deepseek"), ("gemma3", "hermes"),
    ],
)  # fmt: skip
def test_the_syntax_is_what_the_template_writes(name, syntax):
    assert chat(name).syntax.name == syntax == chat(name).settings["syntax"]
    assert chat(name, syntax="hermes").syntax.name == "hermes"
    with pytest.raises(ConfigError, match=r"chat\.syntax: there is no syntax 'hermez'; there are auto"):
        Chat(tokenizer(name), syntax="hermez")


# ---- bad input ----


def test_gemma_refuses_tools_and_turns_out_of_order():
    gemma = chat("gemma3")
    with pytest.raises(
        ConfigError, match=r"user, assistant, tool \(Conversation roles must alternate.*template"
    ):
        gemma.suffix_ids([SEEN], ended=True, calls=[GET])
    with pytest.raises(ConfigError, match=r"user, user .*alternate"):
        gemma.prompt_ids([ASK, LAST], [], SYSTEM)


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_template_that_drops_a_role_is_refused(role):
    dropping = template("qwen3_instruct_2507").replace(
        "{%- for message in messages %}", "{%- for message in messages if message.role != '" + role + "' %}"
    )
    if role == "system":
        dropping = dropping.replace("if messages[0].role == 'system'", "if false")
    with pytest.raises(ConfigError, match=rf"drops a {role} message.*chat\.template"):
        spoken = Chat(tokenizer("qwen3"), template=dropping)
        spoken.prompt_ids([ASK], [], SYSTEM)
        spoken.suffix_ids([SEEN], ended=True)


def test_unknown_roles_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown role 'human' among system, human: roles are"):
        chat("qwen2_5").prompt_ids([Message("human", "hi")], [], SYSTEM)


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_6", "llama3_2", "gemma3", "glm4moe", "gptoss", "deepseekv3"]
)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_whatever_was_sampled_can_be_rendered_anew(name, data):
    """Pieces of turns, markers and special tokens in any order never break the next prompt."""
    spoken, words = chat(name), tokenizer(name)
    whole = [spoken.encode_message(m) for m in (LOOK, DONE, dataclasses.replace(LOOK, reasoning="Hm."))]
    pieces = st.sampled_from(whole).flatmap(
        lambda ids: st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids))).map(
            lambda ends: ids[min(ends) : max(ends)]
        )
    )
    added = st.sampled_from(sorted(words.added_tokens_decoder)).map(lambda i: (i,))
    ids = [i for piece in data.draw(st.lists(pieces | added, max_size=5)) for i in piece]
    message = spoken.read_message(ids, ended=data.draw(st.booleans()), tools=[TOOL])
    text = text_of(name, spoken.prompt_ids([ASK, message, LAST], [TOOL], SYSTEM))
    plain = text_of(name, spoken.prompt_ids([ASK, WHICH, LAST], [TOOL], SYSTEM))
    for role in ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|start|>user"):
        assert text.count(role) == plain.count(role)
