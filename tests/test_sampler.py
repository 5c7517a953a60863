import dataclasses

import numpy as np
import pytest
import torch
from rolling import LIMITS, desk_episodes, rolled, sampler
from scipy.stats import chisquare

from opd_agents.batch import pack
from opd_agents.errors import AlignmentError
from opd_agents.frozen import check_behaviour, frozen_terms
from opd_agents.policies import History, reader
from opd_agents.policies.models import build_model, forward_flops
from opd_agents.policies.reader import common_length
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.types import Actor, Outcome, StopReason

ENDS = frozenset(range(14))  # a tenth of the vocabulary ends an action, so that rows end at different times
FIRST = 20  # contexts are drawn from here on
# Which episodes act in which round: they come, go and change places.
ROUNDS = [[0, 1, 2, 3, 4], [4, 2, 0, 1], [0, 1, 2, 3, 5], [5, 3, 1], [1]]


def history(ids, *, uid="e", stream=(7, 1, 0), max_tokens=8):
    return History(uid, stream, tuple(ids), (), max_tokens, env=None)


def ended_by_many(model, temperature=1.0, **options):
    return TransformersSampler(model, ENDS, actor=Actor.STUDENT, temperature=temperature, **options)


def converse(policy, edited=None):
    """All actions of ROUNDS; before round 2 episode ``edited`` gets another token in the middle."""
    random, ids, rounds = np.random.default_rng(0), {}, []
    for number, episodes in enumerate(ROUNDS):
        for e in episodes:
            ids[e] = ids.get(e, ()) + tuple(random.integers(FIRST, 100, random.integers(1, 9)).tolist())
        if number == 2 and edited is not None:
            ids[edited] = (*ids[edited][:3], 15, *ids[edited][4:])
        actions = policy.act([history(ids[e], uid=f"e{e}", stream=(7, 1, e)) for e in episodes])
        for e, action in zip(episodes, actions, strict=True):
            ids[e] += action.ids
        rounds.append(actions)
    return [action for actions in rounds for action in actions], rounds


@pytest.mark.parametrize("edited", [None, 1])
@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2}], ids=["tied", "untied", "gqa"]
)
def test_the_cache_kept_across_turns_changes_nothing(tiny_llama, fields, edited):
    model = tiny_llama(**fields)
    keeping, feeding = ended_by_many(model), ended_by_many(model, reuse=False)
    kept, rounds = converse(keeping, edited)
    fed, _ = converse(feeding, edited)
    assert [a.ids for a in kept] == [a.ids for a in fed]
    for one, other in zip(kept, fed, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert keeping.flops < 0.8 * feeding.flops
    assert all(len({len(a.ids) for a in actions}) > 1 for actions in rounds[:2])  # ends at different times
    assert {a.stop_reason for a in kept} == {StopReason.END, StopReason.LENGTH}


def test_log_probs_are_those_of_the_model_itself(tiny_llama):
    model = tiny_llama(num_key_value_heads=2, tie_word_embeddings=False)
    contexts = [list(range(20, 25 + 3 * e)) for e in range(4)]
    actions = ended_by_many(model, 0.8).act([history(c, stream=(0, 0, i)) for i, c in enumerate(contexts)])
    for context, action in zip(contexts, actions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + list(action.ids)])).logits[0].double() / 0.8
        expected = logits[len(context) - 1 : -1].log_softmax(-1)
        plain = [float(expected[i, token]) for i, token in enumerate(action.ids)]
        assert action.logprobs == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("change", ["none", "edit", "same", "shorter"])
def test_a_cached_row_is_used_only_if_it_is_a_proper_prefix(student, change):
    policy = ended_by_many(student)
    first = [history(range(20, 32), uid=u, max_tokens=1) for u in "ab"]
    policy.act(first)
    ids = {
        "none": (*range(20, 32), 50, 51),
        "edit": (20, 99, *range(22, 32), 50, 51),
        "same": tuple(range(20, 32)),
        "shorter": tuple(range(20, 29)),
    }[change]
    before = policy.flops
    second = [history(ids, uid="a", max_tokens=1), history((*range(20, 32), 60), uid="b", max_tokens=1)]
    actions = policy.act(second)
    fed = 1 + (2 if change == "none" else len(ids))  # b always goes on from its row
    assert policy.flops - before == pytest.approx(forward_flops(student, fed, (len(ids) + 13) / 2))
    fresh = ended_by_many(student, reuse=False).act(second)
    assert [a.ids for a in actions] == [a.ids for a in fresh]
    assert actions[0].logprobs == pytest.approx(fresh[0].logprobs, abs=1e-5)


