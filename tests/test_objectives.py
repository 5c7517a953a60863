"""Objectives against closed forms, finite differences and exact expectations, in float64."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError, UnknownName
from opd_agents.objectives import (
    DIVERGENCES,
    Kind,
    divergence,
)

KINDS: list[Kind] = sorted(DIVERGENCES)
INF = math.inf
quick = settings(max_examples=25, deadline=None, derandomize=True)


def normal(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student_gradient(student: Tensor, teacher: Tensor, kind: Kind, **options: float) -> tuple[Tensor, Tensor]:
    logits = student.clone().requires_grad_()
    value = divergence(logits, teacher, kind, **options)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


# Divergences


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.3)])
def test_values_agree_with_scipy(temperatures: tuple[float, float]) -> None:
    student, teacher = normal(0, 5, 9), normal(1, 5, 9)
    q = (student / temperatures[0]).softmax(-1).numpy()
    p = (teacher / temperatures[1]).softmax(-1).numpy()
    expected: dict[Kind, np.ndarray] = {
        "forward_kl": scipy_entropy(p, q, axis=-1),
        "reverse_kl": scipy_entropy(q, p, axis=-1),
        "jsd": jensenshannon(p, q, axis=-1) ** 2,
    }
    for kind, values in expected.items():
        ours = divergence(
            student, teacher, kind, temperature_student=temperatures[0], temperature_teacher=temperatures[1]
        )
        np.testing.assert_allclose(ours.numpy(), values, rtol=1e-12, err_msg=kind)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_passes_finite_differences(kind: Kind, beta: float) -> None:
    student, teacher = normal(2, 3, 6).requires_grad_(), normal(3, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: divergence(s, teacher, kind, beta=beta, temperature_student=0.8, temperature_teacher=1.2),
        (student,),
    )
    divergence(student, teacher, kind, beta=beta).sum().backward()
    assert teacher.grad is None


def test_gradient_agrees_with_closed_forms() -> None:
    student, teacher, beta, temperature = normal(4, 7, 11), normal(5, 7, 11), 0.3, 0.6
    log_q = (student / temperature).log_softmax(-1)
    log_p = teacher.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    reverse = (q * (log_q - log_p)).sum(-1, keepdim=True)
    to_mixture = (q * (log_q - log_m)).sum(-1, keepdim=True)
    expected: dict[Kind, Tensor] = {
        "forward_kl": q - p,
        "reverse_kl": q * (log_q - log_p - reverse),
        "jsd": (1 - beta) * q * (log_q - log_m - to_mixture),
    }
    for kind, gradient in expected.items():
        ours = student_gradient(student, teacher, kind, beta=beta, temperature_student=temperature)[1]
        torch.testing.assert_close(ours, gradient / temperature, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("beta", [0.2, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_and_no_gradient(kind: Kind, beta: float) -> None:
    value, gradient = student_gradient(normal(8, 4, 10), normal(8, 4, 10), kind, beta=beta)
    assert value.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_jsd_swaps_its_sides_with_beta_and_tends_to_the_two_kls() -> None:
    student, teacher = normal(9, 4, 10), normal(10, 4, 10)
    for beta in (0.5, 0.2):
        swapped = divergence(teacher, student, "jsd", beta=1 - beta)
        torch.testing.assert_close(
            divergence(student, teacher, "jsd", beta=beta), swapped, rtol=1e-12, atol=1e-14
        )
    small = 1e-6
    forward = divergence(student, teacher, "jsd", beta=small) / small
    torch.testing.assert_close(forward, divergence(student, teacher, "forward_kl"), rtol=1e-4, atol=0)
    reverse = divergence(student, teacher, "jsd", beta=1 - small) / small
    torch.testing.assert_close(reverse, divergence(student, teacher, "reverse_kl"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_impossible_on_both_sides_change_nothing(kind: Kind) -> None:
    student, teacher = normal(11, 3, 7), normal(12, 3, 7)
    impossible = torch.full((3, 2), -INF, dtype=torch.float64)
    value, gradient = student_gradient(student, teacher, kind)
    padded = student_gradient(
        torch.cat([student, impossible], -1), torch.cat([teacher, impossible], -1), kind
    )
    torch.testing.assert_close(padded[0], value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(padded[1], torch.nn.functional.pad(gradient, (0, 2)), rtol=1e-12, atol=1e-14)


def test_tokens_impossible_on_one_side() -> None:
    logits = torch.zeros(2, 3, dtype=torch.float64)
    narrow = logits.clone()
    narrow[0, 2] = -INF  # the second row stays regular
    expected: dict[tuple[Kind, str], float] = {  # (kind, which side is narrow): value of the first row
        ("forward_kl", "student"): INF,
        ("forward_kl", "teacher"): math.log(3 / 2),
        ("reverse_kl", "student"): math.log(3 / 2),
        ("reverse_kl", "teacher"): INF,
    }
    mixture = [5 / 12, 5 / 12, 1 / 6]
    jsd = 0.5 * scipy_entropy([1 / 3] * 3, mixture) + 0.5 * scipy_entropy([0.5, 0.5, 0], mixture)
    for side in ("student", "teacher"):
        expected["jsd", side] = jsd
    for (kind, side), value in expected.items():
        pair = (narrow, logits) if side == "student" else (logits, narrow)
        ours, gradient = student_gradient(*pair, kind)
        assert ours[0].item() == pytest.approx(value, rel=1e-13), (kind, side)
        assert ours[1].abs() < 1e-15 and gradient.isfinite().all()
        assert (gradient[0] == 0).all() if value == INF else gradient[0].isfinite().all()


@quick
@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    vocabulary=st.integers(2, 12),
    kind=st.sampled_from(KINDS),
    beta=st.floats(0.01, 0.99),
    scale=st.sampled_from([0.1, 3.0, 300.0]),
    seed=st.integers(0, 10**6),
)
def test_divergence_is_a_divergence(
    shape: list[int], vocabulary: int, kind: Kind, beta: float, scale: float, seed: int
) -> None:
    student = normal(seed, *shape, vocabulary, scale=scale)
    teacher = normal(seed + 1, *shape, vocabulary, scale=scale)
    masked = normal(seed + 2, *shape, vocabulary) > 1
    masked[..., 0] = False
    student, teacher = student.masked_fill(masked, -INF), teacher.masked_fill(masked, -INF)
    value, gradient = student_gradient(student, teacher, kind, beta=beta)
    assert list(value.shape) == shape
    assert (value >= -1e-12).all() and value.isfinite().all()
    assert gradient.isfinite().all() and (gradient[masked] == 0).all()
    # A softmax does not see a shift of its logits.
    assert gradient.sum(-1).abs().max() < 1e-9 * max(1.0, scale)
    if kind == "jsd":
        assert (value <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind: Kind) -> None:
    student, teacher = normal(13, 4, 50), normal(14, 4, 50)
    for dtype in (torch.bfloat16, torch.float16):
        low = divergence(student.to(dtype), teacher.to(dtype), kind)
        same_numbers = divergence(student.to(dtype).float(), teacher.to(dtype).float(), kind)
        assert low.dtype == torch.float32 and torch.equal(low, same_numbers)
    assert divergence(student, teacher, kind).dtype == torch.float64


def test_bad_divergences_are_refused() -> None:
    a, b = torch.zeros(2, 5), torch.zeros(2, 6)
    with pytest.raises(AlignmentError, match="tokenizer"):
        divergence(a, b, "jsd")
    with pytest.raises(UnknownName, match="reverse_kl"):
        divergence(a, a, "reverse_lk")  # type: ignore[arg-type]
    for beta, instead in ((0.0, "forward_kl"), (1.0, "reverse_kl"), (-0.1, "strictly between")):
        with pytest.raises(ConfigError, match=instead):
            divergence(a, a, "jsd", beta=beta)
    with pytest.raises(ConfigError, match="temperature"):
        divergence(a, a, "forward_kl", temperature_teacher=0.0)
