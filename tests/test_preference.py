"""Preference losses against closed forms, scipy, TRL and finite differences; slopes against autograd."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_expit, logit
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import Form, episode_pairs, preference_loss, token_slopes
from opd_agents.objectives.preference import ANCHORED

FORMS: tuple[Form, ...] = get_args(Form)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def logprobs(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Negative, in float64."""
    return (
        -scale * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.01
    )


def anchors(form: Form, chosen: Tensor, rejected: Tensor, beta: float = 0.3) -> dict[str, Any]:
    if form not in ANCHORED:
        return {}
    return {"beta": beta, "chosen_reference": chosen, "rejected_reference": rejected}


# The losses


def test_values_are_those_of_the_papers() -> None:
    c, r, c_ref, r_ref = (logprobs(seed, 7, scale=4.0) for seed in range(4))
    ours = preference_loss("dpo", c, r, beta=0.3, chosen_reference=c_ref, rejected_reference=r_ref)
    ratios = (np.exp(x.numpy()) for x in (c - c_ref, r - r_ref))
    won, lost = (np.log(ratio) for ratio in ratios)
    np.testing.assert_allclose(ours.numpy(), -log_expit(0.3 * won - 0.3 * lost), rtol=1e-12)
    # SPIN (its eq. 4.7) with the logistic loss l(t) = log(1 + exp(-t)).
    spin = preference_loss("spin", c, r, beta=0.3, chosen_reference=c_ref, rejected_reference=r_ref)
    np.testing.assert_allclose(spin.numpy(), np.log1p(np.exp(-(0.3 * won - 0.3 * lost))), rtol=1e-12)
    odds = preference_loss("orpo", c, r)
    log_odds_ratio = logit(np.exp(c.numpy())) - logit(np.exp(r.numpy()))
    np.testing.assert_allclose(odds.numpy(), -log_expit(log_odds_ratio), rtol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_equal_sides_cost_log_two_and_swapped_ones_the_margin(form: Form) -> None:
    c, r = logprobs(0, 5), logprobs(1, 5)
    own = preference_loss(form, c, c, **anchors(form, r, r))
    torch.testing.assert_close(own, torch.full_like(own, math.log(2)))
    if form in ANCHORED:  # the policy at its reference
        own = preference_loss(form, c, r, **anchors(form, c, r))
        torch.testing.assert_close(own, torch.full_like(own, math.log(2)))
    zero = torch.zeros_like(c)
    forth = preference_loss(form, c, r, **anchors(form, zero, zero))
    back = preference_loss(form, r, c, **anchors(form, zero, zero))
    margin = 0.3 * (c - r) if form in ANCHORED else torch.logit(c.exp()) - torch.logit(r.exp())
    torch.testing.assert_close(back - forth, margin)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_passes_finite_differences(form: Form) -> None:
    c, r = logprobs(2, 4, scale=2.0).requires_grad_(), logprobs(3, 4, scale=2.0).requires_grad_()
    references = (logprobs(4, 4).requires_grad_(), logprobs(5, 4).requires_grad_())
    given_ = anchors(form, *references)
    assert torch.autograd.gradcheck(lambda c, r: preference_loss(form, c, r, **given_), (c, r))
    preference_loss(form, c, r, **given_).sum().backward()
    assert all(reference.grad is None for reference in references)
    assert c.grad is not None and r.grad is not None
    assert bool((c.grad < 0).all() and (r.grad > 0).all())


def test_beta_scales_the_first_step_and_a_large_one_keeps_only_the_wrong_pairs() -> None:
    """At the reference d loss / d chosen is -beta / 2; loss / beta -> the amount by which a pair is wrong."""
    c, r = logprobs(0, 6).requires_grad_(), logprobs(1, 6)
    start = anchors("dpo", c.detach(), r)
    preference_loss("dpo", c, r, **start).sum().backward()
    torch.testing.assert_close(c.grad, torch.full_like(r, -0.15))
    hinge = preference_loss("dpo", c, r, **anchors("dpo", 0 * r, 0 * r, beta=1e6)) / 1e6
    torch.testing.assert_close(hinge.detach(), (r - c.detach()).clamp(min=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_keep_their_digits_at_both_ends(dtype: torch.dtype) -> None:
    """Against float64 of log P / (1 - P) with 1 - P from expm1; from sure sequences to unlikely ones."""
    values = torch.tensor([-1e-6, -1e-3, -0.69, -0.7, -5.0, -90.0, -800.0], dtype=dtype)
    chosen, even = values.clone().requires_grad_(), torch.full_like(values, -math.log(2))
    loss = preference_loss("orpo", chosen, even)  # of odds 1: softplus(-log odds)
    exact = values.double().numpy()
    log_odds = exact - np.log(-np.expm1(exact))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(loss.detach().numpy(), np.logaddexp(0, -log_odds), rtol=tolerance)
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    # d softplus(-z) / dlogP = -(1 - sigmoid(z)) / (1 - P), which at odds 1 on the other side is exactly -1
    np.testing.assert_allclose(gradient.numpy(), -np.ones(7), rtol=tolerance)


@pytest.mark.parametrize("certain", [0.0, 1e-7])
def test_a_certain_sequence_has_finite_odds_and_a_way_back(certain: float) -> None:
    """Also where rounding takes its log-prob above 0."""
    sure, other = torch.tensor([certain]).requires_grad_(), torch.tensor([-1.0])
    won, lost = preference_loss("orpo", sure, other), preference_loss("orpo", other, sure)
    assert 0 <= won.item() < 1e-6 and 15 < lost.item() < 18
    (pull,), (push,) = torch.autograd.grad(won, sure), torch.autograd.grad(lost, sure)
    assert -1.0 < float(pull) <= 0 and 1e6 < float(push) < math.inf


@quick
@given(pairs=st.integers(1, 6), scale=st.floats(0, 1000), beta=st.floats(0.01, 50), seed=st.integers(0, 999))
def test_losses_and_gradients_are_finite(pairs: int, scale: float, beta: float, seed: int) -> None:
    c, r, c_ref, r_ref = (logprobs(seed + i, pairs, scale=scale).float() for i in range(4))
    for form in FORMS:
        x, y = c.clone().requires_grad_(), r.clone().requires_grad_()
        loss = preference_loss(form, x, y, **anchors(form, c_ref, r_ref, beta))
        assert loss.shape == (pairs,) and loss.dtype == torch.float32 and bool((loss >= 0).all())
        gradients = torch.autograd.grad(loss.sum(), (x, y))
        assert all(bool(gradient.isfinite().all()) for gradient in (loss, *gradients))


def test_losses_are_those_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    dpo = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    tokens, mask = logprobs(0, 6, 9), torch.ones(6, 10, dtype=torch.int64)
    reference = logprobs(1, 6)
    outputs = MagicMock(
        log_probs=tokens.requires_grad_(), entropy=tokens, mean_logits=tokens, is_top1=mask[:, 1:]
    )
    trainer = MagicMock(
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=0.3, ld_alpha=None,
        precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer.accelerator.gather_for_metrics = lambda value: value
    inputs = {
        "input_ids": mask, "completion_mask": mask, "attention_mask": mask,
        "ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:],
    }  # fmt: skip
    theirs = dpo._compute_loss(trainer, lambda **_: outputs, inputs, False)
    (expected,) = torch.autograd.grad(theirs, tokens)
    sequence = tokens.sum(1)
    ours = preference_loss("dpo", sequence[:3], sequence[3:], **anchors("dpo", *reference.split(3))).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, tokens)[0], expected, rtol=1e-10, atol=0)
    means = tokens.detach().float().mean(1)
    own = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    beta_log_sigmoid, *_ = orpo.odds_ratio_loss(own, means[:3], means[3:])
    odds = -0.1 * preference_loss("orpo", means[:3], means[3:])
    torch.testing.assert_close(odds, beta_log_sigmoid, rtol=1e-6, atol=0)


def test_bad_pairs_are_refused() -> None:
    one, beta = torch.tensor([-1.0]), {"beta": 0.1}
    both = {"chosen_reference": one, "rejected_reference": one}
    for options in ({}, beta, both, {**both, "beta": 0.0}, {**both, "beta": math.inf}):
        with pytest.raises(ConfigError, match="beta"):
            preference_loss("dpo", one, one, **options)
    for options in (beta, both):
        with pytest.raises(ConfigError, match="leave them out"):
            preference_loss("orpo", one, one, **options)
    with pytest.raises(ConfigError, match="known are dpo, spin, orpo"):
        preference_loss("ipo", one, one)  # type: ignore[arg-type]
    for bad in (torch.tensor([math.nan]), torch.tensor([-math.inf]), one.half(), one.bfloat16(), one[None]):
        with pytest.raises(AlignmentError):
            preference_loss("orpo", bad, one)
        with pytest.raises(AlignmentError):
            preference_loss("spin", one, one, beta=0.1, chosen_reference=bad, rejected_reference=one)


# Slopes: episodes 0 and 1 are of one group, 2 to 4 of another, 5 of none.
EPISODES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5])
COUNTED = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]).bool()
PAIRS = [(0, 1), (3, 2), (3, 4)]