def test_reset_forgets_the_cache_of_the_old_weights(tiny_llama):
    model = tiny_llama()
    policy = ended_by_many(model)
    ids = tuple(range(20, 30))
    policy.act([history(ids)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    policy.reset(policy_version=3)
    action = policy.act([history((*ids, 40))])[0]
    fresh = ended_by_many(model, reuse=False).act([history((*ids, 40))])[0]
    assert action.policy_version == 3
    assert action.ids == fresh.ids
    assert action.logprobs == pytest.approx(fresh.logprobs, abs=1e-6)


GEMMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.3,
}  # fmt: skip
BEGINNING = tuple(20 + (7 * i) % 80 for i in range(90))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_common_beginning_is_fed_once_and_changes_nothing(tiny_llama, desk_chat, monkeypatch, family):
    """Three episodes of one task, one of another, and what follows in later turns."""
    model = tiny_llama() if family == "llama" else build_model(family, GEMMA, desk_chat.tokenizer, 3)
    ends = [(30, 31), (30, 31), (30, 31), (40, 41, 42, 43, 44)]

    def three_turns(policy):
        rounds, ids = [], [BEGINNING + end for end in ends]
        for number in range(3):
            actions = policy.act([history(row, uid=str(e), stream=(7, 1, e)) for e, row in enumerate(ids)])
            ids = [row + a.ids + (50 + number,) for row, a in zip(ids, actions, strict=True)]
            rounds.append(actions)
        return [action for actions in rounds for action in actions]

    widths = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    shared = three_turns(once := ended_by_many(model))
    assert widths[:2] == [(1, 90), (4, 5)]
    monkeypatch.setattr(reader, "SHARED_TOKENS", 10**9)
    alone = three_turns(each := ended_by_many(model))
    assert [a.ids for a in shared] == [a.ids for a in alone]
    for one, other in zip(shared, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    spared = forward_flops(model, 3 * len(BEGINNING), (3 * 92 + 95) / 4)
    assert each.flops - once.flops == pytest.approx(spared, rel=1e-6)


def test_of_equal_prompts_all_but_the_last_token_is_shared(student):
    rows = [history(BEGINNING, uid=str(e), stream=(7, 1, e)) for e in range(3)]
    policy = ended_by_many(student)
    actions = policy.act(rows)
    fed = len(BEGINNING) - 1 + 3 + sum(len(a.ids) - 1 for a in actions)
    assert policy.flops == forward_flops(student, fed, len(BEGINNING))
    assert len({a.ids for a in actions}) > 1
    for row, action in zip(rows, actions, strict=True):
        alone = ended_by_many(student).act([row])[0]
        assert alone.ids == action.ids and alone.logprobs == pytest.approx(action.logprobs, abs=1e-5)


def test_the_common_length_leaves_each_row_a_token():
    assert common_length([(1, 2, 3), (1, 2, 3)]) == 2
    assert common_length([(1, 2, 3), (1, 2), (1, 2, 4)]) == 1
    assert common_length([(1, 5, 3), (1, 2, 3), (1, 2, 9)]) == 1
    assert common_length([(4, 2), (5, 2)]) == common_length([(4,), (4,)]) == 0


def test_prompts_that_are_rendered_anew_each_turn(student):
    """As a template does that drops past reasoning: no row goes on, some go on, all go on."""
    policy, fresh = ended_by_many(student), ended_by_many(student, reuse=False)
    ids = [(*BEGINNING, 30 + e) for e in range(4)]
    for again in ({0, 1, 2, 3}, {1, 3}, set(), {0, 1, 2, 3}, {2}):
        rows = [history(row, uid=str(e), stream=(7, 1, e)) for e, row in enumerate(ids)]
        actions, expected = policy.act(rows), fresh.act(rows)
        for one, other in zip(actions, expected, strict=True):
            assert one.ids == other.ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        said = [action.ids for action in actions]
        ids = [
            (*row[:-1], 60 + e) if e in again else row + said[e] + (70 + e, 71) for e, row in enumerate(ids)
        ]
    assert policy.flops < fresh.flops


def test_holes_do_not_pile_up_over_many_turns(tiny_llama):
    """In each turn another row gets a long observation; the cache stays near the length of the longest."""
    model, slots = tiny_llama(), []
    policy = ended_by_many(model)
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: slots.append(kwargs["attention_mask"].shape[-1]), with_kwargs=True
    )
    ids = [(20, 21 + e) for e in range(4)]
    for number in range(24):
        ids = [row + (50 + e,) * (15 if number % 4 == e else 1) for e, row in enumerate(ids)]
        rows = [history(row, uid=str(e), stream=(7, number, e), max_tokens=4) for e, row in enumerate(ids)]
        ids = [row + action.ids for row, action in zip(ids, policy.act(rows), strict=True)]
    fed_by_turns = 24 * (15 + 3)
    assert max(slots) <= max(map(len, ids)) / 0.75 + 15 + 4 < 0.75 * fed_by_turns


def test_a_call_that_fails_leaves_no_half_extended_cache(tiny_llama):
    model = tiny_llama()
    policy, fresh = ended_by_many(model), ended_by_many(model)
    ids = tuple(range(20, 30))
    policy.act([history(ids)])

    def fail(module, args):
        raise MemoryError

    hook = model.base_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        policy.act([history((*ids, 40))])
    hook.remove()
    assert policy.act([history((*ids, 40))])[0].logprobs == fresh.act([history((*ids, 40))])[0].logprobs


def test_a_cache_is_kept_until_it_is_released(student, desk_chat):
    policy = sampler(student, desk_chat)
    rolled(desk_episodes(3, max_turns=2), policy, desk_chat)
    assert policy.reader.keeps
    policy.release()
    assert not policy.reader.keeps


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_recorded_log_probs_are_those_that_the_trainer_scores(student, desk_chat, temperature):
    policy = sampler(student, desk_chat, temperature=temperature)
    trajectories = rolled(desk_episodes(6, max_turns=4), policy, desk_chat, temperature=temperature)
    packed = pack(trajectories)
    assert len(packed.target) > 100
    frozen = frozen_terms(student, packed, {}, temperature, max_tokens=400)
    torch.testing.assert_close(frozen.logprob, packed.behaviour, atol=1e-4, rtol=0)
    worst = check_behaviour(packed, trajectories, frozen, 0, 1e-4)
    assert worst == float((frozen.logprob - packed.behaviour).abs().max())
    other = frozen_terms(student, packed, {}, temperature * 1.1, max_tokens=400)
    with pytest.raises(AlignmentError, match="temperature"):
        check_behaviour(packed, trajectories, other, 0, 1e-3)


def test_other_weights_are_noticed_but_other_versions_and_actors_left_alone(tiny_llama, sampled):
    packed = pack(sampled)
    changed = tiny_llama(seed=1)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    frozen = frozen_terms(changed, packed, {}, 1.3, max_tokens=10_000)
    with pytest.raises(AlignmentError, match="weights"):
        check_behaviour(packed, sampled, frozen, 0, 1e-3)
    assert check_behaviour(packed, sampled, frozen, 1, 1e-3) == 0.0
    theirs = [
        dataclasses.replace(t, turns=tuple(dataclasses.replace(u, actor=Actor.TEACHER) for u in t.turns))
        for t in sampled
    ]
    assert check_behaviour(packed, theirs, frozen, 0, 1e-3) == 0.0


def test_a_nan_log_prob_is_refused(student, sampled):
    packed = pack(sampled)
    frozen = frozen_terms(student, packed, {}, 1.3, max_tokens=10_000)
    frozen.logprob[3] = float("nan")
    with pytest.raises(AlignmentError):
        check_behaviour(packed, sampled, frozen, 0, 1e-3)


def test_tokens_do_not_depend_on_who_shares_the_batch(student):
    many = [history(range(20, 22 + 2 * e), uid=str(e), stream=(3, 4, e), max_tokens=4 + e) for e in range(6)]
    together = ended_by_many(student).act(many)
    backwards = ended_by_many(student).act(many[::-1])[::-1]
    alone = [ended_by_many(student).act([one])[0] for one in many]
    renamed = ended_by_many(student).act([dataclasses.replace(h, uid=h.uid + "x") for h in many])
    for actions in (backwards, alone, renamed):
        assert [a.ids for a in actions] == [a.ids for a in together]


def test_draws_are_keyed_by_seed_step_episode_and_position_alone(tiny_llama):
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)  # every position then has the same distribution

    def tokens(ids, stream):
        return ended_by_many(model).act([history(ids, stream=stream)])[0].ids

    base = tokens(range(20, 30), (1, 2, 3))
    assert tokens(range(50, 60), (1, 2, 3)) == base  # other text, same place
    others = [
        tokens(range(20, 30), (2, 2, 3)),
        tokens(range(20, 30), (1, 3, 3)),
        tokens(range(20, 30), (1, 2, 4)),
        tokens(range(20, 31), (1, 2, 3)),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_tokens_are_drawn_with_their_probabilities(student, temperature):
    n, context = 3000, tuple(range(20, 24))
    histories = [history(context, uid=str(e), stream=(11, 2, e), max_tokens=1) for e in range(n)]
    actions = sampler_without_end(student, temperature).act(histories)
    counts = np.bincount([a.ids[0] for a in actions], minlength=student.config.vocab_size)
    with torch.no_grad():
        logits = student(torch.tensor([context])).logits[0, -1].double()

    def p_value(at):
        expected = (n * (logits / at).softmax(-1)).numpy()
        rare = expected < 5
        merged = lambda values: np.append(values[~rare], values[rare].sum())  # noqa: E731
        return chisquare(merged(counts), merged(expected)).pvalue

    assert p_value(temperature) > 0.01
    assert p_value(temperature * 1.3) < 1e-6  # the test would notice another temperature


def sampler_without_end(model, temperature):
    return TransformersSampler(model, frozenset({0}), actor=Actor.STUDENT, temperature=temperature)


def test_greedy_takes_the_most_probable_token(student):
    policy = ended_by_many(student, temperature=0.0)
    contexts = [list(range(20, 24)), list(range(40, 49))]
    actions = policy.act([history(ids, uid=str(i), stream=(1, 1, i)) for i, ids in enumerate(contexts)])
    for context, action in zip(contexts, actions, strict=True):
        ids = list(context)
        for _ in range(len(action.ids)):
            with torch.no_grad():
                ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids[len(context) :]) == action.ids
        assert set(action.logprobs) == {0.0}
        assert len(action.ids) == 8 or action.ids[-1] in ENDS


