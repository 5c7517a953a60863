"""Measures against what they state: exact expectations over the vocabulary, coarse ones, formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_agents.config.loss import ESTIMATES
from opd_agents.errors import AlignmentError, ConfigError, UnknownName
from opd_agents.objectives import Kind, Measure, divergence
from opd_agents.objectives.divergence import contributions
from opd_agents.objectives.estimators import ESTIMATED, Estimator, Ratio, estimate
from opd_agents.objectives.measures import Signal, measured, measured_sampled, measured_top_k

INF = math.inf
N, V = 3, 7
KINDS: dict[Kind, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "alpha": {"alpha": 0.7},
    "tvd": {},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
Score: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log q [n, V], action ids [n], behaviour [n] -> [n]."""
quick = settings(max_examples=60, deadline=None, derandomize=True)


def normal(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = normal(0, N, V), normal(1, N, V)
LOG_P = TEACHER.log_softmax(-1)
SAMPLER = (STUDENT + normal(2, N, V, scale=0.3)).log_softmax(-1)  # an older student
ANY = torch.zeros(N, dtype=torch.int64)


def value_and_gradient(score: Callable[[Tensor], Tensor], logits: Tensor = STUDENT) -> tuple[Tensor, Tensor]:
    """Of the score [n] of log q; the gradient is in the student's logits."""
    logits = logits.clone().requires_grad_()
    value = score(logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def of(measure: Measure, log_p: Tensor = LOG_P) -> Score:
    return lambda log_q, ids, behaviour: measured(log_q, log_p, measure, ids, behaviour)


def of_top_k(measure: Measure) -> Score:
    """The same where only the teacher's top k is known."""
    best, ids = LOG_P.topk(measure.k or 1)

    def score(log_q: Tensor, action_ids: Tensor, behaviour: Tensor) -> Tensor:
        sampled = LOG_P.gather(-1, action_ids[:, None]).squeeze(-1)
        return measured_top_k(log_q, ids, best, sampled, measure, action_ids, behaviour)

    return score


def anywhere(score: Score) -> Callable[[Tensor], Tensor]:
    """A score that looks at no action token."""
    return lambda log_q: score(log_q, ANY, SAMPLER[:, 0])


def expectation(score: Score) -> Callable[[Tensor], Tensor]:
    """Exactly, over an action token that the sampler draws."""

    def expected(log_q: Tensor) -> Tensor:
        values = [
            SAMPLER[:, token].exp() * score(log_q, torch.full((N,), token), SAMPLER[:, token])
            for token in range(V)
        ]
        return torch.stack(values).sum(0)

    return expected


def full(kind: Kind, **options: Any) -> tuple[Tensor, Tensor]:
    return value_and_gradient(anywhere(of(Measure(kind, **KINDS[kind], **options))))


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


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


def slope(weights: Tensor) -> Tensor:
    """The gradient of sum_v weights(v) log q(v) in the logits."""
    return weights - STUDENT.softmax(-1) * weights.sum(-1, keepdim=True)


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


# Impossible tokens

MEASURES: list[Measure] = [
    *(Measure(kind, **options) for kind, options in KINDS.items()),
    *(Measure(kind, **options, signal="sampled") for kind, options in KINDS.items()),
    *(
        Measure(kind, signal=signal, k=3, tail=tail)
        for kind in ("forward_kl", "reverse_kl", "jsd", "alpha")
        for signal in ("student_top_k", "teacher_top_k")
        for tail in ("bucket", "sampled", "none")
    ),
    *(
        Measure(kind, signal="teacher_top_k", k=3, tail="none", renormalise=renormalise)
        for kind in ("forward_kl", "reverse_kl")
        for renormalise in ("teacher", "both")
    ),
    *(
        Measure(kind, signal="sampled", estimator=estimator, ratio=ratio)
        for (estimator, ratio), kind in ESTIMATED.items()
    ),
    Measure("reverse_kl", estimator="per_candidate"),
    Measure("reverse_kl", signal="student_top_k", k=3, tail="none", estimator="per_candidate"),
    Measure("reverse_kl", geometric=0.5),
    Measure("jsd", clip=0.1),
]


def random_case(seed: int, rows: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits with -inf on either side, action ids, a behaviour that may draw them, what is -inf."""
    student, teacher = normal(seed, rows, V, scale=scale), normal(seed + 1, rows, V, scale=scale)
    ids = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(seed + 2))
    mine, theirs = normal(seed + 3, rows, V) > 1, normal(seed + 4, rows, V) > 1
    mine.scatter_(-1, ids[:, None], False)  # the action token is possible for the student
    mine[:, 0] = theirs[:, 0] = False  # as the geometric target needs a token that is possible for both
    return (
        student.masked_fill(mine, -INF),
        teacher.masked_fill(theirs, -INF),
        ids,
        -normal(seed, rows).abs(),
        mine,
    )


@quick
@given(
    measure=st.sampled_from(MEASURES), rows=st.integers(0, 5), scale=st.sampled_from([0.1, 3.0, 200.0]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_no_nan_whatever_is_impossible(measure: Measure, rows: int, scale: float, seed: int) -> None:
    student, teacher, ids, behaviour, impossible = random_case(seed, rows, scale)
    log_p = teacher.log_softmax(-1)

    def compare(score: Score) -> None:
        value, gradient = value_and_gradient(lambda log_q: score(log_q, ids, behaviour), student)
        assert value.shape == (rows,) and not value.isnan().any()
        assert gradient.isfinite().all() and (gradient[impossible] == 0).all()
        assert (gradient[value.isinf()] == 0).all()

    compare(of(measure, log_p))
    if measure.signal == "teacher_top_k":
        best, places = log_p.topk(3)
        sampled = log_p.gather(-1, ids[:, None]).squeeze(-1)
        compare(lambda log_q, ids, b: measured_top_k(log_q, places, best, sampled, measure, ids, b))


@quick
@given(measure=st.sampled_from(MEASURES), rows=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_padding_and_other_rows_change_nothing(measure: Measure, rows: int, seed: int) -> None:
    student, teacher, ids, behaviour, _ = random_case(seed, rows, 1.5)
    width = (0, 4)

    def run(pad: bool) -> tuple[Tensor, Tensor]:
        mine, theirs = (
            torch.nn.functional.pad(x, width if pad else (0, 0), value=-INF) for x in (student, teacher)
        )
        score = of(measure, theirs.log_softmax(-1))
        value, gradient = value_and_gradient(lambda log_q: score(log_q, ids, behaviour), mine)
        assert not pad or (gradient[:, V:] == 0).all()
        return value, gradient[:, :V]

    assert_same(run(pad=True), run(pad=False))
    score = of(measure, teacher[-1:].log_softmax(-1))
    alone = value_and_gradient(lambda log_q: score(log_q, ids[-1:], behaviour[-1:]), student[-1:])
    assert_same(alone, (run(pad=False)[0][-1:], run(pad=False)[1][-1:]))


@pytest.mark.parametrize("options", [{"tail": "bucket"}, {"tail": "none", "renormalise": "both"}])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_head_or_a_rest_without_any_mass_gives_no_nan(kind: Kind, options: dict[str, Any]) -> None:
    student = STUDENT.clone()
    student[0, TEACHER[0].topk(3).indices] = -INF  # the student has nothing on the teacher's top k
    rest = torch.ones(V, dtype=torch.bool)
    rest[TEACHER[1].topk(3).indices] = False
    student[1, rest] = -INF  # and here nothing but it
    measure = Measure(kind, signal="teacher_top_k", k=3, **options)
    for score in (of(measure), of_top_k(measure)):
        value, gradient = value_and_gradient(anywhere(score), student)
        assert not value.isnan().any() and gradient.isfinite().all()
        assert (gradient[student == -INF] == 0).all()
    if options["tail"] == "none":
        expected = divergence(student[1:, ~rest], TEACHER[1:, ~rest], kind)[:1]
        torch.testing.assert_close(value[1:2], expected)


def test_k3_counts_what_only_the_teacher_can_say() -> None:
    """Its terms p - q - q d sum to the reverse KL only together with those of q = 0."""
    student = STUDENT.clone()
    student[:, 2] = -INF
    score = expectation(of(Measure("reverse_kl", signal="sampled", estimator="k3", ratio="live")))
    expected = value_and_gradient(lambda log_q: divergence(log_q, TEACHER, "reverse_kl"), student)
    assert_same(value_and_gradient(score, student), expected)


@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("measure", [m for m in MEASURES if m.signal == "sampled" or m.tail == "sampled"])
def test_an_action_token_that_nobody_could_sample_is_infinite(measure: Measure, teacher_too: bool) -> None:
    student, teacher, ids = STUDENT.clone(), TEACHER.clone(), LOG_P.argmin(-1)  # in no top k of the teacher
    student[0, ids[0]] = -INF
    if teacher_too:
        teacher[0, ids[0]] = -INF
    score = of(measure, teacher.log_softmax(-1))
    behaviour = student.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    value, gradient = value_and_gradient(lambda log_q: score(log_q, ids, behaviour), student)
    assert value[0] == INF and (gradient[0] == 0).all()
    assert value[1:].isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("measure", [m for m in MEASURES if m.signal == "sampled"])
def test_a_ratio_that_overflows_is_infinite_without_a_gradient(measure: Measure) -> None:
    log_p, ids = torch.full((1, 2), -math.log(2)), torch.zeros(1, dtype=torch.int64)
    logits = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    log_q = logits.log_softmax(-1)
    value = measured(log_q, log_p, measure, ids, log_q[:, 0].detach())
    (value * torch.zeros(1)).nan_to_num().sum().backward()  # as of a token that is masked
    assert value.item() == INF
    assert logits.grad is not None and (logits.grad == 0).all()


# Refusals


@pytest.mark.parametrize(
    "options, match",
    [
        ({"signal": "student_top_k"}, "`k`"),
        ({"signal": "student_top_k", "k": 4}, "`tail`"),
        ({"signal": "student_top_k", "k": 0, "tail": "none"}, "`k`"),
        ({"signal": "student_top_k", "k": 4, "tail": "bucket", "renormalise": "both"}, "renormalise"),
        ({"renormalise": "teacher"}, "renormalise"),
        ({"clip": 0.0}, "clip"),
        ({"geometric": -0.1}, "geometric"),
        ({"geometric": math.nan}, "geometric"),
        ({"estimator": "k1", "ratio": "live"}, "signal sampled"),
        ({"ratio": "live"}, "k1, k2 and k3"),
        ({"estimator": "per_candidate", "signal": "sampled"}, "per_candidate"),
        (
            {"estimator": "per_candidate", "signal": "student_top_k", "k": 4, "tail": "bucket"},
            "per_candidate",
        ),
        ({"divergence": "forward_kl", "estimator": "per_candidate"}, "per_candidate"),
        ({"divergence": "jsd", "beta": 1.0}, "reverse_kl"),
        ({"divergence": "skew_kl", "alpha": 0.0}, "forward_kl"),
    ],
)
def test_measures_that_mean_nothing_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Measure(**{"divergence": "reverse_kl", **options})


def test_unknown_words_are_refused() -> None:
    for options in ({"divergence": "kl"}, {"signal": "top_k"}, {"tail": "buckets"}, {"estimator": "k4"}):
        with pytest.raises(UnknownName, match="Unknown"):
            Measure(**{"divergence": "reverse_kl", **options})  # type: ignore[arg-type]


def test_a_teacher_that_gives_too_little_is_refused() -> None:
    log_q, ids, row = STUDENT.log_softmax(-1), TEACHER.topk(3).indices, torch.zeros(N)

    def top_k(measure: Measure) -> Tensor:
        return measured_top_k(log_q, ids, LOG_P.gather(-1, ids), row, measure, ANY, row)

    signals: list[Signal] = ["full", "student_top_k"]
    for signal in signals:
        with pytest.raises(ConfigError, match="hidden states"):
            top_k(Measure("jsd", signal=signal, k=3, tail="bucket"))
    with pytest.raises(ConfigError, match="normaliser"):
        top_k(Measure("jsd", signal="teacher_top_k", k=3, tail="bucket", geometric=0.5))
    with pytest.raises(ConfigError, match="signal full"):
        measured_sampled(row, row, row, Measure("jsd"))
    with pytest.raises(ConfigError, match="geometric"):
        measured_sampled(row, row, row, Measure("jsd", signal="sampled", geometric=0.5))


def test_misaligned_log_probs_are_refused() -> None:
    log_q, row, measure = STUDENT.log_softmax(-1), torch.zeros(N), Measure("jsd", signal="sampled")
    with pytest.raises(AlignmentError, match="log_p"):
        measured(log_q, LOG_P[:, :-1], measure, ANY, row)
    with pytest.raises(AlignmentError, match="action_ids"):
        measured(log_q, LOG_P, measure, ANY[:-1], row)
    with pytest.raises(AlignmentError, match="behaviour"):
        measured(log_q, LOG_P, measure, ANY, row[:, None])
    with pytest.raises(AlignmentError, match="teacher"):
        measured_sampled(row, row[:, None], row, measure)
    with pytest.raises(AlignmentError, match="ids"):
        top = Measure("jsd", signal="teacher_top_k", k=3, tail="none")
        measured_top_k(log_q, ANY[:, None], LOG_P[:, :1], row, top, ANY, row)
