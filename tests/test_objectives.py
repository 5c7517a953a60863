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
from torch.utils._python_dispatch import TorchDispatchMode

from opd_agents.errors import AlignmentError, ConfigError, UnknownName
from opd_agents.objectives import (
    DIVERGENCES,
    Denominator,
    Kind,
    Normalise,
    TokenTerms,
    divergence,
    group_advantages,
    ppo_surrogate,
    token_coefficients,
    token_terms,
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


def test_reverse_kl_gradient_is_the_expected_sampled_token_policy_gradient() -> None:
    student, teacher = normal(6, 8), normal(7, 8)
    logits = student.clone().requires_grad_()
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    expected = torch.zeros(8, dtype=torch.float64)
    for token in range(8):
        surrogate = ppo_surrogate(
            log_q[token], log_q[token].detach(), log_p[token] - log_q[token], clip_low=0.2, clip_high=0.2
        )
        (gradient,) = torch.autograd.grad(surrogate.loss, logits, retain_graph=True)
        expected += log_q[token].exp().detach() * gradient
    torch.testing.assert_close(
        student_gradient(student, teacher, "reverse_kl")[1], expected, rtol=0, atol=1e-13
    )


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


# Token terms


class Case:
    """Two linear models with tied shapes: rows, hidden sizes 5 (student) and 3 (teacher), vocabulary 13."""

    def __init__(self, rows: int = 17, dtype: torch.dtype = torch.float64) -> None:
        self.hidden = normal(20, rows, 5).to(dtype).requires_grad_()
        self.weight = normal(21, 13, 5).to(dtype).requires_grad_()
        self.teacher_hidden = normal(22, rows, 3).to(dtype)
        self.teacher_weight = normal(23, 13, 3).to(dtype).requires_grad_()
        self.ids = torch.randint(13, (rows,), generator=torch.Generator().manual_seed(24))
        self.largest_projection = 0

    def student_head(self, hidden: Tensor) -> Tensor:
        self.largest_projection = max(self.largest_projection, len(hidden))
        return hidden @ self.weight.T

    def terms(self, kind: Kind | None, **options: Any) -> TokenTerms:
        def teacher_head(hidden: Tensor) -> Tensor:
            return hidden @ self.teacher_weight.T

        return token_terms(
            self.hidden, self.student_head, self.teacher_hidden, teacher_head, self.ids, kind=kind, **options
        )

    def gradients(self, terms: TokenTerms) -> tuple[Tensor, ...]:
        """Of a sum in which every term of every token has a coefficient of its own."""
        mix = normal(25, 3, len(self.ids)).to(self.hidden.dtype)
        total = torch.stack([c @ term for c, term in zip(mix, terms, strict=True) if term is not None]).sum()
        inputs = (self.hidden, self.weight, self.teacher_weight)
        *student, teacher = torch.autograd.grad(total, inputs, allow_unused=True)
        assert teacher is None
        return tuple(student)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_terms_are_those_of_the_tempered_logits(kind: Kind | None) -> None:
    case, temperature = Case(), 0.7
    terms = case.terms(kind, beta=0.3, temperature=temperature)
    student = case.hidden @ case.weight.T
    q = torch.distributions.Categorical(logits=student / temperature)
    torch.testing.assert_close(terms.logprob, q.log_prob(case.ids), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.entropy, q.entropy(), rtol=1e-12, atol=1e-14)
    if kind is None:
        assert terms.divergence is None
        return
    teacher = case.teacher_hidden @ case.teacher_weight.T
    t = {"temperature_student": temperature, "temperature_teacher": temperature}
    torch.testing.assert_close(terms.divergence, divergence(student, teacher, kind, beta=0.3, **t))


@pytest.mark.parametrize("chunk_elements", [1, 13 * 4, 13 * 16 + 5])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_chunks_change_neither_values_nor_gradients(kind: Kind | None, chunk_elements: int) -> None:
    case = Case()
    whole = case.terms(kind, temperature=1.4)
    chunked = case.terms(kind, temperature=1.4, chunk_elements=chunk_elements)
    for ours, expected in zip(chunked, whole, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for ours, expected in zip(case.gradients(chunked), case.gradients(whole), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_chunks_never_hold_the_logits_of_all_tokens() -> None:
    rows, vocabulary = 64, 13
    measured = {}
    for chunk_elements in (rows * vocabulary, 8 * vocabulary):
        case, saved = Case(rows), [0]

        def remember(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with LargestTensor() as largest:
            with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
                terms = case.terms("jsd", chunk_elements=chunk_elements)
            case.gradients(terms)
        measured[chunk_elements] = (sum(saved), largest.elements, case.largest_projection)
    saved_elements, any_elements, projected_rows = measured[rows * vocabulary]
    assert saved_elements > 5 * rows * vocabulary and (any_elements, projected_rows) == (
        rows * vocabulary,
        rows,
    )
    saved_elements, any_elements, projected_rows = measured[8 * vocabulary]
    assert projected_rows == 8
    assert saved_elements <= rows * 5 and any_elements <= rows * 5  # the hidden states themselves


def test_terms_upcast_and_allow_forbidden_tokens() -> None:
    low = Case(dtype=torch.bfloat16).terms("reverse_kl")
    assert {term.dtype for term in low if term is not None} == {torch.float32}
    hidden = normal(26, 3, 4).requires_grad_()
    forbidden = torch.tensor([0.0, 0.0, -INF, 0.0])

    def head(x: Tensor) -> Tensor:
        return x + forbidden

    ids = torch.tensor([0, 1, 3])
    terms = token_terms(hidden, head, hidden.detach() * 2, head, ids, kind="jsd", chunk_elements=4)
    total = torch.stack([term for term in terms if term is not None]).sum()
    (gradient,) = torch.autograd.grad(total, hidden)
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all()
    kept = hidden[:, [0, 1, 3]].detach()
    torch.testing.assert_close(terms.entropy, torch.distributions.Categorical(logits=kept).entropy())


def test_no_rows_give_empty_terms() -> None:
    terms = Case(rows=0).terms("forward_kl")
    assert [tuple(term.shape) for term in terms if term is not None] == [(0,)] * 3


def test_misaligned_terms_are_refused() -> None:
    case = Case(4)

    def wide(hidden: Tensor) -> Tensor:
        return hidden @ normal(27, 3, 14)

    arguments = (case.hidden, case.student_head, case.teacher_hidden)
    with pytest.raises(AlignmentError, match="14 entries"):
        token_terms(*arguments, wide, case.ids, kind="jsd")
    with pytest.raises(AlignmentError, match="action ids"):
        token_terms(*arguments, wide, case.ids[:3], kind=None)
    with pytest.raises(AlignmentError, match="vocabulary of 13"):
        token_terms(*arguments, wide, case.ids + 13, kind=None)
    with pytest.raises(AlignmentError, match="3 of the teacher"):
        token_terms(*arguments[:2], case.teacher_hidden[:3], wide, case.ids, kind="jsd")
    with pytest.raises(ConfigError, match="hidden states"):
        token_terms(*arguments[:2], None, None, case.ids, kind="jsd")


# Policy gradient


@quick
@given(sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_group_advantages_follow_the_plain_formula(sizes: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = random.permutation(np.repeat(10 * np.arange(len(sizes)) - 7, sizes))
    rewards = random.choice([0.0, 0.1, 0.5, 1.0], size=len(groups))
    scaled, centred = np.zeros_like(rewards), np.zeros_like(rewards)
    for group in set(groups):
        members = rewards[groups == group]
        if len(set(members)) > 1:
            centred[groups == group] = members - members.mean()
            scaled[groups == group] = (members - members.mean()) / (members.std(ddof=1) + 1e-3)
    ours = group_advantages(torch.tensor(rewards), torch.tensor(groups), normalise="std", eps=1e-3)
    np.testing.assert_allclose(ours, scaled, rtol=1e-12, atol=1e-13)
    ours = group_advantages(torch.tensor(rewards), torch.tensor(groups), normalise="none")
    np.testing.assert_allclose(ours, centred, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("normalise", ["std", "none"])
def test_constant_groups_have_exactly_no_advantage(normalise: Normalise) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 1.0, 0.0], dtype=torch.float64)
    assert rewards[:3].sum() / 3 != rewards[0]  # the mean rounds
    advantages = group_advantages(rewards, torch.tensor([4, 4, 4, 9, 2, 2]), normalise=normalise, eps=1e-12)
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[4] == -advantages[5] > 0


CLIP_TABLE = [  # advantage, ratio -> loss, clipped, d loss / d logprob (clip_low 0.2, clip_high 0.3)
    (2.0, 1.0, -2.0, False, -2.0),
    (2.0, 1.25, -2.5, False, -2.5),
    (2.0, 1.5, -2.6, True, 0.0),
    (2.0, 0.5, -1.0, False, -1.0),
    (-2.0, 1.0, 2.0, False, 2.0),
    (-2.0, 1.5, 3.0, False, 3.0),
    (-2.0, 0.9, 1.8, False, 1.8),
    (-2.0, 0.5, 1.6, True, 0.0),
    (0.0, 5.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize("advantage, ratio, loss, clipped, slope", CLIP_TABLE)
def test_surrogate_clips_pessimistically(
    advantage: float, ratio: float, loss: float, clipped: bool, slope: float
) -> None:
    behaviour = torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)
    logprobs = (behaviour.detach() + math.log(ratio)).requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64, requires_grad=True)
    surrogate = ppo_surrogate(logprobs, behaviour, advantages, clip_low=0.2, clip_high=0.3)
    surrogate.loss.sum().backward()
    assert surrogate.loss.item() == pytest.approx(loss)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(slope)
    assert surrogate.clipped.item() is clipped and surrogate.ratio.item() == pytest.approx(ratio)
    assert behaviour.grad is None and advantages.grad is None and not surrogate.ratio.requires_grad


def test_on_policy_surrogate_has_the_gradient_of_reinforce() -> None:
    logits, ids = normal(30, 6, 9).requires_grad_(), torch.tensor([0, 3, 8, 1, 1, 5])
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    advantages = normal(31, 6)
    ours = ppo_surrogate(logprobs, logprobs, advantages, clip_low=0.2, clip_high=0.2)
    reinforce = -(advantages * logprobs).sum()
    (expected,) = torch.autograd.grad(reinforce, logits, retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss.sum(), logits)[0], expected, rtol=1e-12, atol=1e-15
    )
    assert not ours.clipped.any() and (ours.ratio == 1).all()


def test_bad_policy_gradients_are_refused() -> None:
    three = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"Dr\. GRPO"):
        group_advantages(three, three.long(), normalise="mean")  # type: ignore[arg-type]
    with pytest.raises(AlignmentError):
        group_advantages(three, torch.zeros(2).long())
    with pytest.raises(ConfigError, match="clip_low"):
        ppo_surrogate(three, three, three, clip_low=-0.1, clip_high=0.2)
    with pytest.raises(AlignmentError, match="behaviour"):
        ppo_surrogate(three, torch.zeros(2), three, clip_low=0.2, clip_high=0.2)


# Reduction


def plain_mean(
    losses: np.ndarray, weights: np.ndarray, turns: np.ndarray, episodes: np.ndarray, denominator: Denominator
) -> float:
    """The denominators as loops; turns are counted within each episode."""
    values, used = weights * losses, weights != 0
    units = {
        "token": [used],
        "turn": [used & (episodes == e) & (turns == t) for e in set(episodes) for t in set(turns)],
        "episode": [used & (episodes == e) for e in set(episodes)],
    }
    if denominator == "constant":
        return float(values.sum() / 40)
    means = [values[unit].mean() for unit in units[denominator] if unit.any()]
    return float(np.mean(means)) if means else 0.0


@quick
@given(
    tokens=st.integers(1, 40),
    denominator=st.sampled_from(get_args(Denominator)),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_split_gives_the_gradient_of_the_mean(
    tokens: int, denominator: Denominator, kept: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    turns, episodes = random.integers(0, 4, tokens), random.integers(0, 3, tokens)
    weights = np.where(random.random(tokens) < kept, random.choice([1.0, 0.5, -2.0], tokens), 0.0)
    features, parameter = normal(seed, tokens, 3), normal(seed + 1, 3).requires_grad_()
    coefficients = token_coefficients(
        torch.tensor(weights),
        torch.tensor(turns),
        torch.tensor(episodes),
        denominator,
        40.0 if denominator == "constant" else None,
    )

    def losses(rows: Tensor) -> Tensor:
        return torch.tanh(features[rows] @ parameter).square()

    whole = (coefficients * losses(torch.arange(tokens))).sum()
    expected = plain_mean(
        losses(torch.arange(tokens)).detach().numpy(), weights, turns, episodes, denominator
    )
    assert whole.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    (gradient,) = torch.autograd.grad(whole, parameter)
    cuts = np.sort(random.integers(0, tokens + 1, random.integers(0, 6)))
    for part in np.split(random.permutation(tokens), cuts):
        rows = torch.tensor(part, dtype=torch.long)
        (coefficients[rows] * losses(rows)).sum().backward()
    torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


def test_zero_weights_leave_every_denominator_alone() -> None:
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    turns, episodes = torch.tensor([0, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 0, 1])
    third, quarter, half = 1 / 3, 1 / 4, 1 / 2
    expected: dict[Denominator, list[float]] = {
        "token": [third, third, 0, third, 0],
        "turn": [quarter, quarter, 0, half, 0],
        "episode": [third, third, 0, third, 0],
    }
    for denominator, values in expected.items():
        coefficients = token_coefficients(weights, turns, episodes, denominator)
        assert coefficients.tolist() == pytest.approx(values), denominator
        nothing = token_coefficients(torch.zeros(5), turns, episodes, denominator)
        assert nothing.tolist() == [0.0] * 5


def test_bad_denominators_are_refused() -> None:
    weights, index = torch.ones(3), torch.zeros(3).long()
    with pytest.raises(ConfigError, match="episode"):
        token_coefficients(weights, index, index, "sequence")  # type: ignore[arg-type]
    cases: list[tuple[Denominator, float | None]] = [("constant", None), ("constant", 0.0), ("token", 5.0)]
    for denominator, constant in cases:
        with pytest.raises(ConfigError, match="constant"):
            token_coefficients(weights, index, index, denominator, constant)
    with pytest.raises(AlignmentError):
        token_coefficients(weights, index[:2], index, "token")
