"""A teacher with another tokenizer: what the two have in common, and what is learned from it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import families
import pytest
import test_weighting
import tiny
import torch
from rolling import desk_episodes, rolled, trajectory, turn
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.chat.templates import compact_template
from opd_agents.chat.token_bytes import TokenBytes, common_spans
from opd_agents.checking import check
from opd_agents.composition import compose
from opd_agents.config import EXPERIMENTS, Policy, ReferencePart, RunConfig, load_config
from opd_agents.episode import Limits
from opd_agents.errors import ConfigError
from opd_agents.judging.opinions import NOTHING_SAID
from opd_agents.objectives import ReferenceTerms
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.models import build_model, save_checkpoint
from opd_agents.teachers import SpanLogprobs
from opd_agents.teachers.aligned import AFTER, BYTES, CONTROLS, FORCED, READING, AlignedTeacher, Aligner
from opd_agents.teachers.local import ModelTeacher
from opd_agents.teachers.log_probs import log_probs
from opd_agents.teaching import check_references
from opd_agents.trainer import train
from opd_agents.types import Actor, Message, Span, SpanKind, Trajectory

CORPUS = [
    '<tool_call>{"name":"find_customer","arguments":{"email":"ada.lovelace@example.org"}}</tool_call>',
    '<tool_call>{"name":"refund_order","arguments":{"order_id":"A17","amount":42}}</tool_call>',
    '{"orders":["A17","B23"],"status":"shipped"} The customer wants her money back: na\u00efve \U0001f600.',
]


@cache
def byte_bpe(size: int, *, words: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of that many tokens; its merges may cross what are words to others."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"], chat_template=compact_template(),
    )  # fmt: skip


def byte_chat(size: int, *, words: bool = True) -> Chat:
    return Chat(byte_bpe(size, words=words), system="", kwargs={"include_tools": False})


def test_spans_are_cut_where_both_have_an_end() -> None:
    ours, theirs = common_spans([b"ab", b"c", b"", b"d", b"ef"], [b"a", b"bc", b"d", b"e", b"f"])
    assert (ours, theirs) == ([0, 0, 0, 1, 2], [0, 0, 1, 2, 2])
    assert common_spans([], []) == ([], [])


def test_spans_are_the_smallest_in_common() -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 30)))
        cuts = [
            sorted({len(text), *draw.choices(range(1, len(text) + 1), k=draw.randrange(9))}) for _ in "ab"
        ]
        pieces = [[text[a:b] for a, b in zip([0, *own], own, strict=False)] for own in cuts]
        spans = common_spans(*pieces)
        joined = [
            [b"".join(p for p, s in zip(*side, strict=True) if s == n) for n in range(max(side[1]) + 1)]
            for side in zip(pieces, spans, strict=True)
        ]
        assert joined[0] == joined[1] and len(joined[0]) == len(set(cuts[0]) & set(cuts[1]))


def gemma_like() -> PreTrainedTokenizerFast:
    """Words begin with U+2581, and characters that it lacks are bytes by name."""
    core = Tokenizer(models.BPE())
    core.train_from_iterator(
        [line.replace(" ", "\u2581") for line in CORPUS],
        trainers.BpeTrainer(vocab_size=80, show_progress=False),
    )
    learned = json.loads(core.to_str())["model"]
    named = [*learned["vocab"], "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(named)},
            [tuple(m) for m in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_tokens_of_every_kind_add_up_to_their_text(desk_chat: Chat) -> None:
    text = 'He said: {"order_id":"A17"}  \U0001f680 na\u00efve\n'
    for tokenizer in (
        byte_bpe(300),
        gemma_like(),
        families.tokenizer("qwen3"),
        families.tokenizer("llama3_1"),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(TokenBytes(tokenizer).of(ids)) == text.encode()
        assert any(len(piece) == 1 and piece > b"\x7f" for piece in TokenBytes(tokenizer).of(ids))
    plain = 'find "A17"'
    ids = desk_chat.tokenizer.encode(plain, add_special_tokens=False)
    assert b"".join(TokenBytes(desk_chat.tokenizer).of(ids)) == plain.encode()


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "b": 2, "7": 3, "{": 4}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="do not add up to the text"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"))


# ---- what a teacher says ----


@cache
def model(size: int, *, words: bool = True, spread: float = 0.3) -> Any:
    small = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": spread,
    }  # fmt: skip
    return build_model("llama", small, byte_bpe(size, words=words), 3)


def aligned(ours: Chat, theirs: Chat, teacher: Any) -> AlignedTeacher:
    return AlignedTeacher(ModelTeacher(teacher, theirs, 1.0), Aligner(ours, theirs))


def said(teacher: AlignedTeacher, episodes: Sequence[Trajectory]) -> tuple[SpanLogprobs, Tensor]:
    packed = pack(episodes)
    return teacher.score_episodes(packed, episodes, 4096, torch.ones(len(packed.target), dtype=torch.bool))


def scored(teacher: Any, ids: Sequence[int]) -> Tensor:
    """The log-prob of every token but the first, one pass of the whole model."""
    with torch.no_grad():
        logprobs = teacher(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return logprobs[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def experts(chat: Chat, n: int = 3) -> list[Trajectory]:
    return rolled(desk_episodes(n, max_turns=4), ExpertPolicy(), chat, limits=Limits(64, 4096))


def test_with_the_students_tokenizer_it_says_what_a_teacher_says(desk_chat: Chat, teacher: Any) -> None:
    episodes = experts(desk_chat)
    packed = pack(episodes)
    plain = log_probs(ModelTeacher(teacher, desk_chat, 1.0).score(packed, 4096), packed.target, 1.0)
    signal, taught = said(aligned(desk_chat, desk_chat, teacher), episodes)
    assert torch.equal(signal.logprobs, plain["logprobs"])
    assert bool(taught.all()) and not bool(signal.joined.any())


def test_spans_have_the_log_probs_of_the_teachers_own_tokens() -> None:
    """Against characters and offsets of the tokenizers themselves, turn by turn, and one plain pass a row."""
    ours, theirs = byte_chat(300), byte_chat(360, words=False)
    teacher, episodes = model(360, words=False), experts(ours)
    signal, taught = said(aligned(ours, theirs, teacher), episodes)
    assert bool(taught.all()) and 1.2 < len(signal.joined) / int((~signal.joined).sum()) < 20
    sums = torch.zeros(int(signal.spans.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, signal.spans, signal.logprobs.double())
    expected: list[float] = []
    for episode in episodes:
        ids, context = list[int](), theirs.prompt_ids(episode.messages[1:], (), "")
        for turn_ in episode.turns:
            ids += context
            start = len(ids)
            context = theirs.suffix_ids(turn_.messages, ended=True, calls=turn_.calls)
            text = ours.tokenizer.decode(list(turn_.action_ids[:-1]))
            assert text.isascii()
            encoded = [chat.tokenizer(text, return_offsets_mapping=True) for chat in (ours, theirs)]
            ids += [*encoded[1]["input_ids"], theirs.tokenizer.eos_token_id]
            own = scored(teacher, ids)[start - 1 :].tolist()
            ends = [[stop for _, stop in one["offset_mapping"]] for one in encoded]
            total = 0.0
            for value, end in zip(own, [*ends[1], None], strict=True):
                total += value
                if end is None or end in ends[0]:
                    expected.append(total)
                    total = 0.0
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-5)


def test_a_span_may_end_inside_a_character() -> None:
    """What both tokenizers cut between the same bytes is cut there, and all else is not."""
    ours, theirs = byte_chat(300), byte_chat(360, words=False)
    pieces = [TokenBytes(chat.tokenizer) for chat in (ours, theirs)]
    text = "Say \U0001f680\U0001f47d."
    action = ours.encode_action(text)
    found = Aligner(ours, theirs).align([spoken(ours, [action])])
    bytes_of = [
        b"".join(p for p, s in zip(pieces[side].of(ids), spans.tolist(), strict=True) if s == n)
        for side, ids, spans in ((0, action, found.ours), (1, found.packed.target.tolist(), found.theirs))
        for n in range(int(found.ours.max()) + 1)
    ]
    half = len(bytes_of) // 2
    assert bytes_of[:half] == bytes_of[half:] and b"".join(bytes_of[:half]) == (text + "<|im_end|>").encode()
    assert b"\x91" in bytes_of


def spoken(chat: Chat, actions: Sequence[Sequence[int]], **first: Any) -> Trajectory:
    """A recorded conversation without tools, with these actions."""
    prompt = chat.prompt_ids([Message("user", "Go.")], (), "")
    told = (Message("user", "On."),)
    turns = [
        turn(chat.suffix_ids(told, ended=True) if n else prompt, ids, messages=told, actor=Actor.CORPUS)
        for n, ids in enumerate(actions)
    ]
    turns[0] = dataclasses.replace(turns[0], **first)
    opening = (Message("user", "Go."),)
    return trajectory(turns, env_id="recorded", env_kwargs={"tools": []}, messages=opening)


# ---- what it is not asked about ----


def left_out(ours: Chat, theirs: Chat, episode: Trajectory) -> dict[str, int]:
    found = Aligner(ours, theirs).align([episode])
    assert sum(found.left_out.values()) == int((found.ours < 0).sum())
    assert len(found.theirs) == len(found.packed.target)
    return dict(found.left_out)


def test_what_the_teacher_cannot_be_shown_is_left_out_and_so_is_what_follows() -> None:
    """Half a character; a control token of one side, spelled or sampled; calls in another syntax."""
    ours, theirs, end = byte_chat(300), byte_chat(360, words=False), byte_chat(300).tokenizer.eos_token_id
    good = ours.encode_action("Yes.")
    half = (ours.tokenizer.convert_tokens_to_ids("\u00f0"), end)  # the first byte of four
    begins = (ours.tokenizer.convert_tokens_to_ids("<|im_start|>"), *good)
    for bad, why in ((half, BYTES), ((*good[:-1], *begins), None), (good, None)):
        expected = {why: len(bad), AFTER: len(good)} if why else {}
        assert left_out(ours, theirs, spoken(ours, [good, bad, good])) == expected
    qwen, llama = families.chat("qwen2_5"), families.chat("llama3_1")
    assert left_out(qwen, llama, spoken(qwen, [qwen.encode_action("Yes.")])) == {}
    spelled = (*qwen.tokenizer.encode("<|eot_id|>"), qwen.tokenizer.eos_token_id)
    assert left_out(qwen, llama, spoken(qwen, [spelled])) == {CONTROLS: len(spelled)}
    sampled = (qwen.tokenizer.convert_tokens_to_ids("<|im_start|>"), qwen.tokenizer.eos_token_id)
    assert left_out(qwen, llama, spoken(qwen, [sampled])) == {CONTROLS: 2}
    call = qwen.encode_action('{"name":"look","arguments":{}}')
    assert left_out(qwen, llama, called(qwen, call)) == {READING: len(call)}
    assert left_out(qwen, families.chat("qwen3_instruct_2507"), called(qwen, call)) == {}
    thinking = families.chat("qwen3").encode_action(
        "Yes."
    )  # behind an empty thought, which is text to others
    assert left_out(families.chat("qwen3"), llama, spoken(families.chat("qwen3"), [thinking])) == {
        READING: len(thinking)
    }


def called(chat: Chat, action: Sequence[int]) -> Trajectory:
    """A recorded conversation with a tool."""
    tools = [{"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}]
    return dataclasses.replace(spoken(chat, [action]), env_kwargs={"tools": tools})


def test_spans_with_tokens_that_nobody_chose_are_left_out() -> None:
    ours, theirs = byte_chat(300), byte_chat(360, words=False)
    action = ours.encode_action("The customer wants her money back.")
    whole = Aligner(ours, theirs).align([spoken(ours, [action])])
    forced = dataclasses.replace(
        spoken(ours, [action]).turns[0], logprobs=None,
        spans=(Span(SpanKind.TEXT, 0, 1), Span(SpanKind.FORCED, 1, 3), Span(SpanKind.TEXT, 3, len(action))),
    )  # fmt: skip
    found = Aligner(ours, theirs).align([dataclasses.replace(spoken(ours, [action]), turns=(forced,))])
    cut = set(whole.ours[1:3].tolist())
    chosen = torch.cat([whole.ours[:1], whole.ours[3:]])
    expected = torch.tensor([-1 if span in cut else span for span in chosen.tolist()])
    assert torch.equal(found.ours, expected) and found.left_out[FORCED] == int((expected < 0).sum()) > 0
    assert not set(found.theirs.tolist()) & cut


def test_tokens_that_are_left_out_are_counted_and_have_no_advantage() -> None:
    ours, theirs = byte_chat(300), byte_chat(360, words=False)
    good = ours.encode_action("Yes.")
    half = (ours.tokenizer.convert_tokens_to_ids("\u00f0"), ours.tokenizer.eos_token_id)
    signal, taught = said(aligned(ours, theirs, model(360, words=False)), [spoken(ours, [good, half])])
    assert taught.tolist() == [True] * len(good) + [False, False]
    assert bool((signal.logprobs[: len(good)] < 0).all()) and not bool(signal.logprobs[len(good) :].any())
    nothing, none = said(aligned(ours, theirs, model(360, words=False)), [spoken(ours, [half])])
    assert not bool(none.any()) and not bool(nothing.joined.any())


# ---- what is learned ----

ALPHABET, LENGTH = 2, 2  # tokens a and b, in each of two turns


def advantages(part: dict[str, Any], q: Tensor, p: Tensor, spans: Tensor) -> Tensor:
    """Of the tokens of one episode, from the student's log-probs and the teacher's in equal shares."""
    size = len(q)
    component = Policy(kind="policy", references={"teacher": ReferencePart(**part)})
    inputs = dataclasses.replace(
        test_weighting.made(), target=torch.arange(size), turn=torch.arange(size) // LENGTH,
        episode=torch.zeros(size, dtype=torch.int64), selected=torch.ones(size, dtype=torch.bool), logprob=q,
        references={"teacher": ReferenceTerms(p, None, None, None)}, spans={"teacher": spans},
        **dict.fromkeys(("entropy", "score", "verdict", "agreement"), torch.zeros(size)),
    )  # fmt: skip
    packed: Any = None  # of rewards alone
    return compose(component, packed, [], inputs, float, {}, NOTHING_SAID).advantage


def gradients(merges: set[str], part: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """That of KL(q || p) of whole episodes, and the policy gradient's mean over all episodes; p reads the
    text of a turn with ``merges``, so that one of its tokens is several of the student's."""
    random_ = torch.Generator().manual_seed(2)
    table = torch.randn(2**5, ALPHABET, generator=random_, dtype=torch.float64, requires_grad=True)
    of_teacher = dict[tuple[str, str], float]()

    def p(history: str, token: str) -> float:
        tokens = ["a", "b", *sorted(merges)]
        if (history, token) not in of_teacher:
            drawn = torch.randn(len(tokens), generator=random_, dtype=torch.float64).log_softmax(-1)
            of_teacher.update({(history, t): float(v) for t, v in zip(tokens, drawn, strict=True)})
        return of_teacher[history, token]

    exact, estimate = torch.zeros((), dtype=torch.float64), torch.zeros_like(table)
    for episode in product(range(ALPHABET), repeat=2 * LENGTH):
        place, log_q = 1, list[Tensor]()
        for token in episode:
            log_q.append(table[place].log_softmax(-1)[token])
            place = 2 * place + token
        text = "".join("ab"[token] for token in episode)
        shares, spans = list[float](), list[int]()
        for start in (0, LENGTH):
            said_ = text[start : start + LENGTH]
            for piece in [said_] if said_ in merges else list(said_):
                at = len(shares)
                shares += [p(text[:at], piece) / len(piece)] * len(piece)
                spans += [max(spans, default=-1) + 1] * len(piece)
        q, told = torch.stack(log_q), torch.tensor(shares, dtype=torch.float64)
        probability = q.sum().exp()
        exact = exact + probability * (q.sum() - told.sum())
        advantage = advantages(part, q.detach(), told, torch.tensor(spans))
        estimate -= (
            probability.detach() * torch.autograd.grad((advantage * q).sum(), table, retain_graph=True)[0]
        )
    return torch.autograd.grad(exact, table)[0], estimate


