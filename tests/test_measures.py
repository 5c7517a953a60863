"""Measures against what they state: exact expectations over the vocabulary, coarse ones, formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from measuring import (
    ANY,
    INF,
    KINDS,
    LOG_P,
    STUDENT,
    TEACHER,
    N,
    V,
    anywhere,
    assert_same,
    every_kind,
    expectation,
    full,
    of,
    of_top_k,
    slope,
    value_and_gradient,
)
from torch import Tensor

from opd_agents.config.loss import ESTIMATES
from opd_agents.errors import ConfigError
from opd_agents.objectives import Kind, Measure, divergence
from opd_agents.objectives.divergence import contributions
from opd_agents.objectives.estimators import ESTIMATED, Estimator, Ratio, estimate
from opd_agents.objectives.measures import measured, measured_sampled, measured_top_k


@every_kind
def test_full_is_the_divergence(kind: Kind) -> None:
    logits = STUDENT.clone().requires_grad_()
    value = divergence(logits, TEACHER, kind, **KINDS[kind])
    assert_same(full(kind), (value.detach(), torch.autograd.grad(value.sum(), logits)[0]))


@pytest.mark.parametrize("signal", ["student_top_k", "teacher_top_k"])
@pytest.mark.parametrize("tail", ["bucket", "sampled", "none"])
@every_kind
def test_the_top_k_of_the_whole_vocabulary_is_the_divergence(kind: Kind, tail: Any, signal: Any) -> None:
    measure = Measure(kind, **KINDS[kind], signal=signal, k=V, tail=tail)
    assert_same(value_and_gradient(anywhere(of(measure))), full(kind))
    assert_same(value_and_gradient(anywhere(of(replace(measure, k=V + 5)))), full(kind))
    if signal == "teacher_top_k":
        assert_same(value_and_gradient(anywhere(of_top_k(measure))), full(kind))


# Samples of the action token


@pytest.mark.parametrize("clip", [None, 0.05])
@every_kind
def test_the_sampled_token_has_the_value_and_gradient_of_all(kind: Kind, clip: float | None) -> None:
    measure = Measure(kind, **KINDS[kind], signal="sampled", clip=clip)
    assert_same(value_and_gradient(expectation(of(measure))), full(kind, clip=clip))

    def alone(log_q: Tensor, ids: Tensor, behaviour: Tensor) -> Tensor:
        own, theirs = (x.gather(-1, ids[:, None]).squeeze(-1) for x in (log_q, LOG_P))
        return measured_sampled(own, theirs, behaviour, measure)

    assert_same(value_and_gradient(expectation(alone)), full(kind, clip=clip))
    assert_same(value_and_gradient(expectation(of_top_k(replace(measure, k=2)))), full(kind, clip=clip))


@pytest.mark.parametrize("signal", ["student_top_k", "teacher_top_k"])
@pytest.mark.parametrize("clip", [None, 0.05])
@every_kind
def test_the_sampled_tail_has_the_value_and_gradient_of_all(
    kind: Kind, clip: float | None, signal: Any
) -> None:
    measure = Measure(kind, **KINDS[kind], signal=signal, k=3, tail="sampled", clip=clip)
    assert_same(value_and_gradient(expectation(of(measure))), full(kind, clip=clip))
    if signal == "teacher_top_k":
        assert_same(value_and_gradient(expectation(of_top_k(measure))), full(kind, clip=clip))


def test_the_sampled_tail_reads_the_head_exactly() -> None:
    """Only a token outside the k changes anything; the tail is not there twice."""
    head = value_and_gradient(anywhere(of(Measure("jsd", signal="teacher_top_k", k=V - 2, tail="none"))))
    score = of(Measure("jsd", signal="teacher_top_k", k=V - 2, tail="sampled"))
    order = LOG_P.argsort(-1, descending=True)
    for place in range(V):
        ids = order[:, place]
        ours = value_and_gradient(lambda log_q, ids=ids: score(log_q, ids, torch.full((N,), -1.0)))  # type: ignore[misc]
        assert torch.equal(ours[0], head[0]) == (place < V - 2)


def estimate_gradient(estimator: Estimator, ratio: Ratio) -> Tensor:
    def score(log_q: Tensor, ids: Tensor, behaviour: Tensor) -> Tensor:
        own, theirs = (x.gather(-1, ids[:, None]).squeeze(-1) for x in (log_q, LOG_P))
        return estimate(own - behaviour, theirs - behaviour, estimator, live=ratio == "live")

    return value_and_gradient(expectation(score))[1]


def test_each_estimator_and_ratio_has_its_expected_gradient() -> None:
    q, d = STUDENT.softmax(-1), LOG_P - STUDENT.log_softmax(-1)
    expected: dict[tuple[Estimator, Ratio], Tensor] = {
        ("k1", "live"): full("reverse_kl")[1],
        ("k1", "detached"): torch.zeros(N, V, dtype=torch.float64),
        ("k2", "live"): slope(q * (d.square() / 2 - d)),  # of no divergence
        ("k2", "detached"): full("reverse_kl")[1],
        ("k3", "live"): full("reverse_kl")[1],
        ("k3", "detached"): full("forward_kl")[1],
    }
    for pair, gradient in expected.items():
        torch.testing.assert_close(estimate_gradient(*pair), gradient, rtol=1e-10, atol=1e-13)
    wrong = estimate_gradient("k2", "live")
    assert all((wrong - full(kind)[1]).abs().max() > 0.05 for kind in ("reverse_kl", "forward_kl"))


def test_estimators_take_the_pairs_whose_gradient_is_stated() -> None:
    for estimator, ratios in ESTIMATES.items():  # the config's table says the same
        for ratio, gives in ratios.items():
            assert ESTIMATED.get((estimator, ratio), "") == gives.strip("?")  # type: ignore[arg-type]
            for kind in KINDS:
                options: dict[str, Any] = {
                    **KINDS[kind], "signal": "sampled", "estimator": estimator, "ratio": ratio
                }  # fmt: skip
                if kind == gives:
                    ours = value_and_gradient(expectation(of(Measure(kind, **options))))
                    torch.testing.assert_close(ours[1], full(kind)[1], rtol=1e-10, atol=1e-13)
                    if estimator != "k2":
                        torch.testing.assert_close(ours[0], full("reverse_kl")[0])
                else:
                    with pytest.raises(ConfigError, match="k1 or k3 live or k2 detached"):
                        Measure(kind, **options)


def test_live_k1_is_the_direct_term_of_the_reverse_kl() -> None:
    ids, behaviour = LOG_P.argmin(-1), torch.full((N,), -0.7)
    direct = Measure("reverse_kl", signal="sampled")
    k1 = replace(direct, estimator="k1", ratio="live")
    assert_same(
        value_and_gradient(lambda log_q: of(k1)(log_q, ids, behaviour)),
        value_and_gradient(lambda log_q: of(direct)(log_q, ids, behaviour)),
    )


# Top k


def coarse(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log of the probabilities of the ids and of all other tokens together, in probability space."""
    head = log_probs.exp().gather(-1, ids)
    return torch.cat([head, 1 - head.sum(-1, keepdim=True)], -1).log()


