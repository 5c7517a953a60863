"""The formulas of weights and gates, against loops in plain Python, scipy, and their identities."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_agents.errors import ConfigError
from opd_agents.objectives import weights

Shape = list[list[int]]  # tokens of each turn of each episode
SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**16)


def table(shape: Shape) -> tuple[Tensor, Tensor]:
    """Turns, numbered over the batch, and episodes of each token."""
    flat = [(e, tokens) for e, episode in enumerate(shape) for tokens in episode]
    turns = torch.tensor([t for t, (_, tokens) in enumerate(flat) for _ in range(tokens)])
    return turns, torch.tensor([e for e, tokens in flat for _ in range(tokens)])


def normal(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def by_turn(values: Tensor, shape: Shape) -> list[list[list[float]]]:
    """The values as episodes of turns of tokens."""
    rest = iter(values.tolist())
    return [[list(itertools.islice(rest, tokens)) for tokens in episode] for episode in shape]


def spread(per_turn: list[list[float]], shape: Shape) -> list[float]:
    pairs = [
        (v, n) for own, sizes in zip(per_turn, shape, strict=True) for v, n in zip(own, sizes, strict=True)
    ]
    return [value for value, tokens in pairs for _ in range(tokens)]


def test_soft_or_scores_are_tips_formula() -> None:
    entropy, kl = normal(0, 200).exp(), normal(1, 200).exp()
    h = np.minimum(entropy.numpy(), np.quantile(entropy.numpy(), 0.98))
    h, d = ((x - x.min()) / (x.max() - x.min()) for x in (h, kl.numpy()))
    scores = weights.soft_or_scores(entropy, kl)
    np.testing.assert_allclose(scores.numpy(), h + d - h * d, rtol=1e-12)
    # the scale of entropies (H or H / ln V) and of divergences does not matter
    torch.testing.assert_close(weights.soft_or_scores(entropy / math.log(32000), 7 * kl + 1), scores)
    # one outlier does not flatten the others
    wild = torch.cat([entropy, torch.tensor([1e9], dtype=torch.float64)])
    assert weights.soft_or_scores(wild, torch.zeros(201))[:-1].median() > 0.1


def test_scores_that_do_not_differ_say_nothing() -> None:
    same, kl = torch.full((7,), 0.3), normal(0, 7)
    torch.testing.assert_close(weights.soft_or_scores(same, kl), weights.scaled(kl))
    assert weights.scaled(same).tolist() == [0.0] * 7


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS, st.floats(0.01, 1))
def test_top_share_keeps_the_best_of_each_episode(shape: Shape, seed: int, share: float) -> None:
    turns, episodes = table(shape)
    scores = normal(seed, len(turns)).round(decimals=1)  # ties
    chosen = weights.top_share(scores, episodes, share)
    for episode, own in enumerate(by_turn(scores, shape)):
        values = [value for turn in own for value in turn]
        kept = max(1, math.floor(share * len(values) + 1e-9))
        best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:kept]
        assert set(chosen[episodes == episode].nonzero().squeeze(1).tolist()) == set(best)


def test_top_share_of_29_percent_of_100_tokens_is_29() -> None:
    assert weights.top_share(torch.rand(100), torch.zeros(100, dtype=torch.int64), 0.29).sum() == 29


def test_pass_rates_count_the_groups_own_rollouts() -> None:
    groups = torch.tensor([4, 4, 4, 4, 9, 9, -1, 2])
    success = torch.tensor([True, False, True, True, False, False, True, True])
    counted = torch.tensor([True, True, True, False, True, True, True, False])
    rates = weights.pass_rates(success, groups, counted)
    np.testing.assert_array_equal(rates.numpy(), [2 / 3, 2 / 3, 2 / 3, 2 / 3, 0, 0, np.nan, np.nan])


@pytest.mark.parametrize("prefer", ["high", "low"])
def test_perplexity_weights_are_a_softmax_over_each_group(prefer: Literal["high", "low"]) -> None:
    sizes = [[2, 1], [4], [1], [3, 2], [2], [1]]
    groups = [7, 7, 3, 7, -1, -1]
    turns, episodes = table(sizes)
    logprob = -normal(3, len(turns)).exp()
    found = weights.perplexity_weights(
        logprob, episodes, torch.tensor(groups), prefer=prefer, temperature=0.7
    )
    log_perplexity = [-float(logprob[episodes == e].mean()) for e in range(6)]
    sign = 1 if prefer == "high" else -1
    own = [log_perplexity[e] for e in (0, 1, 3)]
    soft = scipy.special.softmax([sign * x / 0.7 for x in own]) * 3
    # PPL^(1 / tau), normalised, times the group's episodes: the paper's weights times their number
    direct = np.exp(own) ** (sign / 0.7)
    np.testing.assert_allclose(soft, 3 * direct / direct.sum(), rtol=1e-12)
    for episode, expected in zip((0, 1, 3, 2, 4, 5), [*soft, 1.0, 1.0, 1.0], strict=True):
        np.testing.assert_allclose(found[episodes == episode].numpy(), expected, rtol=1e-12)


def test_perplexity_weights_of_hopeless_episodes_are_finite() -> None:
    logprob, groups = torch.tensor([-1e4, -1.0, -2e4]), torch.zeros(3, dtype=torch.int64)
    high = weights.perplexity_weights(logprob, torch.arange(3), groups, prefer="high", temperature=1.0)
    low = weights.perplexity_weights(logprob, torch.arange(3), groups, prefer="low", temperature=1.0)
    assert high.tolist() == [0.0, 0.0, 3.0] and low.tolist() == [0.0, 3.0, 0.0]


def test_without_tokens_all_or_the_first_of_each_episode() -> None:
    target, episodes = torch.tensor([5, 8, 5, 9, 8, 5, 8]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    masked = weights.without_tokens(target, episodes, frozenset({5, 9}), first_only=False)
    assert masked.tolist() == [0, 1, 0, 0, 1, 0, 1]
    first = weights.without_tokens(target, episodes, frozenset({5, 9}), first_only=True)
    assert first.tolist() == [0, 1, 1, 1, 1, 0, 1]
    assert weights.without_tokens(target, episodes, frozenset(), first_only=True).tolist() == [1] * 7


def test_likelihood_shift_is_rlsd_and_never_changes_a_sign() -> None:
    d = torch.tensor([-30.0, -0.1, 0.0, 0.1, 1000.0], dtype=torch.float64)
    for advantage in (2.0, -0.5):
        sign = math.copysign(1, advantage)
        ratio = np.clip(np.exp(np.clip(sign * d.numpy(), -20, 20)), 0.8, 1.2)  # the released code's clamp
        gate = weights.likelihood_shift(d, torch.full_like(d, advantage), strength=0.5, clip=0.2)
        np.testing.assert_allclose(gate.numpy(), 0.5 + 0.5 * ratio, rtol=1e-12)
        assert (gate > 0).all()
    none = weights.likelihood_shift(d, torch.ones_like(d), strength=0.0, clip=0.2)  # GRPO
    zero = weights.likelihood_shift(d, torch.zeros_like(d), strength=1.0, clip=0.2)
    assert none.tolist() == zero.tolist() == [1.0] * 5
    with pytest.raises(ConfigError, match=r"strength is 1\.5"):
        weights.likelihood_shift(d, torch.ones_like(d), strength=1.5, clip=0.2)


def test_belief_revision_favours_the_turns_that_speak_for_the_outcome() -> None:
    """Log-odds from 0: by 1, then half of that and 1 more, then nothing; and an episode of one turn."""
    turns, episodes = table([[2, 1, 1], [2]])
    d = torch.tensor([0.25, 0.75, 1.0, -0.75, 3.0, 4.0], dtype=torch.float64)
    beliefs = [1 / (1 + math.exp(-odds)) for odds in (0, 1, 1.5, 0)]
    revised = np.diff(beliefs)
    for advantage in (2.0, -0.5):
        z = math.copysign(1, advantage) * (revised - revised.mean()) / revised.std()
        expected = 0.25 + 0.75 * np.clip(1 + 0.5 * z, 0.5, 1.5)
        found = weights.belief_revision(
            d, torch.full_like(d, advantage), turns, episodes, torch.full_like(d, 0.5), decay=0.5,
            strength=0.75, clip=0.5,
        )  # fmt: skip
        np.testing.assert_allclose(found.numpy(), [*expected[[0, 0, 1, 2]], 1, 1], rtol=1e-12)
    assert expected.max() > 1 > expected.min() > 0


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS, st.floats(0, 3))
def test_turn_divergence_as_published_telescopes(shape: Shape, seed: int, cap: float) -> None:
    turns, episodes = table(shape)
    d = normal(seed, len(turns))
    expected, telescoped = [], []
    for own in by_turn(d, shape):
        means = [mean(list(map(abs, turn))) for turn in own]
        steps = [means[u] / means[u + 1] for u in range(len(means) - 1)]
        products = [1.0] + [min(math.prod(steps[:k]), 1 + cap) for k in range(1, len(means))]
        expected.append(products)
        telescoped.append([min(means[0] / now, 1 + cap) for now in means])
    found = weights.turn_divergence(d, turns, episodes, form="published", cap=cap).numpy()
    np.testing.assert_allclose(found, spread(expected, shape), rtol=1e-9)
    np.testing.assert_allclose(found, spread(telescoped, shape), rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS)
def test_turn_divergence_running_compares_with_all_turns_before(shape: Shape, seed: int) -> None:
    turns, episodes = table(shape)
    d = normal(seed, len(turns))
    expected = []
    for own in by_turn(d, shape):
        means = [mean(list(map(abs, turn))) for turn in own]
        expected.append([1.0] + [min(mean(means[:k]) / means[k], 1.2) for k in range(1, len(means))])
    found = weights.turn_divergence(d, turns, episodes, form="running", cap=0.2)
    np.testing.assert_allclose(found.numpy(), spread(expected, shape), rtol=1e-9)


def test_turn_divergence_where_the_models_agree() -> None:
    turns, episodes = table([[2, 1, 3]])
    for form in ("published", "running"):
        nothing = weights.turn_divergence(torch.zeros(6), turns, episodes, form=form, cap=0.2)
        assert nothing.tolist() == [1.0] * 6
        later = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        agreed = weights.turn_divergence(later, turns, episodes, form=form, cap=0.2)
        assert agreed.tolist() == pytest.approx([1, 1, 1.2, 1.2, 1.2, 1.2])


def test_one_outlier_turn_moves_the_published_form_for_good_but_not_the_running_one() -> None:
    """Why there are two: as published every later weight hangs on the first turn alone."""
    turns, episodes = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    d = torch.tensor([0.01, 1.0, 1.0, 1.0, 1.0])
    published = weights.turn_divergence(d, turns, episodes, form="published", cap=0.2)
    running = weights.turn_divergence(d, turns, episodes, form="running", cap=0.2)
    assert published[1:].tolist() == pytest.approx([0.01] * 4)
    assert running.tolist() == pytest.approx([1, 0.01, 1.01 / 2, 2.01 / 3, 3.01 / 4])


@settings(max_examples=30, deadline=None)
@given(SHAPES, SEEDS)
def test_turn_disagreement_is_the_soft_or_of_turn_means(shape: Shape, seed: int) -> None:
    turns, _ = table(shape)
    d, entropy = normal(seed, len(turns)), normal(seed + 1, len(turns)).exp()
    a, b = (np.array([mean(turn) for own in by_turn(x, shape) for turn in own]) for x in (d.abs(), entropy))
    if len(a) == 1:
        assert weights.turn_disagreement(d, entropy, turns).tolist() == [0.0] * len(turns)
        return
    a, b = ((x - x.min()) / (x.max() - x.min()) for x in (a, b))
    found = weights.turn_disagreement(d, entropy, turns)
    np.testing.assert_allclose(found.numpy(), (1 - (1 - a) * (1 - b))[turns.numpy()], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(SHAPES, SEEDS)
def test_history_means_are_over_tokens_of_earlier_turns(shape: Shape, seed: int) -> None:
    turns, episodes = table(shape)
    values = normal(seed, len(turns))
    expected = [
        [mean(list(itertools.chain(*own[:k]))) if k else 0.0 for k in range(len(own))]
        for own in by_turn(values, shape)
    ]
    found = weights.history_means(values, turns, episodes)
    np.testing.assert_allclose(found.numpy(), spread(expected, shape), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS, st.floats(0.05, 0.95))
def test_kl_collapse_cuts_from_the_first_collapsed_turn_on(shape: Shape, seed: int, floor: float) -> None:
    turns, episodes = table(shape)
    kl = (2 * normal(seed, len(turns))).exp()
    expected = []
    for own in by_turn(kl, shape):
        means, alive, kept = [mean(turn) for turn in own], True, []
        for k, now in enumerate(means):
            alive = alive and not (k > 0 and now < floor * mean(means[:k]))
            kept.append(float(alive))
        expected.append(kept)
    found = weights.kl_collapse(kl, turns, episodes, floor=floor)
    assert found.tolist() == spread(expected, shape)


def test_kl_collapse_ignores_rounding_where_the_models_agree() -> None:
    turns, episodes = table([[1, 1, 1]])
    assert (
        weights.kl_collapse(torch.tensor([0.0, -1e-7, -1e-7]), turns, episodes, floor=0.5).tolist() == [1] * 3
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=12))
def test_places_count_earlier_entries_of_the_same_unit(units: list[int]) -> None:
    found = weights.places(torch.tensor(units, dtype=torch.int64))
    assert found.tolist() == [units[:i].count(unit) for i, unit in enumerate(units)]


def test_turn_places() -> None:
    turns, episodes = table([[2, 1, 3], [1, 2]])
    assert weights.turn_places(turns + 10, episodes).tolist() == [0, 0, 1, 2, 2, 2, 0, 1, 1]


def test_nothing_is_differentiated() -> None:
    turns, episodes = table([[2, 1], [3]])
    x, y = (torch.rand(6, requires_grad=True) for _ in range(2))
    groups = torch.zeros(2, dtype=torch.int64)
    found = [
        weights.soft_or_scores(x, y),
        weights.top_share(x, episodes, 0.5),
        weights.perplexity_weights(x, episodes, groups, prefer="low", temperature=1.0),
        weights.likelihood_shift(x, y, strength=0.5, clip=0.2),
        weights.belief_revision(x, y, turns, episodes, y.detach(), decay=0.9, strength=0.5, clip=0.2),
        weights.turn_divergence(x, turns, episodes, form="running", cap=0.2),
        weights.turn_disagreement(x, y, turns),
        weights.history_means(x, turns, episodes),
        weights.kl_collapse(x, turns, episodes, floor=0.1),
    ]
    assert not any(value.requires_grad for value in found)


def test_no_tokens_give_no_weights() -> None:
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    found = [
        weights.top_share(weights.soft_or_scores(none, none), ids, 0.5),
        weights.perplexity_weights(none, ids, torch.tensor([0, 1]), prefer="low", temperature=1.0),
        weights.without_tokens(ids, ids, frozenset({1}), first_only=True),
        weights.likelihood_shift(none, none, strength=0.5, clip=0.2),
        weights.belief_revision(none, none, ids, ids, none, decay=0.9, strength=0.5, clip=0.2),
        weights.turn_divergence(none, ids, ids, form="published", cap=0.2),
        weights.turn_divergence(none, ids, ids, form="running", cap=0.2),
        weights.turn_disagreement(none, none, ids),
        weights.history_means(none, ids, ids),
        weights.kl_collapse(none, ids, ids, floor=0.1),
        weights.turn_places(ids, ids),
    ]
    assert all(value.shape == (0,) for value in found)