def test_whole_turns_give_the_gradient_of_the_reverse_kl_of_episodes() -> None:
    """Exactly, however the teacher cuts the text. Spans do where a cut shows in what stands before it."""
    whole = {"unit": "turn", "discount": 1.0}
    for merges in (set[str](), {"ab"}, {"ab", "bb"}, {"aa", "ab", "ba", "bb"}):
        exact, estimate = gradients(merges, whole)
        torch.testing.assert_close(estimate, exact, atol=1e-9, rtol=1e-9)
        exact, estimate = gradients(merges, {"discount": 1.0})
        certain = len(merges) in (0, 4)  # nothing is merged, or all of a turn
        gap = float((estimate - exact).abs().max())
        assert gap < 1e-9 if certain else 1e-3 < gap < float(exact.abs().max())


def test_every_token_of_a_span_has_its_whole_d() -> None:
    q, p = -torch.rand(4, generator=torch.Generator().manual_seed(0)), torch.tensor([-1.0, -1, -0.5, -2])
    spans, d = torch.tensor([0, 0, 1, 2]), p - q
    own = [d[0] + d[1], d[0] + d[1], d[2], d[3]]
    torch.testing.assert_close(advantages({}, q, p, spans), torch.stack(own))
    later = [d.sum(), d.sum(), d[2] + d[3], d[3]]
    torch.testing.assert_close(advantages({"discount": 1.0}, q, p, spans), torch.stack(later))
    turns = [d[:2].sum()] * 2 + [d[2:].sum()] * 2
    torch.testing.assert_close(advantages({"unit": "turn"}, q, p, spans), torch.stack(turns))