@pytest.mark.parametrize("signal", ["student_top_k", "teacher_top_k"])
@every_kind
def test_a_bucket_is_one_more_category(kind: Kind, signal: Any) -> None:
    measure = Measure(kind, **KINDS[kind], signal=signal, k=3, tail="bucket")
    ids = (STUDENT if signal == "student_top_k" else TEACHER).topk(3).indices
    expected = value_and_gradient(
        lambda log_q: divergence(coarse(log_q, ids), coarse(LOG_P, ids), kind, **KINDS[kind])
    )
    ours = value_and_gradient(anywhere(of(measure)))
    assert_same(ours, expected)
    assert (ours[0] <= full(kind)[0] + 1e-13).all()  # what is merged cannot be told apart
    if signal == "teacher_top_k":
        assert_same(value_and_gradient(anywhere(of_top_k(measure))), expected)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_bucket_of_little_mass_keeps_its_gradient_in_float32(kind: Kind) -> None:
    """Where the student has all its mass in the head, 1 - sum q would leave no digit of the rest."""
    student, teacher = STUDENT.clone(), TEACHER.float()
    student[:, 2:] -= 20
    measure = Measure(kind, signal="student_top_k", k=2, tail="bucket")
    log_p = teacher.log_softmax(-1)
    low = value_and_gradient(lambda log_q: measured(log_q, log_p, measure, ANY, log_q[:, 0]), student.float())
    exact = value_and_gradient(
        lambda log_q: measured(log_q, log_p.double(), measure, ANY, log_q[:, 0]), student.float().double()
    )
    for ours, expected in zip(low, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-6)


