"""A weighted sum of divergences whose gradient is taken in the forward pass.

`token_terms` gives terms that any later arithmetic may differentiate, and pays by computing each chunk anew
in the backward pass. Where the weight of every position is known beforehand, the gradient of sum_t w_t D_t is
known as soon as the logits are: these turn into it in place, and are spent at once on the gradients of the
hidden states and of the projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends import mkldnn
from torch.linalg import vecdot

from opd_agents.errors import AlignmentError
from opd_agents.objectives.divergence import Kind, at_least_float32, check_kind, check_temperature
from opd_agents.objectives.slopes import SLOPES, Pair, Sloped

CHUNK_ROWS = 64  # from a width of 256 on, four chunks of logits take no more than the weight's gradient
BLOCK_ELEMENTS = 2**18  # of a chunk: what a CPU works on at once, so that it stays in the cache
ABSENT = -1e30  # for a logit of -inf: exp gives 0 all the same, and 0 * ABSENT is no NaN


class FusedDivergence(NamedTuple):
    """A loss, and what the same pass tells of its N positions; nats, at least float32."""

    loss: Tensor
    """Scalar sum_t w_t D_t, differentiable in the student's hidden states, weight and bias."""
    divergence: Tensor
    """``[N]``, D_t before the weights; like the entropies, without gradient."""
    student_entropy: Tensor
    """``[N]``, of the student's distribution at ``temperature_student``."""
    teacher_entropy: Tensor
    """``[N]``, of the teacher's at ``temperature_teacher``."""


def fused_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    weights: Tensor,
    kind: Kind,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature_student: float = 1.0,
    temperature_teacher: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> FusedDivergence:
    """The loss sum_t w_t D_t of N positions and its gradient, in one pass over the logits.

    Arguments: ``student_hidden [N, Hs]`` and ``teacher_hidden [N, Ht]``, the states that *predict* the action
    tokens (rows gathered by the caller, shifted by one); ``student_weight [V, Hs]`` and ``student_bias [V]``
    of the output projection, likewise the teacher's; ``weights [N]``, detached. Nothing is averaged: divide
    the weights by what the loss is to be a mean over, and multiply them by its coefficient (a loss that is
    scaled afterwards costs a copy of the gradients). ``kind``, ``beta``, ``alpha`` and the temperatures as in
    `divergence`, whose value and gradient these are. The teacher is read without gradient.

    Half-precision inputs are computed, and gradients summed, in float32, float64 in float64; a gradient comes
    in the dtype of its input. A bias of -inf takes a token out of the vocabulary. The logits are there for
    ``chunk_rows`` positions at a time: the peak is the gradients, four such chunks [chunk_rows, V], and
    half-precision weights once more in float32, whatever N is. On a GPU the same operations run one by one,
    on whole chunks, without a kernel of their own.

    Raises AlignmentError where shapes do not fit together, and where a token that one model's bias takes out
    makes every forward or reverse KL infinite; and what `divergence` raises for ``kind`` and its parameters.
    """
    check_kind(kind, beta, alpha)
    inputs = (student_hidden, student_weight, student_bias)
    theirs = (teacher_hidden, teacher_weight, teacher_bias)
    _check_shapes(inputs, theirs, weights)
    _check_support(kind, student_bias, teacher_bias)

    def sloped(pair: Pair) -> Sloped:
        return SLOPES[kind](pair, beta, alpha)

    wanted = [torch.is_grad_enabled() and of is not None and of.requires_grad for of in inputs]
    dtype = torch.promote_types(at_least_float32(student_hidden).dtype, teacher_hidden.dtype)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        student = _Projection(*inputs, temperature_student, dtype)
        teacher = _Projection(*theirs, temperature_teacher, dtype)
        weights = weights.to(dtype)
        terms, gradients = _one_pass(student, teacher, weights, sloped, wanted, chunk_rows)
        loss = weights @ terms[0]
    return FusedDivergence(_Known.apply(loss, gradients, *inputs), *terms)