# ---- a run ----

ALIGNED = {"model": "x", "align": "bytes"}
SAMPLED = {"kind": "policy", "references": {"teacher": {}}, "clip_low": None, "clip_high": None}


@pytest.fixture
def desk(tmp_path: Path) -> Callable[..., RunConfig]:
    """The OrderDesk's student, who writes words, and a teacher of nothing yet who reads bytes."""
    save_checkpoint(tmp_path / "teacher", model(300, spread=0.02), byte_bpe(300), tiny.BRIEF)

    def made(*overrides: str, **changes: Any) -> RunConfig:
        raw: dict[str, Any] = {
            "name": "aligned", "output": str(tmp_path / "run"), "chat": tiny.BRIEF,
            "student": {"model": str(EXPERIMENTS / "orderdesk_student")},
            "teacher": {"model": str(tmp_path / "teacher"), "align": "bytes"}, "environments": [tiny.DESK],
            "rollout": {"episodes_per_step": 4, "max_tokens_per_turn": 16, "max_context_tokens": 256},
            "loss": {"components": {"distill": SAMPLED}},
            "trainer": {"steps": 2, "learning_rate": 0.001, "tensorboard": False},
        }  # fmt: skip
        return load_config(raw | changes, *overrides)

    return made


def test_a_run_learns_from_a_teacher_of_other_words(desk: Callable[..., RunConfig]) -> None:
    rows = tiny.metrics(train(desk()))
    for row in rows:
        assert row["taught/teacher"] > 0.8 and 1 < row["span_tokens/teacher"] < 4
        assert row["distill/log_ratio"] > 1 and row["grad_norm"] > 0
    step = desk().folder / "trajectories" / "step-000001.jsonl"
    credits = json.loads(step.read_text().splitlines()[0])["credit"]
    assert all(one["teacher_logprob"] < 0 for one in credits)