def test_a_teacher_whose_top_k_rounds_to_everything_stays_finite() -> None:
    log_p = torch.tensor([[0.5, 0.5 + 1e-7]]).log()
    measure = Measure("reverse_kl", signal="teacher_top_k", k=2, tail="bucket")
    logits = torch.zeros(1, 4, requires_grad=True)
    ids = torch.tensor([[0, 1]])
    value = measured_top_k(
        logits.log_softmax(-1), ids, log_p, log_p[:, 0], measure, ids[:, 0], torch.zeros(1)
    )
    value.sum().backward()
    # Half of the student's mass against the least that float32 can tell from nothing.
    assert value.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 2**-23), rel=0.1)
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("renormalise", ["none", "teacher", "both"])
@pytest.mark.parametrize("signal", ["student_top_k", "teacher_top_k"])
@every_kind
def test_without_a_tail_the_sum_is_over_the_k(kind: Kind, signal: Any, renormalise: Any) -> None:
    measure = Measure(kind, **KINDS[kind], signal=signal, k=3, tail="none", renormalise=renormalise)
    ids = (STUDENT if signal == "student_top_k" else TEACHER).topk(3).indices

    def plain(log_q: Tensor) -> Tensor:
        q, p = log_q.exp().gather(-1, ids), LOG_P.exp().gather(-1, ids)
        if renormalise != "none":
            p = p / p.sum(-1, keepdim=True)
        if renormalise == "both":
            q = q / q.sum(-1, keepdim=True)
        return contributions(q.log(), p.log(), kind, measure.beta, measure.alpha).sum(-1)

    expected = value_and_gradient(plain)
    assert_same(value_and_gradient(anywhere(of(measure))), expected)
    if signal == "teacher_top_k":
        assert_same(value_and_gradient(anywhere(of_top_k(measure))), expected)


@pytest.mark.parametrize("options", [{"tail": "bucket"}, {"tail": "none", "renormalise": "both"}])
@every_kind
def test_top_k_gradients_pass_finite_differences(kind: Kind, options: dict[str, Any]) -> None:
    measure = Measure(kind, **KINDS[kind], signal="student_top_k", k=3, **options)
    score = anywhere(of(measure))
    assert torch.autograd.gradcheck(lambda x: score(x.log_softmax(-1)), (STUDENT.clone().requires_grad_(),))


# Per candidate, geometric, clip


def test_per_candidate_over_all_tokens_has_the_gradient_of_the_reverse_kl() -> None:
    for options in ({}, {"signal": "student_top_k", "k": V, "tail": "none"}):
        ours = value_and_gradient(
            anywhere(of(Measure("reverse_kl", estimator="per_candidate", **options)))  # type: ignore[arg-type]
        )
        torch.testing.assert_close(ours[1], full("reverse_kl")[1], rtol=1e-11, atol=1e-14)
    both = Measure("reverse_kl", signal="teacher_top_k", k=3, tail="none", renormalise="both")
    torch.testing.assert_close(
        value_and_gradient(anywhere(of(replace(both, estimator="per_candidate"))))[1],
        value_and_gradient(anywhere(of(both)))[1],
        rtol=1e-11,
        atol=1e-14,
    )


