"""The fused divergence against `divergence`, `token_terms`, finite differences and TRL's own fused kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_agents.errors import AlignmentError, ConfigError, UnknownName
from opd_agents.objectives import (
    DIVERGENCES,
    FullTarget,
    FusedDivergence,
    Kind,
    Measure,
    divergence,
    fused_divergence,
    token_terms,
)

KINDS: list[Kind] = list(DIVERGENCES)
TEMPERATURES: dict[str, Any] = {"temperature_student": 1.3, "temperature_teacher": 0.8}


def sides(
    rows: int = 6, vocabulary: int = 11, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Hidden states, projections and weights of positions; the two models' widths differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student_hidden": draw(rows, 5).requires_grad_(),
        "student_weight": draw(vocabulary, 5).requires_grad_(),
        "student_bias": draw(vocabulary).requires_grad_(),
        "teacher_hidden": draw(rows, 3),
        "teacher_weight": draw(vocabulary, 3),
        "teacher_bias": draw(vocabulary),
        "weights": draw(rows),
    }


def leaves(of: dict[str, Any]) -> list[Tensor]:
    return [of["student_hidden"], of["student_weight"], of["student_bias"]]


def plain(of: dict[str, Any], kind: Kind, **options: float) -> FusedDivergence:
    """The same by `divergence` and autograd, on all logits at once."""
    q = of["student_hidden"] @ of["student_weight"].T + of["student_bias"]
    p = of["teacher_hidden"] @ of["teacher_weight"].T + of["teacher_bias"]
    value = divergence(q, p, kind, **options)
    entropies = [
        torch.distributions.Categorical(logits=logits / options.get(f"temperature_{whose}", 1.0)).entropy()
        for whose, logits in (("student", q.clamp_min(-1e9)), ("teacher", p.clamp_min(-1e9)))
    ]
    return FusedDivergence((of["weights"] * value).sum(), value, *entropies)


def assert_same(mine: FusedDivergence, right: FusedDivergence, of: dict[str, Any], **tolerance: Any) -> None:
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, **tolerance)
    gradients = torch.autograd.grad(mine.loss, leaves(of)), torch.autograd.grad(right.loss, leaves(of))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_value_gradient_and_entropies_are_those_of_autograd(
    kind: Kind, alpha: float, chunk_rows: int
) -> None:
    of, options = sides(), {"beta": 0.3, "alpha": alpha, **TEMPERATURES}
    mine = fused_divergence(**of, **options, kind=kind, chunk_rows=chunk_rows)
    assert not any(term.requires_grad for term in mine[1:])
    assert_same(mine, plain(of, kind, **options), of, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_finite_differences(kind: Kind) -> None:
    of = sides(rows=3, vocabulary=5)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inputs = of | {"student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        return fused_divergence(**inputs, kind=kind, chunk_rows=2, **TEMPERATURES).loss

    assert torch.autograd.gradcheck(loss, leaves(of))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_weighted_sum_of_token_terms(kind: Kind) -> None:
    of = sides()
    terms = token_terms(
        of["student_hidden"],
        lambda hidden: hidden @ of["student_weight"].T + of["student_bias"],
        torch.zeros(6, dtype=torch.long),
        targets={
            "p": FullTarget(of["teacher_hidden"], lambda h: h @ of["teacher_weight"].T + of["teacher_bias"])
        },
        measures={"c": ("p", Measure(kind))},
        chunk_elements=22,
    )
    value = terms.divergences["c"]
    right = FusedDivergence(
        (of["weights"] * value).sum(), value.detach(), terms.entropy.detach(), plain(of, kind).teacher_entropy
    )
    assert_same(fused_divergence(**of, kind=kind), right, of, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 5),
    vocabulary=st.integers(2, 9),
    padded=st.integers(0, 3),
    masked=st.integers(0, 3),
    chunk_rows=st.integers(1, 6),
    scale=st.sampled_from([0.1, 1.0, 30.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_padded_vocabularies_and_masked_positions_change_nothing(
    kind: Kind, rows: int, vocabulary: int, padded: int, masked: int, chunk_rows: int, scale: float,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    of = {name: scale * x.detach() if "hidden" in name else x.detach() for name, x in
          sides(rows, vocabulary, seed=seed, dtype=dtype).items()}  # fmt: skip
    more = sides(rows + masked, vocabulary + padded, seed=seed + 1, dtype=dtype)
    padding = {name: x.detach().clone() for name, x in more.items()}
    for name, x in of.items():
        padding[name][tuple(slice(length) for length in x.shape)] = x
        if name.endswith("bias"):
            padding[name][vocabulary:] = -math.inf
    padding["weights"][rows:] = 0
    for inputs in (of, padding):
        for leaf in leaves(inputs):
            leaf.requires_grad_()
    small = fused_divergence(**of, kind=kind, chunk_rows=chunk_rows)
    large = fused_divergence(**padding, kind=kind, chunk_rows=chunk_rows)
    tolerance: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-4 * scale} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    )
    for a, b in zip(small, large, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b[:rows] if b.dim() else b, **tolerance)
    ours = torch.autograd.grad(small.loss, leaves(of))
    for a, b in zip(ours, torch.autograd.grad(large.loss, leaves(padding)), strict=True):
        kept = tuple(slice(length) for length in a.shape)
        torch.testing.assert_close(a, b[kept], **tolerance)
        rest = b.clone()
        rest[kept] = 0
        assert not rest.any()
    if rows:
        right = plain(padding, kind)
        torch.testing.assert_close(large.divergence, right.divergence, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_and_no_gradient(kind: Kind) -> None:
    of = sides()
    of |= {f"teacher_{what}": of[f"student_{what}"].detach() for what in ("hidden", "weight", "bias")}
    mine = fused_divergence(**of, kind=kind, temperature_student=0.7, temperature_teacher=0.7)
    assert mine.divergence.abs().max() < 1e-12
    for gradient in torch.autograd.grad(mine.loss, leaves(of)):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("jsd", 0.3), ("reverse_kl", 1.0)])
def test_it_agrees_with_the_chunked_divergence_of_trl(kind: Kind, beta: float) -> None:
    chunked = pytest.importorskip("trl.trainer.distillation_trainer")
    of = sides(dtype=torch.float32)
    of["weights"] = torch.full((6,), 1 / 6)
    loss, entropies, _ = chunked._chunked_divergence_loss(
        of["student_hidden"][None], of["teacher_hidden"][None], of["student_weight"], of["teacher_weight"],
        torch.ones(1, 6), beta, student_lm_head_bias=of["student_bias"],
        teacher_lm_head_bias=of["teacher_bias"], temperature=0.9,
    )  # fmt: skip
    mine = fused_divergence(
        **of, kind=kind, beta=beta or 0.5, temperature_student=0.9, temperature_teacher=0.9
    )
    torch.testing.assert_close(mine.student_entropy.sum(), entropies, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.loss, loss, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(mine.loss, leaves(of)), torch.autograd.grad(loss, leaves(of))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_and_summed_in_float32() -> None:
    of = sides(rows=40, dtype=torch.bfloat16)
    mine = fused_divergence(**of, kind="jsd", chunk_rows=1)
    exact = {name: x.detach().float().requires_grad_(x.requires_grad) for name, x in of.items()}
    right = fused_divergence(**exact, kind="jsd")
    torch.testing.assert_close(mine.loss, right.loss)
    assert mine.divergence.dtype == torch.float32
    gradients = torch.autograd.grad(mine.loss, leaves(of)), torch.autograd.grad(right.loss, leaves(exact))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused_divergence(**exact, kind="jsd").loss, right.loss)


def test_a_scaled_loss_has_scaled_gradients_and_a_frozen_projection_none() -> None:
    of = sides()
    once = torch.autograd.grad(fused_divergence(**of, kind="jsd").loss, leaves(of))
    twice = torch.autograd.grad(-2 * fused_divergence(**of, kind="jsd").loss, leaves(of))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(-2 * a, b)
    frozen = of | {
        "student_weight": of["student_weight"].detach(),
        "student_bias": of["student_bias"].detach(),
    }
    fused_divergence(**frozen, kind="jsd").loss.backward()
    torch.testing.assert_close(of["student_hidden"].grad, once[0])
    with torch.no_grad():
        assert not fused_divergence(**of, kind="jsd").loss.requires_grad


def test_an_unscaled_loss_hands_out_its_gradients_without_a_copy() -> None:
    of = sides()
    loss = fused_divergence(**of, kind="jsd").loss
    assert loss.grad_fn is not None
    addresses = [gradient.data_ptr() for gradient in loss.grad_fn.saved_tensors]  # type: ignore[attr-defined]
    loss.backward()
    assert addresses == [leaf.grad.data_ptr() for leaf in leaves(of) if leaf.grad is not None]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_larger_than_a_chunk_or_the_weight(kind: Kind) -> None:
    of = sides(rows=100, vocabulary=40)
    with Largest() as largest:
        fused_divergence(**of, kind=kind, chunk_rows=25).loss.backward()
    assert largest.elements == 1000  # of 4,000 logits


def test_near_both_ends_alpha_is_a_kl_in_float32_as_well() -> None:
    of = sides(dtype=torch.float32)
    ends: list[tuple[float, Kind]] = [(1e-6, "reverse_kl"), (1 - 1e-6, "forward_kl")]
    for alpha, kind in ends:
        near = fused_divergence(**of, kind="alpha", alpha=alpha)
        assert_same(near, fused_divergence(**of, kind=kind), of, rtol=1e-3, atol=1e-4)


def test_a_kl_that_is_infinite_everywhere_is_refused_by_the_token() -> None:
    of = {name: x.detach() for name, x in sides().items()}
    of["student_bias"][4] = -math.inf
    with pytest.raises(
        AlignmentError, match=r"student's bias takes out token 4.*every forward_kl is infinite"
    ):
        fused_divergence(**of, kind="forward_kl")
    for kind in KINDS:  # the others are finite
        if kind != "forward_kl":
            assert fused_divergence(**of, kind=kind).loss.isfinite()
    without = {name: x for name, x in of.items() if name != "teacher_bias"}
    with pytest.raises(AlignmentError, match="token 4"):
        fused_divergence(**without, kind="forward_kl")
    of["teacher_bias"][4] = -math.inf
    assert fused_divergence(**of, kind="forward_kl").loss.isfinite()


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"kind": "kl"}, UnknownName, "kl"),
        ({"kind": "jsd", "beta": 1.0}, ConfigError, "strictly between 0 and 1"),
        ({"kind": "skew_kl", "alpha": 0.0}, ConfigError, "strictly between 0 and 1"),
        ({"temperature_student": 0.0}, ConfigError, "temperature is 0.0"),
        ({"weights": torch.ones(5)}, AlignmentError, "one weight each"),
        ({"teacher_hidden": torch.ones(5, 3)}, AlignmentError, "5 of the teacher"),
        ({"teacher_hidden": torch.ones(6, 4)}, AlignmentError, r"weight \[11, 3\] \[V, H\]"),
        ({"teacher_weight": torch.ones(12, 3), "teacher_bias": None}, AlignmentError, "has 12 entries"),
        ({"student_bias": torch.ones(12)}, AlignmentError, r"student's bias is \[12\], not \[11\]"),
    ],
)
def test_bad_input_is_told(changed: dict[str, Any], error: type[Exception], told: str) -> None:
    inputs: dict[str, Any] = sides(dtype=torch.float32) | {"kind": "reverse_kl"} | changed
    with pytest.raises(error, match=told):
        fused_divergence(**inputs)