def with_reference(form: Form, reference: Tensor) -> dict[str, Any]:
    return {"beta": 0.3, "reference": reference} if form in ANCHORED else {}


def plain_loss(form: Form, logprob: Tensor, reference: Tensor) -> Tensor:
    """The mean loss of the pairs, written out."""

    def sequence(values: Tensor, episode: int) -> Tensor:
        own = values[COUNTED & (episode == EPISODES)]
        return own.sum() if form in ANCHORED else own.mean()

    losses = []
    for i, j in PAIRS:
        if form in ANCHORED:
            won, lost = (sequence(logprob, e) - sequence(reference, e) for e in (i, j))
            losses.append(-torch.log(torch.sigmoid(0.3 * (won - lost))))
        else:
            p, n = sequence(logprob, i).exp(), sequence(logprob, j).exp()
            odds = p * (1 - n) / ((1 - p) * n)
            losses.append(-torch.log(odds / (1 + odds)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("form", FORMS)
def test_slopes_give_the_exact_gradient_whatever_the_micro_batches(form: Form) -> None:
    features = torch.randn(13, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    reference = logprobs(7, 13)

    def logprob(rows: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(features[rows] @ weights)

    everything = torch.arange(13)
    exact = plain_loss(form, logprob(everything), reference)
    (expected,) = torch.autograd.grad(exact, weights)
    options = with_reference(form, reference)
    with torch.no_grad():  # as after a pass that only scores
        slopes, losses = token_slopes(form, logprob(everything), COUNTED, EPISODES, PAIRS, **options)
    assert not slopes.requires_grad and not losses.requires_grad
    assert losses.mean().item() == pytest.approx(exact.item(), rel=1e-12)
    for rows in (everything[:4], everything[4:5], everything[5:]):  # the second pair's episodes apart
        (slopes[rows] * logprob(rows)).sum().backward()
    torch.testing.assert_close(weights.grad, expected, rtol=1e-10, atol=1e-14)
    assert not bool(slopes[~COUNTED | (EPISODES == 5)].any()) and bool(slopes[COUNTED & (EPISODES < 5)].all())


def test_what_is_in_no_pair_is_not_looked_at() -> None:
    values = logprobs(8, 13)
    spoilt = torch.where(COUNTED & (EPISODES < 5), values, math.nan)
    for form in FORMS:
        clean, dirty = with_reference(form, 2 * values), with_reference(form, 2 * spoilt)
        expected = token_slopes(form, values, COUNTED, EPISODES, PAIRS, **clean)
        found = token_slopes(form, spoilt, COUNTED, EPISODES, PAIRS, **dirty)
        assert torch.equal(found.slopes, expected.slopes) and torch.equal(found.losses, expected.losses)


def test_without_pairs_nothing_has_a_slope() -> None:
    for form in FORMS:
        options = with_reference(form, logprobs(1, 13))
        slopes, losses = token_slopes(form, logprobs(0, 13), COUNTED, EPISODES, [], **options)
        assert slopes.tolist() == [0.0] * 13 and losses.shape == (0,)


def test_bad_tables_are_refused() -> None:
    values = logprobs(0, 13)
    with pytest.raises(AlignmentError, match="no token that counts"):
        token_slopes("orpo", values, COUNTED & (EPISODES != 4), EPISODES, PAIRS)
    with pytest.raises(AlignmentError, match="no token that counts"):
        token_slopes("orpo", values, COUNTED, EPISODES, [(0, 9)])
    with pytest.raises(AlignmentError, match="must all be"):
        token_slopes("orpo", values[:5], COUNTED, EPISODES, PAIRS)
    for bad in (values.half(), torch.full_like(values, math.nan)):
        with pytest.raises(AlignmentError):
            token_slopes("orpo", bad, COUNTED, EPISODES, PAIRS)
        with pytest.raises(AlignmentError):
            token_slopes("dpo", values, COUNTED, EPISODES, PAIRS, beta=0.1, reference=bad)
    with pytest.raises(ConfigError):
        token_slopes("spin", values, COUNTED, EPISODES, PAIRS, beta=0.1)


# Pairs


def test_pairs_are_of_one_group_and_of_clear_cases() -> None:
    groups = torch.tensor([0, 0, 1, 1, 1, -1, -1, 0])
    chosen = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1]).bool()
    rejected = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0]).bool()
    assert episode_pairs(groups, chosen, rejected) == [(0, 1), (2, 4), (7, 1)]
    assert episode_pairs(groups, rejected, chosen) == [(1, 0), (1, 7), (4, 2)]
    assert episode_pairs(groups, chosen, chosen) == []
    assert episode_pairs(groups[:0], chosen[:0], rejected[:0]) == []
    with pytest.raises(AlignmentError, match="must all be"):
        episode_pairs(groups, chosen[:3], rejected)
