import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from engine import component, planned
from rolling import desk_episodes, rolled, sampler, trajectory, turn
from thinking import byte_tokenizer, chat_of, published

from opd_agents.batch import pack
from opd_agents.composition import selected
from opd_agents.config import Select, load_config
from opd_agents.credit import assign_credit
from opd_agents.episode import Limits
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.evaluation.contestants import load_contestant
from opd_agents.experience import Experience
from opd_agents.frozen import check_behaviour, frozen_terms
from opd_agents.loss import micro_losses
from opd_agents.policies import Action, History
from opd_agents.policies.models import (
    build_model,
    head,
    hidden_states,
    load_chat,
    load_tokenizer,
    save_checkpoint,
)
from opd_agents.report.curves import stage_charts
from opd_agents.teachers import HiddenStates
from opd_agents.trainer import train
from opd_agents.types import Actor, Span, SpanKind, StopReason

BUDGET = 5
SMALL = tiny.BUILD["config"] | {"max_position_embeddings": 4096, "initializer_range": 0.2}
LIMITS = Limits(max_tokens_per_turn=24, max_context_tokens=4000)


@pytest.fixture(scope="module")
def chat():
    return chat_of("qwen3_5_think", thinking_budget=BUDGET)


@pytest.fixture(scope="module")
def model():
    return build_model("llama", SMALL, byte_tokenizer(), seed=3)


@pytest.fixture(scope="module")
def closing(chat):
    return tuple(chat.tokenizer.encode("\n</think>\n\n"))


def histories(chat, texts, *, max_tokens=24):
    return [
        History(f"e{i}", (7, 1, i), tuple(chat.tokenizer.encode(text)), (), max_tokens, env=None)
        for i, text in enumerate(texts)
    ]


OPEN = "<|im_start|>assistant\n<think>\n"
SHUT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_used_up_budget_closes_the_thought_and_touches_no_other_row(chat, model, closing, temperature):
    texts = [OPEN, SHUT, "a" + OPEN, "b" + SHUT]
    free = sampler(model, chat, temperature=temperature)
    bound = sampler(model, chat, temperature=temperature, thinking=chat.thinking)
    before, after = free.act(histories(chat, texts)), bound.act(histories(chat, texts))
    close = (BUDGET, BUDGET + len(closing))
    for text, one, other in zip(texts, before, after, strict=True):
        assert one.forced == ()
        if text.endswith(SHUT) and not other.forced:
            assert one == other
            continue
        assert len(one.ids) > BUDGET and other.forced == (close,)
        assert other.ids[:BUDGET] == one.ids[:BUDGET] and other.logprobs[:BUDGET] == one.logprobs[:BUDGET]
        assert other.ids[slice(*close)] == closing and other.logprobs[slice(*close)] == (0.0,) * len(closing)
        assert temperature == 0 or 0.0 not in other.logprobs[close[1] :]
    assert sum(bool(action.forced) for action in after) == 2
    forced = sum(b - a for action in after for a, b in action.forced)
    assert bound.generated_tokens == sum(len(action.ids) for action in after) - forced
    assert free.generated_tokens == sum(len(action.ids) for action in before)


def test_what_follows_a_forced_closing_depends_on_it_through_the_cache(chat, model):
    """The next turn goes on from the cached ids, the forced ones included."""
    cached, fresh = (sampler(model, chat, thinking=chat.thinking, reuse=reuse) for reuse in (True, False))
    first = histories(chat, [OPEN])
    ids = first[0].ids + cached.act(first)[0].ids + tuple(chat.tokenizer.encode("<|im_end|>" + OPEN))
    fresh.act(first)
    second = [dataclasses.replace(first[0], ids=ids)]
    one, other = cached.act(second)[0], fresh.act(second)[0]
    assert one.ids == other.ids and one.forced and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_limit_of_tokens_may_cut_a_closing(chat, model, closing):
    policy = sampler(model, chat, thinking=chat.thinking)
    (action,) = policy.act(histories(chat, [OPEN], max_tokens=BUDGET + 1))
    assert action.ids[BUDGET:] == closing[:1] and action.forced == ((BUDGET, BUDGET + 1),)
    assert action.stop_reason is StopReason.LENGTH and policy.generated_tokens == BUDGET
    parsed = chat.parse(action.ids, ended=False, forced=action.forced)
    assert (
        parsed.spans[-1] == Span(SpanKind.FORCED, BUDGET, BUDGET + 1) and "inside a thought" in parsed.error
    )


@pytest.fixture(scope="module")
def episodes(chat, model):
    policy = sampler(model, chat, thinking=chat.thinking)
    return rolled(desk_episodes(3, max_turns=3), policy, chat, limits=LIMITS)


def forced_places(trajectories):
    """(row, position) of every forced id, by a plain loop."""
    for row, one in enumerate(trajectories):
        length = 0
        for step in one.turns:
            length += len(step.context_ids)
            yield from ((row, length + i) for a, b in step.forced for i in range(a, b))
            length += len(step.action_ids)