def test_check_says_what_is_aligned(desk: Callable[..., RunConfig]) -> None:
    [stage] = check(desk(), episodes=2)
    says = [finding.says for finding in stage.findings if finding.about == "teacher"]
    assert stage.passed and re.search(r"have \d+ spans in common, of \d+ action tokens$", says[0])
    assert len(says) == 2 and "each scored on what stands before it" in says[1]
    assert stage.memory["teachers"] > 0


def test_check_names_what_is_not(desk: Callable[..., RunConfig]) -> None:
    """The student's calls are written otherwise."""
    [stage] = check(desk("chat.syntax=llama_json"), episodes=2)
    [wrong] = [finding.says for finding in stage.findings if finding.passed is False]
    assert READING in wrong and "one syntax of calls" in wrong


WEIGHED = {"teacher": {"gates": [{"kind": "turn_disagreement"}]}}


def component(**fields: Any) -> dict[str, Any]:
    return {"loss": {"components": {"distill": fields}}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chat": tiny.BRIEF | {"history": "template"}}, "take chat.history: append"),
        ({"rollout": {"temperature": 0.7}}, r"take rollout.temperature: 1"),
        ({"teacher": ALIGNED | {"conditioning": {"sources": ["expert"]}}}, "drop `conditioning`"),
        (
            {"teacher": {"kind": "ensemble", "members": {"a": ALIGNED, "b": {"model": "y"}}}},
            r"members.a.align.*have no mixture.*under `references`",
        ),
        ({"teacher": {"kind": "cached", "cache": "c", "of": ALIGNED}}, r"of.align.*own tokens"),
        (component(kind="distill"), r"its full distributions.*`span_logprobs`.*with `references`"),
        (
            component(kind="distill", signal="sampled", estimator="k1", ratio="live"),
            r"log-probs of the sampled tokens.*`span_logprobs`",
        ),
        (component(kind="policy", references=WEIGHED), "log-probs of the sampled tokens"),
        (
            {"rollout": {"source": {"student": 0.5, "expert": 0.1, "teacher": 0.4}}} | component(kind="ce"),
            "actions",
        ),
    ],
)
def test_what_spans_cannot_give_is_refused(
    changes: dict[str, Any], says: str, desk: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        check_references(desk(**changes))


def test_without_align_another_tokenizer_is_refused(desk: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"another vocabulary .*align: bytes"):
        train(desk("teacher.align=null"))