@pytest.mark.parametrize("clip", [None, 0.1])
def test_per_candidate_over_a_top_k_is_the_published_formula(clip: float | None) -> None:
    measure = Measure(
        "reverse_kl", signal="student_top_k", k=3, tail="none", estimator="per_candidate", clip=clip
    )
    log_q, ids = STUDENT.log_softmax(-1), STUDENT.topk(3).indices
    chosen_q, chosen_p = log_q.gather(-1, ids), LOG_P.gather(-1, ids)
    weighted = chosen_q.softmax(-1) * (chosen_p - chosen_q)
    if clip is not None:
        assert (weighted < -clip).any()
        weighted = weighted.clamp(min=-clip)
    value, gradient = value_and_gradient(anywhere(of(measure)))
    torch.testing.assert_close(value, -(weighted * chosen_q).sum(-1))
    weights = torch.zeros(N, V, dtype=torch.float64).scatter(-1, ids, -weighted)
    torch.testing.assert_close(gradient, slope(weights), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("weight", [0.3, 0.8])
@every_kind
def test_a_geometric_target_is_that_of_the_mixed_logits(kind: Kind, weight: float) -> None:
    fixed = TEACHER + weight * STUDENT  # softmax(z_p + g z_q), the student's part detached
    expected = value_and_gradient(lambda log_q: divergence(log_q, fixed, kind, **KINDS[kind]))
    assert_same(full(kind, geometric=weight), expected)
    sampled = Measure(kind, **KINDS[kind], geometric=weight, signal="sampled")
    assert_same(value_and_gradient(expectation(of(sampled))), expected)


def test_a_geometric_target_has_its_advantage_and_its_fixed_point() -> None:
    weight, log_q = 0.4, STUDENT.log_softmax(-1)
    advantage = LOG_P - (1 - weight) * log_q
    torch.testing.assert_close(full("reverse_kl", geometric=weight)[1], slope(-log_q.exp() * advantage))
    sharpened = (LOG_P / (1 - weight)).log_softmax(-1)
    for kind in KINDS:
        score = anywhere(of(Measure(kind, **KINDS[kind], geometric=weight)))
        assert value_and_gradient(score, sharpened)[1].abs().max() < 1e-12 or kind == "tvd"
        assert value_and_gradient(score, sharpened)[0].abs().max() < 1e-12
        assert value_and_gradient(score, TEACHER)[1].abs().max() > 1e-2


@pytest.mark.parametrize("renormalise", ["teacher", "both"])
def test_a_geometric_target_of_a_top_k_is_renormalised(renormalise: Any) -> None:
    measure = Measure(
        "reverse_kl", signal="teacher_top_k", k=3, tail="none", renormalise=renormalise, geometric=0.5
    )
    assert_same(value_and_gradient(anywhere(of_top_k(measure))), value_and_gradient(anywhere(of(measure))))


@every_kind
def test_clip_caps_each_token_from_above(kind: Kind) -> None:
    clip, options = 0.05, KINDS[kind]
    beta, alpha = options.get("beta", 0.5), options.get("alpha", 0.1)
    expected = value_and_gradient(
        lambda log_q: contributions(log_q, LOG_P, kind, beta, alpha).clamp(max=clip).sum(-1)
    )
    assert_same(full(kind, clip=clip), expected)
    assert (expected[0] < full(kind)[0] - 0.01).any()
    assert_same(full(kind, clip=100.0), full(kind))


def test_clip_makes_an_infinite_term_finite() -> None:
    log_p = TEACHER.clone()
    log_p[0, 2] = -INF
    log_p = log_p.log_softmax(-1)
    plain = value_and_gradient(anywhere(of(Measure("reverse_kl"), log_p)))
    assert plain[0][0] == INF and (plain[1][0] == 0).all()
    capped = value_and_gradient(anywhere(of(Measure("reverse_kl", clip=0.5), log_p)))
    assert capped[0].isfinite().all() and capped[1][0].abs().max() > 1e-3