def test_forced_ids_stand_in_rows_and_in_nothing_that_is_counted(chat, model, episodes, closing):
    packed, places = pack(episodes), set(forced_places(episodes))
    assert len(places) >= len(closing) * sum(len(t.turns) for t in episodes)
    table = set(zip(packed.row.tolist(), packed.position.tolist(), strict=True))
    assert not table & places
    written = sum(len(t.action_ids) for one in episodes for t in one.turns)
    assert len(packed.target) == written - len(places) == sum(t.n_action_tokens for t in episodes)
    for row, position in places:
        assert int(packed.rows[row][position]) in closing
    assert float(packed.per_turn(torch.ones(len(packed.target))).sum()) == len(packed.target)
    frozen = frozen_terms(model, packed, {}, 1.0, 10_000)
    assert check_behaviour(packed, episodes, frozen, 0, 1e-3) < 1e-3
    assert len(assign_credit(packed, episodes, frozen, {}, {})) == len(episodes)


def test_a_forced_id_has_no_gradient(chat, model, episodes):
    """Only states before chosen tokens get one: not those that predict forced ids."""
    components = {"ce": component(kind="ce"), "distill": component(kind="distill")}
    packed = pack(episodes)
    with torch.no_grad():
        states = [hidden_states(model, row[None])[0] for row in packed.rows]
    hidden = torch.stack([states[r][p - 1] for r, p in zip(packed.row, packed.position, strict=True)])
    signal = HiddenStates(hidden + 0.1 * torch.sin(hidden), head(model))
    everything, signals = torch.ones(len(packed.target), dtype=torch.bool), {"teacher": signal}
    frozen = frozen_terms(model, packed, signals, 1.0, 10_000)
    experience = Experience(tuple(episodes), packed, signals, {}, frozen, everything)
    todo = planned(experience, components, temperature=1.0)
    seen = []
    hook = model.model.norm.register_forward_hook(
        lambda module, args, out: (out.retain_grad(), seen.append(out))[1]
    )
    reached = set()
    for row in range(len(packed.rows)):
        (micro,) = packed.micro_batches(10_000, packed.row == row)
        seen.clear()
        sum(micro_losses(model, packed, micro, todo, signals, 1.0).values()).backward()
        reached |= {(row, int(p) + 1) for p in seen[0].grad.ne(0).any(-1)[0].nonzero()}
    hook.remove()
    model.zero_grad()
    assert reached == set(zip(packed.row.tolist(), packed.position.tolist(), strict=True))
    assert not reached & set(forced_places(episodes))


def test_a_turn_gives_its_action_back_as_it_was(chat, episodes):
    """As a repair's student arm repeats it: forced ids stay forced."""
    for step in episodes[0].turns:
        again = Action(step.actor, step.stop_reason, step.action_ids, step.logprobs, forced=step.forced)
        assert again.n_sampled == step.n_chosen < len(step.action_ids)
        parsed = chat.parse(
            again.ids, ended=step.stop_reason is StopReason.END, context_ids=step.context_ids,
            forced=again.forced,
        )  # fmt: skip
        assert parsed.spans == step.spans and SpanKind.FORCED in {span.kind for span in step.spans}


KINDS = [SpanKind.THINK, SpanKind.FORCED, SpanKind.TEXT, SpanKind.CALL, SpanKind.SPECIAL]


def spanned(seed=0, n=6):
    """Trajectories of random spans of 1 or 2 tokens, of two actors."""
    random = np.random.default_rng(seed)

    def one(index):
        sizes = random.integers(1, 3, 5)
        edges = [0, *np.cumsum(sizes).tolist()]
        order = random.permutation(5).tolist()
        spans = tuple(Span(KINDS[k], edges[i], edges[i + 1]) for i, k in enumerate(order))
        ids = random.integers(10, 99, edges[-1]).tolist()
        return turn([1, 2], ids, spans=spans, actor=[Actor.STUDENT, Actor.TEACHER][index % 2])

    return [trajectory([one(i) for i in range(3)], uid=str(k)) for k in range(n)]


@pytest.mark.parametrize("kinds", [["think"], ["call", "text"], ["special"], None])
def test_a_component_sees_the_spans_that_it_selects(kinds):
    trajectories = spanned()
    packed = pack(trajectories)
    weights = selected(packed, trajectories, Select(spans=kinds, actor="student")).tolist()
    expected = [
        float(t.actor is Actor.STUDENT and (kinds is None or span.kind.value in kinds))
        for one in trajectories
        for t in one.turns
        for span in t.spans
        for _ in range(span.start, span.stop)
        if span.kind is not SpanKind.FORCED
    ]
    assert weights == expected and 0 < sum(weights) < len(weights)


