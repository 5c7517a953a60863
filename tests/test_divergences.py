"""Divergences against scipy, closed forms, identities among them and finite differences, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError, UnknownName
from opd_agents.objectives import DIVERGENCES, Kind, divergence
from opd_agents.objectives.divergence import contributions

Case: TypeAlias = tuple[Kind, dict[str, float]]
CASES: list[Case] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("jsd", {"beta": beta}) for beta in (0.1, 0.5, 0.9)),
    *(("skew_kl", {"alpha": alpha}) for alpha in (0.1, 0.7)),
    *(("skew_reverse_kl", {"alpha": alpha}) for alpha in (0.1, 0.7)),
    *(("alpha", {"alpha": alpha}) for alpha in (0.05, 0.5, 0.8)),
    ("tvd", {}),
]
INF = math.inf
quick = settings(max_examples=40, deadline=None, derandomize=True)
every_case = pytest.mark.parametrize(
    "kind, options", CASES, ids=[f"{kind}-{'-'.join(map(str, options.values()))}" for kind, options in CASES]
)


def normal(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student_gradient(student: Tensor, teacher: Tensor, kind: Kind, **options: float) -> tuple[Tensor, Tensor]:
    logits = student.clone().requires_grad_()
    value = divergence(logits, teacher, kind, **options)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def plain_terms(
    q: np.ndarray, p: np.ndarray, kind: Kind, beta: float = 0.5, alpha: float = 0.1
) -> np.ndarray:
    """What each token adds, in probability space."""
    b, a, m = beta, alpha, beta * p + (1 - beta) * q
    terms: dict[Kind, np.ndarray] = {
        "forward_kl": rel_entr(p, q),
        "reverse_kl": rel_entr(q, p),
        "jsd": b * rel_entr(p, m) + (1 - b) * rel_entr(q, m),
        "skew_kl": rel_entr(p, a * p + (1 - a) * q),
        "skew_reverse_kl": rel_entr(q, a * q + (1 - a) * p),
        "alpha": (a * p + (1 - a) * q - p**a * q ** (1 - a)) / (a * (1 - a)),
        "tvd": np.abs(p - q) / 2,
    }
    return terms[kind]


def test_every_kind_is_tested() -> None:
    assert {kind for kind, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.3)])
@every_case
def test_values_agree_with_scipy(
    kind: Kind, options: dict[str, float], temperatures: tuple[float, float]
) -> None:
    student, teacher = normal(0, 5, 9), normal(1, 5, 9)
    q = (student / temperatures[0]).softmax(-1).numpy()
    p = (teacher / temperatures[1]).softmax(-1).numpy()
    expected = plain_terms(q, p, kind, **options)
    both = {"temperature_student": temperatures[0], "temperature_teacher": temperatures[1]}
    ours = divergence(student, teacher, kind, **options, **both)
    np.testing.assert_allclose(ours.numpy(), expected.sum(-1), rtol=1e-12)
    log_q, log_p = torch.from_numpy(q).log(), torch.from_numpy(p).log()
    terms = contributions(log_q, log_p, kind, options.get("beta", 0.5), options.get("alpha", 0.1))
    np.testing.assert_allclose(terms.numpy(), expected, rtol=1e-11, atol=1e-16)


@every_case
def test_gradient_passes_finite_differences(kind: Kind, options: dict[str, float]) -> None:
    student, teacher = normal(2, 3, 6).requires_grad_(), normal(3, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: divergence(s, teacher, kind, temperature_student=0.8, temperature_teacher=1.2, **options),
        (student,),
    )
    divergence(student, teacher, kind, **options).sum().backward()
    assert teacher.grad is None


@every_case
def test_gradient_agrees_with_closed_forms(kind: Kind, options: dict[str, float]) -> None:
    student, teacher, temperature = normal(4, 7, 11), normal(5, 7, 11), 0.6
    q, p = (student / temperature).softmax(-1), teacher.softmax(-1)
    a, b = options.get("alpha", 0.1), options.get("beta", 0.5)
    slopes: dict[Kind, Tensor] = {  # the derivative in q(v), up to a constant
        "forward_kl": -p / q,
        "reverse_kl": (q / p).log(),
        "jsd": (1 - b) * (q / (b * p + (1 - b) * q)).log(),
        "skew_kl": -(1 - a) * p / (a * p + (1 - a) * q),
        "skew_reverse_kl": (q / (a * q + (1 - a) * p)).log() - a * q / (a * q + (1 - a) * p),
        "alpha": -((p / q) ** a) / a,
        "tvd": (q - p).sign() / 2,
    }
    slope = slopes[kind]
    expected = q * (slope - (q * slope).sum(-1, keepdim=True)) / temperature
    ours = student_gradient(student, teacher, kind, temperature_student=temperature, **options)[1]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)


@every_case
def test_equal_models_have_no_divergence_and_no_gradient(kind: Kind, options: dict[str, float]) -> None:
    value, gradient = student_gradient(normal(8, 4, 10), normal(8, 4, 10), kind, **options)
    assert value.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_sides_swap_with_their_parameters() -> None:
    student, teacher = normal(9, 4, 10), normal(10, 4, 10)

    def agree(kind: Kind, swapped: Kind, ours: dict[str, float], theirs: dict[str, float]) -> None:
        torch.testing.assert_close(
            divergence(student, teacher, kind, **ours),
            divergence(teacher, student, swapped, **theirs),
            rtol=1e-12,
            atol=1e-14,
        )

    agree("forward_kl", "reverse_kl", {}, {})
    agree("tvd", "tvd", {}, {})
    for share in (0.5, 0.2):
        agree("jsd", "jsd", {"beta": share}, {"beta": 1 - share})
        agree("alpha", "alpha", {"alpha": share}, {"alpha": 1 - share})
        agree("skew_kl", "skew_reverse_kl", {"alpha": share}, {"alpha": share})


def test_jsd_is_made_of_the_two_skew_divergences() -> None:
    student, teacher, beta = normal(9, 4, 10), normal(10, 4, 10), 0.3
    forward = divergence(student, teacher, "skew_kl", alpha=beta)
    reverse = divergence(student, teacher, "skew_reverse_kl", alpha=1 - beta)
    torch.testing.assert_close(
        divergence(student, teacher, "jsd", beta=beta), beta * forward + (1 - beta) * reverse
    )


LIMITS: list[tuple[Kind, Callable[[float], dict[str, float]], Callable[[float], float], Kind]] = [
    ("jsd", lambda e: {"beta": e}, lambda e: e, "forward_kl"),
    ("jsd", lambda e: {"beta": 1 - e}, lambda e: e, "reverse_kl"),
    ("skew_kl", lambda e: {"alpha": e}, lambda e: 1.0, "forward_kl"),
    ("skew_reverse_kl", lambda e: {"alpha": e}, lambda e: 1.0, "reverse_kl"),
    ("alpha", lambda e: {"alpha": e}, lambda e: 1.0, "reverse_kl"),
    ("alpha", lambda e: {"alpha": 1 - e}, lambda e: 1.0, "forward_kl"),
]


@pytest.mark.parametrize("kind, options, scale, limit", LIMITS)
def test_ends_are_the_two_kls(
    kind: Kind, options: Callable[[float], dict[str, float]], scale: Callable[[float], float], limit: Kind
) -> None:
    student, teacher, small = normal(9, 4, 10), normal(10, 4, 10), 1e-7
    value, gradient = student_gradient(student, teacher, kind, **options(small))
    end, slope = student_gradient(student, teacher, limit)
    torch.testing.assert_close(value / scale(small), end, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient / scale(small), slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6])
def test_alpha_is_accurate_near_both_ends_in_float32(alpha: float) -> None:
    student, teacher = normal(9, 50, 30, scale=4), normal(10, 50, 30, scale=4)
    teacher[:25] = student[:25] + normal(11, 25, 30, scale=1e-3)  # the ends are hardest where p is close to q
    value, gradient = student_gradient(student.float(), teacher.float(), "alpha", alpha=alpha)
    exact, slope = student_gradient(student.float().double(), teacher.float().double(), "alpha", alpha=alpha)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-6)


def test_alpha_at_one_half_is_the_squared_hellinger_distance() -> None:
    student, teacher = normal(9, 4, 10), normal(10, 4, 10)
    q, p = student.softmax(-1), teacher.softmax(-1)
    hellinger = 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)
    torch.testing.assert_close(divergence(student, teacher, "alpha", alpha=0.5), 4 * hellinger)


@every_case
def test_terms_are_homogeneous(kind: Kind, options: dict[str, float]) -> None:
    log_q, log_p, shift = normal(6, 5, 7).log_softmax(-1), normal(7, 5, 7).log_softmax(-1), normal(8, 5, 1)
    a, b = options.get("alpha", 0.1), options.get("beta", 0.5)
    torch.testing.assert_close(
        contributions(log_q + shift, log_p + shift, kind, b, a),
        contributions(log_q, log_p, kind, b, a) * shift.exp(),
    )


@every_case
def test_tokens_impossible_on_both_sides_change_nothing(kind: Kind, options: dict[str, float]) -> None:
    student, teacher = normal(11, 3, 7), normal(12, 3, 7)
    impossible = torch.full((3, 2), -INF, dtype=torch.float64)
    value, gradient = student_gradient(student, teacher, kind, **options)
    padded = student_gradient(
        torch.cat([student, impossible], -1), torch.cat([teacher, impossible], -1), kind, **options
    )
    torch.testing.assert_close(padded[0], value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(padded[1], torch.nn.functional.pad(gradient, (0, 2)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("side", ["student", "teacher"])
@every_case
def test_tokens_impossible_on_one_side(kind: Kind, options: dict[str, float], side: str) -> None:
    logits = torch.zeros(2, 3, dtype=torch.float64)
    narrow = logits.clone()
    narrow[0, 2] = -INF  # the second row stays regular
    q, p = ([0.5, 0.5, 0.0], [1 / 3] * 3) if side == "student" else ([1 / 3] * 3, [0.5, 0.5, 0.0])
    value = plain_terms(np.array(q), np.array(p), kind, **options).sum()
    student, teacher = (narrow, logits) if side == "student" else (logits, narrow)
    ours, gradient = student_gradient(student, teacher, kind, **options)
    assert ours[0].item() == pytest.approx(value, rel=1e-13)
    assert ours[1].abs() < 1e-15 and gradient.isfinite().all()
    assert math.isfinite(value) or (gradient[0] == 0).all()
    if side == "student":
        assert gradient[0, 2] == 0


def upper_bound(kind: Kind, options: dict[str, float]) -> float:
    a, b = options.get("alpha", 0.1), options.get("beta", 0.5)
    bounds: dict[Kind, float] = {
        "jsd": -b * math.log(b) - (1 - b) * math.log1p(-b),
        "skew_kl": -math.log(a),
        "skew_reverse_kl": -math.log(a),
        "alpha": 1 / (a * (1 - a)),
        "tvd": 1.0,
    }
    return bounds.get(kind, INF)


@quick
@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    vocabulary=st.integers(2, 12),
    case=st.sampled_from(CASES),
    scale=st.sampled_from([0.1, 3.0, 300.0]),
    seed=st.integers(0, 10**6),
)
def test_divergence_is_a_divergence(
    shape: list[int], vocabulary: int, case: Case, scale: float, seed: int
) -> None:
    kind, options = case
    student = normal(seed, *shape, vocabulary, scale=scale)
    teacher = normal(seed + 1, *shape, vocabulary, scale=scale)
    masked = normal(seed + 2, *shape, vocabulary) > 1
    masked[..., 0] = False
    student, teacher = student.masked_fill(masked, -INF), teacher.masked_fill(masked, -INF)
    value, gradient = student_gradient(student, teacher, kind, **options)
    assert list(value.shape) == shape
    assert (value >= -1e-12).all() and value.isfinite().all()
    assert (value <= upper_bound(kind, options) + 1e-12).all()
    assert gradient.isfinite().all() and (gradient[masked] == 0).all()
    # A softmax does not see a shift of its logits.
    assert gradient.sum(-1).abs().max() < 1e-9 * max(1.0, scale)
    # Pinsker's inequality.
    total_variation = divergence(student, teacher, "tvd")
    assert (2 * total_variation.square() <= divergence(student, teacher, "forward_kl") + 1e-12).all()


@quick
@given(case=st.sampled_from(CASES), seed=st.integers(0, 10**6))
def test_impossible_tokens_anywhere_give_no_nan(case: Case, seed: int) -> None:
    kind, options = case
    student, teacher = normal(seed, 4, 6), normal(seed + 1, 4, 6)
    student[:, 1:][normal(seed + 2, 4, 5) > 0.5] = -INF
    teacher[:, :-1][normal(seed + 3, 4, 5) > 0.5] = -INF
    value, gradient = student_gradient(student, teacher, kind, **options)
    assert not value.isnan().any() and gradient.isfinite().all()
    assert value.isfinite().all() or kind in ("forward_kl", "reverse_kl")
    assert (gradient[value.isinf()] == 0).all() and (gradient[student == -INF] == 0).all()


@every_case
def test_half_precision_is_computed_in_float32(kind: Kind, options: dict[str, float]) -> None:
    student, teacher = normal(13, 4, 50), normal(14, 4, 50)
    for dtype in (torch.bfloat16, torch.float16):
        low = divergence(student.to(dtype), teacher.to(dtype), kind, **options)
        same_numbers = divergence(student.to(dtype).float(), teacher.to(dtype).float(), kind, **options)
        assert low.dtype == torch.float32 and torch.equal(low, same_numbers)
    assert divergence(student, teacher, kind, **options).dtype == torch.float64


def test_bad_divergences_are_refused() -> None:
    a, b = torch.zeros(2, 5), torch.zeros(2, 6)
    with pytest.raises(AlignmentError, match="tokenizer"):
        divergence(a, b, "jsd")
    with pytest.raises(UnknownName, match="reverse_kl"):
        divergence(a, a, "reverse_lk")  # type: ignore[arg-type]
    for beta, instead in ((0.0, "forward_kl"), (1.0, "reverse_kl"), (-0.1, "strictly between")):
        with pytest.raises(ConfigError, match=instead):
            divergence(a, a, "jsd", beta=beta)
    ends: list[tuple[Kind, str]] = [
        ("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl"), ("alpha", "limit"),
    ]  # fmt: skip
    for kind, instead in ends:
        for alpha in (0.0, 1.0, math.nan):
            with pytest.raises(ConfigError, match=instead):
                divergence(a, a, kind, alpha=alpha)
    with pytest.raises(ConfigError, match="temperature"):
        divergence(a, a, "forward_kl", temperature_teacher=0.0)
