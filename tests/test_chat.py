import dataclasses
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd_agents.chat import Chat, build_word_tokenizer, compact_template
from opd_agents.errors import ConfigError
from opd_agents.types import Message, SpanKind, ToolSpec

PROMPT = "Customer ana asks to settle every order."
GET = '{"name":"get_order","arguments":{"order_id":"7"}}'
BLOCK = f"<tool_call>{GET}</tool_call>"
TEXTS = [
    PROMPT,
    "Customer ben asks to settle order 7.",
    '<tool_call>{"name":"find_customer","arguments":{"name":"ana"}}</tool_call>',
    '<tool_call>{"name":"close_ticket","arguments":{}}</tool_call>',
    BLOCK,
    '{"customer_id":"c"}',
    '{"customer_id":"c","name":"ben"}',
    '{"orders":["7","k","2"]}',
    '{"order_id":"7","status":"delivered"}',
    '{"order_id":"k","status":"out for delivery","total":12.5,"paid":true}',
    '{"error":"timeout"}',
]
OBSERVATION = (Message("tool", '{"order_id":"7","status":"delivered"}', tool_call_id="0"),)
TIMEOUT = Message("tool", '{"error":"timeout"}')
TOOL = ToolSpec("get_order", "Look up an order.", {"type": "object", "properties": {}})
TOOL_DICT = {"type": "function", "function": dataclasses.asdict(TOOL)}
# A conversation as (action, the messages that follow it); the last action ends it.
EPISODE = [
    ('{"name":"find_customer","arguments":{"name":"ana"}}', (Message("tool", '{"customer_id":"c"}'),)),
    (f'[{GET},{{"name":"close_ticket","arguments":{{}}}}]', (*OBSERVATION, TIMEOUT)),
    ("Which order?", (Message("user", " The\nlast one, please. "),)),
    (GET, ()),
]  # fmt: skip


@pytest.fixture(scope="module")
def words():
    return build_word_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def chat(words):
    return Chat(words)