def test_actions_without_spans_cannot_be_selected_by_them():
    bare = [trajectory([turn([1], [2, 3])])]
    with pytest.raises(AlignmentError, match="recorded without spans"):
        selected(pack(bare), bare, Select(spans=["call"]))
    assert selected(pack(bare), bare, Select()).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"components": {"x": {"kind": "ce", "select": {"spans": ["forced"]}}}}}, "never trained"),
        ({"loss": {"components": {"x": {"kind": "ce", "select": {"spans": []}}}}}, "select nothing"),
        ({"chat": {"thinking_budget": 256}}, "leaves no room for an action"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, changes, message):
    raw = {"name": "x", "method": "sft", "student": {"model": "s"}, "environments": [{"id": "e"}]}
    with pytest.raises(ConfigError, match=message):
        load_config(raw | changes)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, model):
    """A folder with two checkpoints that think in bytes, ``student`` and ``teacher``."""
    folder = tmp_path_factory.mktemp("thinker")
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = published("qwen3_5_think")
    save_checkpoint(folder / "student", model, tokenizer, {})
    save_checkpoint(folder / "teacher", build_model("llama", SMALL, tokenizer, seed=4), tokenizer, {})
    return folder


def run_config(thinker, output, **changes):
    raw = {
        "name": "thinks", "output": str(output), "imports": ["tiny"],
        "student": {"model": str(thinker / "student")}, "teacher": {"model": str(thinker / "teacher")},
        "chat": {"thinking_budget": BUDGET},
        "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {"episodes_per_step": 4, "max_tokens_per_turn": 24, "max_context_tokens": 600},
        "trainer": {"steps": 1, "tensorboard": False},
        "loss": {"components": {"distill": {"kind": "distill"}}},
    }  # fmt: skip
    return load_config(raw | changes)


def test_a_run_counts_spans_and_its_checkpoint_thinks_with_the_same_budget(thinker, tmp_path):
    run = train(run_config(thinker, tmp_path / "run"))
    (row,) = tiny.metrics(run)
    counts = {kind: row.get(f"rollout/{kind}_tokens", 0) for kind in ("think", "call", "text", "special")}
    assert sum(counts.values()) == row["rollout/generated_tokens"] == row["total/generated_tokens"]
    assert row["rollout/forced_tokens"] >= 4 * 4 and counts["think"] >= 4 * BUDGET
    kl = sum(n * row[f"distill/kl_{kind}"] for kind, n in counts.items() if n)
    assert kl / row["rollout/generated_tokens"] == pytest.approx(row["distill/kl"], rel=1e-5)
    assert row["distill/kl_think"] > 0 and "distill/kl_forced" not in row
    contestant = load_contestant(str(run), 1.0)
    assert contestant.chat.thinking_budget == BUDGET
    assert contestant.sampled.thinking is contestant.greedy.thinking is contestant.chat.thinking is not None
    saved = json.loads((run / "checkpoints/step-1/opd_agents_chat.json").read_text())
    assert saved["thinking_budget"] == BUDGET


def test_the_report_shows_thought_where_there_is_any():
    rows = [
        {"step": i, "distill/kl": 1.0, "distill/kl_think": 2.0, "rollout/think_tokens": i} for i in (1, 2)
    ]
    plain = [{"step": i, "distill/kl": 1.0, "distill/kl_text": 2.0, "rollout/text_tokens": i} for i in (1, 2)]
    stages = [SimpleNamespace(metrics=metrics, config={}) for metrics in (rows, plain)]
    thinks, plain = (
        [(c.title, [line.label for line in c.lines]) for c in stage_charts([s], "x")] for s in stages
    )
    assert ("KL per student token, in nats", ["KL", "think"]) in thinks
    assert ("Tokens that the model wrote in a step", ["think"]) in thinks
    assert plain == [("KL per student token, in nats", ["KL"])]


def test_components_of_all_spans_add_up_to_one_without(thinker, tmp_path):
    spans = {"thought": ["think"], "rest": ["text", "call", "special"]}
    fixed = {"kind": "distill", "denominator": "constant", "constant": 100.0}
    parts = {name: fixed | {"select": {"spans": kinds}} for name, kinds in spans.items()}
    (apart,) = tiny.metrics(train(run_config(thinker, tmp_path / "a", loss={"components": parts})))
    (whole,) = tiny.metrics(train(run_config(thinker, tmp_path / "b", loss={"components": {"all": fixed}})))
    assert apart["loss/thought"] > 0 and apart["loss/rest"] > 0
    assert apart["loss/thought"] + apart["loss/rest"] == pytest.approx(whole["loss/all"], rel=1e-5)
    assert apart["loss/thought"] == pytest.approx(
        apart["distill/kl_think"] * apart["rollout/think_tokens"] / 100, rel=1e-4
    )


def test_thought_alone_is_refused_where_none_is_marked(thinker, tmp_path, model):
    folder = tmp_path / "plain"
    tokenizer = load_tokenizer(str(thinker / "student"))
    tokenizer.chat_template = published("qwen2_5")
    save_checkpoint(folder, model, tokenizer, {})
    loss = {"components": {"x": {"kind": "ce", "select": {"spans": ["think"]}}}}
    config = run_config(thinker, tmp_path / "run", chat={}, loss=loss, student={"model": str(folder)})
    with pytest.raises(ConfigError, match=r"components\.x\.select\.spans.*marks no thought"):
        train(config)
    assert load_chat(str(folder), tokenizer).thought is None