def test_each_row_has_its_own_limit(student):
    limits = [1, 3, 8, 8, 8, 20]
    histories = [history(range(20, 26), stream=(2, 2, e), max_tokens=m) for e, m in enumerate(limits)]
    policy = ended_by_many(student)
    actions = policy.act([dataclasses.replace(h, uid=str(i)) for i, h in enumerate(histories)])
    for action, limit in zip(actions, limits, strict=True):
        ended = action.ids[-1] in ENDS
        assert action.stop_reason is (StopReason.END if ended else StopReason.LENGTH)
        assert len(action.ids) <= limit and (ended or len(action.ids) == limit)
        assert not ENDS.intersection(action.ids[:-1])
    assert policy.generated_tokens == sum(len(a.ids) for a in actions)


def test_nobody_to_act_for(student):
    assert ended_by_many(student).act([]) == []


def test_the_context_limit_ends_an_episode_unfinished(student, desk_chat):
    cut_off = []
    for limit in (14, 17, 24, 80, 85, 90):
        limits = dataclasses.replace(LIMITS, max_context_tokens=limit)
        for one in rolled(desk_episodes(3), sampler(student, desk_chat), desk_chat, limits=limits):
            assert one.outcome is Outcome.UNFINISHED and one.error is None
            length = sum(len(t.context_ids) + len(t.action_ids) for t in one.turns)
            assert 0 < length <= limit
            stops = [t.stop_reason for t in one.turns]
            assert StopReason.CONTEXT not in stops[:-1]
            cut_off.append(stops[-1] is StopReason.CONTEXT)
            if stops[-1] is not StopReason.END:  # otherwise the next observation left no room
                assert cut_off[-1] == (length == limit)
    assert {True, False} == set(cut_off)