class _Known(torch.autograd.Function):
    """A loss whose gradients in some inputs are known; None for an input that needs none."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> Tensor:
        # the inputs' own dtypes, here: after the last chunk, so that no second copy stands beside the chunks
        ctx.save_for_backward(
            *(
                None if grad is None or of is None else grad.to(of.dtype)
                for grad, of in zip(gradients, inputs, strict=True)
            )
        )
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # Unscaled they are handed out as they are, and become the `.grad` of a parameter without a copy.
        as_is = bool(scale == 1)
        scaled = (
            grad if grad is None or as_is else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return None, None, *scaled


class _Projection:
    """One model's logits over its temperature, from hidden states [N, H], weight [V, H] and bias [V]."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype
    ) -> None:
        check_temperature(temperature)
        self.temperature, self.weight = temperature, weight.detach().to(dtype)
        hidden = hidden.detach().to(dtype)
        self.hidden = hidden if temperature == 1 else hidden / temperature
        self.bias = None if bias is None else (bias.detach().to(dtype) / temperature).clamp_min(ABSENT)

    def logits(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and mkldnn.is_available():
            # oneDNN uses the widest vectors of any maker's processor; the BLAS of most builds of torch, which
            # is called otherwise, does so on its own maker's only.
            return F.linear(hidden.to_mkldnn(), self.weight, self.bias).to_dense()
        return F.linear(hidden, self.weight, self.bias)


def _one_pass(
    student: _Projection,
    teacher: _Projection,
    weights: Tensor,
    sloped: Callable[[Pair], Sloped],
    wanted: Sequence[bool],
    chunk_rows: int,
) -> tuple[Tensor, list[Tensor | None]]:
    """Divergence and both entropies [3, N], and those gradients of sum_t w_t D_t that are wanted: in the
    student's hidden states, weight and bias."""
    terms = student.hidden.new_empty(3, len(weights))
    gradients = [
        torch.zeros_like(of) if want and of is not None else None
        for of, want in zip((student.hidden, student.weight, student.bias), wanted, strict=True)
    ]
    of_hidden, of_weight, of_bias = gradients
    for start in range(0, len(weights), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = student.logits(rows)
        _differentiate(logits, teacher.logits(rows), terms[:, rows], sloped)
        # the weights of rows, and 1 / temperature, go to the narrow side of each product
        if of_hidden is not None:
            torch.mm(logits, student.weight, out=of_hidden[rows])
        if of_weight is not None:
            of_weight.addmm_(logits.T, student.hidden[rows] * weights[rows, None])
        if of_bias is not None:
            of_bias.addmv_(logits.T, weights[rows])
    if of_hidden is not None:
        of_hidden.mul_(weights[:, None] / student.temperature)
    if of_bias is not None:
        of_bias.div_(student.temperature)
    return terms, gradients


def _differentiate(
    logits: Tensor, teacher_logits: Tensor, terms: Tensor, sloped: Callable[[Pair], Sloped]
) -> None:
    """Turn the student's logits [n, V] into the gradient of the divergence, and fill the terms [3, n]."""
    n, vocabulary = logits.shape
    size = max(1, BLOCK_ELEMENTS // vocabulary) if logits.device.type == "cpu" else max(1, n)
    for start in range(0, n, size):
        rows = slice(start, start + size)
        log_q, log_p = torch.log_softmax(logits[rows], -1), torch.log_softmax(teacher_logits[rows], -1)
        # faster on a CPU than exp of what there is already
        q, p = torch.softmax(logits[rows], -1), torch.softmax(teacher_logits[rows], -1)
        terms[1, rows], terms[2, rows] = -vecdot(q, log_q), -vecdot(p, log_p)
        terms[0, rows], slope = sloped(Pair(log_q, log_p, q, p))
        # through the softmax, into the logits' place
        torch.addcmul(slope, q, slope.sum(-1, keepdim=True), value=-1, out=logits[rows])


_Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


def _check_shapes(student: _Inputs, teacher: _Inputs, weights: Tensor) -> None:
    rows, vocabulary = len(student[0]), len(student[1])
    for whose, (hidden, weight, bias) in (("student", student), ("teacher", teacher)):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise AlignmentError(
                f"fused_divergence: the {whose}'s hidden states {list(hidden.shape)} must be [N, H], and its "
                f"weight {list(weight.shape)} [V, H]."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise AlignmentError(
                f"fused_divergence: the {whose}'s bias is {list(bias.shape)}, not {list(weight.shape[:1])}."
            )
    if len(teacher[0]) != rows or weights.shape != (rows,):
        raise AlignmentError(
            f"fused_divergence: {rows} positions of the student, {len(teacher[0])} of the teacher and "
            f"weights {list(weights.shape)}; give all of the same positions, one weight each."
        )
    if len(teacher[1]) != vocabulary:
        raise AlignmentError(
            f"fused_divergence: the teacher's vocabulary has {len(teacher[1])} entries, the student's "
            f"{vocabulary}. Use models that share their tokenizer, and cut padded entries off the larger."
        )


def _check_support(kind: Kind, student_bias: Tensor | None, teacher_bias: Tensor | None) -> None:
    """A token that only the first distribution of a KL has, has mass there at every position."""
    sides = {"student": student_bias, "teacher": teacher_bias}
    of_kind = {"forward_kl": ("teacher", "student"), "reverse_kl": ("student", "teacher")}
    if kind not in of_kind:
        return
    first, second = of_kind[kind]
    if (bias := sides[second]) is None:
        return
    lacking = bias == -math.inf
    if (bias := sides[first]) is not None:
        lacking &= bias != -math.inf
    if bool(lacking.any()):
        raise AlignmentError(
            f"fused_divergence: the {second}'s bias takes out token {int(lacking.nonzero()[0])}, which the "
            f"{first} has: every {kind} is infinite. Take the token out of both, or use jsd."
        )