@pytest.fixture(scope="module")
def byte_bpe():
    """A small byte-level BPE tokenizer that adds a BOS of its own, as Llama's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|endoftext|>")


def trl_template(name):
    return (resources.files("trl") / "chat_templates" / name).read_text()


def play(chat, episode, *, system="", tools=()):
    """The ids of an episode as a rollout joins them, and the conversation with raw assistant contents."""
    ids = chat.prompt_ids([Message("user", PROMPT)], tools, system)
    conversation = [{"role": "system", "content": system}] if system else []
    conversation.append({"role": "user", "content": PROMPT})
    for action, messages in episode:
        action_ids = chat.encode_action(action)
        ids += action_ids
        conversation.append({"role": "assistant", "content": chat.parse(action_ids, ended=True).text})
        if messages:
            ids += chat.suffix_ids(messages, ended=True)
            conversation += [{"role": m.role, "content": m.content} for m in messages]
    return ids, conversation


def full_render(chat, conversation, **options):
    return chat.tokenizer.apply_chat_template(
        conversation, chat_template=chat.template, tokenize=True, return_dict=False, **options
    )


def test_compact_rendering(words):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "get_order", "arguments": {"order_id": "7"}}},
            {"type": "function", "function": {"name": "close_ticket", "arguments": {}}},
        ]},
        {"role": "tool", "content": '{"error":"timeout"}'},
    ]  # fmt: skip
    assert words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe kind.<|im_end|>"
        f"<|im_start|>user\n{PROMPT}<|im_end|>"
        f"<|im_start|>assistant\n{BLOCK}"
        '<tool_call>{"name":"close_ticket","arguments":{}}</tool_call><|im_end|>'
        '<|im_start|>tool\n{"error":"timeout"}<|im_end|>'
        "<|im_start|>assistant\n"
    )


def test_tools_stand_in_the_system_block_unless_excluded(words):
    schema = (
        '<tools>\n{"type":"function","function":{"name":"get_order","description":"Look up an order.",'
        '"parameters":{"type":"object","properties":{}}}}\n</tools>\n'
        'To call a tool, write <tool_call>{"name":NAME,"arguments":{...}}</tool_call><|im_end|>'
    )
    rest = f"<|im_start|>user\n{PROMPT}<|im_end|><|im_start|>assistant\n"
    prompt = [Message("user", PROMPT)]
    chat = Chat(words)
    assert words.decode(chat.prompt_ids(prompt, [TOOL], "")) == f"<|im_start|>system\n{schema}{rest}"
    with_system = words.decode(chat.prompt_ids(prompt, [TOOL], "Be kind."))
    assert with_system == f"<|im_start|>system\nBe kind.\n\n{schema}{rest}"
    assert words.decode(chat.prompt_ids(prompt, [], "")) == rest
    silent = Chat(words, kwargs={"include_tools": False})
    assert words.decode(silent.prompt_ids(prompt, [TOOL], "")) == rest


def test_configured_system_replaces_the_environments(words):
    prompt = [Message("user", PROMPT)]
    assert Chat(words, system="").prompt_ids(prompt, [], "Be kind.") == Chat(words).prompt_ids(prompt, [], "")
    assert Chat(words, system="Hi").prompt_ids(prompt, [], "Be kind.") == Chat(words).prompt_ids(
        prompt, [], "Hi"
    )


def test_incremental_ids_equal_the_full_rendering(chat):
    ids, conversation = play(chat, EPISODE, system="Be kind.", tools=[TOOL])
    assert list(ids) == full_render(chat, conversation, tools=[TOOL_DICT])


def test_text_is_equal_also_where_the_sampled_ids_are_not_canonical(chat):
    spelt = tuple(chat.tokenizer.convert_tokens_to_ids(list(BLOCK))) + chat.encode_action("")
    start = chat.prompt_ids([Message("user", PROMPT)], [], "")
    ids = start + spelt + chat.suffix_ids(OBSERVATION, ended=True)
    canonical = start + chat.encode_action(GET) + chat.suffix_ids(OBSERVATION, ended=True)
    assert len(ids) > len(canonical)
    assert chat.tokenizer.decode(ids) == chat.tokenizer.decode(canonical)
    assert chat.parse(spelt, ended=True).action == GET


def test_a_missing_end_token_is_added_as_context(chat):
    ended = chat.suffix_ids(OBSERVATION, ended=True)
    end = chat.tokenizer.eos_token_id
    assert end not in ended[:1] and chat.suffix_ids(OBSERVATION, ended=False) == (end, *ended)


def test_a_turn_costs_few_tokens(chat):
    tokens = chat.tokenizer.convert_ids_to_tokens
    assert tokens(chat.encode_action(GET)) == [
        '<tool_call>{"name":"', "get_order", '","arguments":{"order_id":"', "7", '"}}</tool_call>',
        "<|im_end|>",
    ]  # fmt: skip
    assert tokens(chat.suffix_ids(OBSERVATION, ended=True)) == [
        "<|im_start|>tool\n", '{"order_id":"', "7", '","status":"', "delivered", '"}', "<|im_end|>",
        "<|im_start|>assistant\n",
    ]  # fmt: skip


def test_qwen_template_keeps_the_newline_after_the_end_token(words):
    chat = Chat(words, template=trl_template("qwen2_5.jinja"))
    ids, conversation = play(chat, EPISODE, system="Be kind.", tools=[TOOL])
    full = full_render(chat, conversation, tools=[TOOL_DICT])
    assert [*ids, *words.encode("\n")] == full  # only the last turn's newline has no suffix to stand in
    assert words.decode(chat.suffix_ids(OBSERVATION, ended=True)).startswith(
        "\n<|im_start|>user\n<tool_response>"
    )
    assert chat.suffix_ids(OBSERVATION, ended=False)[0] == words.convert_tokens_to_ids("<|im_end|>")


def test_qwen_template_on_a_byte_level_tokenizer(byte_bpe):
    chat = Chat(byte_bpe, template=trl_template("qwen2_5.jinja"))
    ids, conversation = play(
        chat, [*EPISODE[:2], ("Voilà — 5 €?", (Message("user", "ça va 🙂"),)), EPISODE[3]]
    )
    assert [*ids, *byte_bpe.encode("\n", add_special_tokens=False)] == full_render(chat, conversation)
    assert {byte_bpe.decode([i]) for i in chat.end_ids} == {"<|im_end|>", "<|endoftext|>"}


def test_bos_is_not_doubled(byte_bpe):
    assert byte_bpe.encode("x")[0] == byte_bpe.bos_token_id
    prompt = [Message("user", PROMPT)]
    written = Chat(byte_bpe, template="{{ bos_token }}" + compact_template())
    assert written.prompt_ids(prompt, [], "").count(byte_bpe.bos_token_id) == 1
    for chat in (written, Chat(byte_bpe, template=compact_template())):
        assert byte_bpe.bos_token_id not in chat.suffix_ids(OBSERVATION, ended=True) + chat.encode_action(GET)


def test_a_template_that_changes_contents_is_rendered_in_full(words):
    trimmed = Chat(
        words, template=compact_template().replace("(message.content or '')", "message.content | trim")
    )
    spaced = trimmed.suffix_ids([Message("user", "  hello \n")], ended=True)
    assert words.decode(spaced) == "<|im_start|>user\nhello<|im_end|><|im_start|>assistant\n"


@pytest.mark.parametrize("action", [GET, EPISODE[1][0], "Which order?", "", '{"broken', "<tool_call>{"])
def test_an_encoded_action_reads_back(chat, action):
    ids = chat.encode_action(action)
    assert ids[-1] == chat.tokenizer.eos_token_id
    assert chat.parse(ids, ended=True).action == action


def test_spans_separate_text_calls_and_the_end_token(chat):
    ids = chat.encode_action(f"Customer ana. {BLOCK}{BLOCK} Wait.")
    parsed = chat.parse(ids, ended=True)
    pieces = [(span.kind, chat.tokenizer.decode(ids[span.start : span.stop])) for span in parsed.spans]
    assert pieces == [
        (SpanKind.TEXT, "Customer ana. "),
        (SpanKind.CALL, BLOCK),
        (SpanKind.CALL, BLOCK),
        (SpanKind.TEXT, " Wait."),
        (SpanKind.SPECIAL, "<|im_end|>"),
    ]
    assert parsed.action == f"[{GET},{GET}]" and [call.name for call in parsed.calls] == ["get_order"] * 2
    assert parsed.text == f"Customer ana. {BLOCK}{BLOCK} Wait."


def test_spans_where_tokens_are_parts_of_characters(byte_bpe):
    chat = Chat(byte_bpe, template=compact_template())
    ids = chat.encode_action(f"🙂 é {BLOCK} 🙂")
    parsed = chat.parse(ids, ended=True)
    assert [span.kind for span in parsed.spans] == [
        SpanKind.TEXT,
        SpanKind.CALL,
        SpanKind.TEXT,
        SpanKind.SPECIAL,
    ]
    call = parsed.spans[1]
    assert BLOCK in byte_bpe.decode(ids[call.start : call.stop])


@pytest.mark.parametrize("text", [BLOCK, BLOCK[:-9], f"Look: {BLOCK}", BLOCK + BLOCK[:20], GET])
def test_a_truncated_call_is_an_error_and_never_runs(chat, text):
    ids = chat.tokenizer.encode(text)
    parsed = chat.parse(ids, ended=False)
    assert parsed.calls == () and parsed.error and parsed.text == text
    # Bare JSON would be run by the environment; everything else arrives unchanged.
    assert parsed.action == ("<tool_call>" + text if text == GET else text)


def test_unreadable_calls_reach_the_environment_unchanged(chat):
    text = '<tool_call>{"name":"get_order","arguments":{"order_id":"7","order_id":"8"}}</tool_call>'
    parsed = chat.parse((*chat.tokenizer.encode(text), chat.tokenizer.eos_token_id), ended=True)
    assert parsed.action == parsed.text == text and parsed.calls == ()
    assert parsed.error is not None and "duplicate key 'order_id'" in parsed.error


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_parse_never_raises_and_spans_partition_the_ids(chat, byte_bpe, data):
    tokenizer = data.draw(st.sampled_from([chat.tokenizer, byte_bpe]))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    if data.draw(st.booleans()):
        block = tokenizer.encode(BLOCK, add_special_tokens=False)
        at = data.draw(st.integers(0, len(ids)))
        ids[at:at] = block[: data.draw(st.integers(0, len(block)))]
    reader = chat if tokenizer is chat.tokenizer else Chat(byte_bpe, template=compact_template())
    ended = data.draw(st.booleans())
    parsed = reader.parse(ids, ended=ended)
    edges = [0, *(edge for span in parsed.spans for edge in (span.start, span.stop)), len(ids)]
    assert edges[::2] == edges[1::2] and all(span.start < span.stop for span in parsed.spans)
    assert ended or not parsed.calls
    assert not (parsed.error and parsed.calls)


def test_fingerprint_changes_with_each_thing_that_changes_ids(words):
    chats = [
        Chat(words),
        Chat(words, system=""),
        Chat(words, kwargs={"include_tools": False}),
        Chat(words, template=compact_template() + " "),
        Chat(build_word_tokenizer([*TEXTS, '{"status":"lost"}'])),
    ]
    assert len({chat.fingerprint for chat in chats}) == len(chats)
    assert Chat(build_word_tokenizer(reversed(TEXTS))).fingerprint == chats[0].fingerprint


def test_bad_tokenizers_and_templates_are_refused(words, byte_bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"no chat template.*chat\.template"):
        Chat(byte_bpe)
    with pytest.raises(ConfigError, match="drops or changes the content of an assistant turn"):
        Chat(words, template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"roles user, assistant, user \(no second user\)"):
        Chat(words, template="{{ raise_exception('no second user') if messages | length > 2 }}")
    with pytest.raises(ConfigError, match="Unexpected end of template"):
        Chat(words, template="{% for m in messages %}")
    with pytest.raises(ConfigError, match="no file"):
        Chat(words, template=str(tmp_path / "missing.jinja"))
    with pytest.raises(ConfigError, match="'tokenize' is set by opd-agents"):
        Chat(words, kwargs={"tokenize": True})
    no_end = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    with pytest.raises(ConfigError, match=r"as 'assistant: .*whose frame.*add_generation_prompt"):
        Chat(byte_bpe, template=no_end)
    no_end += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert Chat(byte_bpe, template=no_end).end_ids == {byte_bpe.eos_token_id}
    without_eos = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer)
    with pytest.raises(ConfigError, match="no eos_token"):
        Chat(without_eos, template=no_end)


def test_template_from_a_file(words, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(compact_template())
    assert Chat(words, template=str(path)).fingerprint == Chat(words).fingerprint


def test_word_tokenizer_pieces(words):
    def tokens(text):
        return words.convert_ids_to_tokens(words.encode(text))

    assert 120 < len(words) < 170
    assert tokens('{"orders":["7","k","2"]}') == ['{"orders":["', "7", '","', "k", '","', "2", '"]}']
    assert tokens('{"error":"timeout"}') == ['{"error":"', "timeout", '"}']
    assert tokens('{"order_id":"k","status":"out for delivery","total":12.5,"paid":true}') == [
        '{"order_id":"', "k", '","status":"', "out", " for", " delivery", '","total":', "1", "2", ".", "5",
        ',"paid":', "true", "}",
    ]  # fmt: skip
    # A name is the same token in prose and in JSON; what was never seen is spelt.
    assert tokens(PROMPT) == ["Customer ", "ana", " asks", " to", " settle", " every", " order", "."]
    assert tokens('"name":"anabel"')[-5:] == ["ana", "b", "e", "l", '"']
    assert tokens('{"customer_id":"x9ana"}') == ['{"customer_id":"', "x", "9", "ana", '"}']


def test_word_tokenizer_is_deterministic_and_saved_whole(words, tmp_path):
    words.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = build_word_tokenizer(sorted(TEXTS, reverse=True))
    for other in (loaded, again):
        assert other.get_vocab() == words.get_vocab() and other.chat_template == compact_template()
        assert (other.pad_token, other.unk_token, other.eos_token) == ("<|pad|>", "<unk>", "<|im_end|>")
        ids, conversation = play(Chat(other), EPISODE)
        assert list(ids) == other.apply_chat_template(conversation, return_dict=False)
    assert Chat(loaded).fingerprint == Chat(words).fingerprint


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_word_tokenizer_decodes_to_the_same_text(words, data):
    characters = st.text("\n\t" + "".join(map(chr, range(32, 127))), max_size=12)
    pieces = st.sampled_from(sorted(words.get_vocab()))  # prefixes of each other, glued in every order
    text = "".join(data.draw(st.lists(characters | pieces, max_size=8)))
    ids = words.encode(text)
    assert words.decode(ids) == text
    if "<unk>" not in text:
        assert words.unk_token_id not in ids
