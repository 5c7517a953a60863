"""Terms of tokens against the tempered distributions they are of, in float64; chunks, memory, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import (
    FullTarget,
    Kind,
    Measure,
    SampledTarget,
    Target,
    TokenTerms,
    TopKTarget,
    divergence,
    token_terms,
)

INF, NAN = math.inf, math.nan
V, HIDDEN, TEACHER_HIDDEN, K = 13, 5, 3, 4
quick = settings(max_examples=15, deadline=None, derandomize=True)


def normal(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Of every signal, and of every way that a target can be known; the last two share a softmax with others.
MEASURES: dict[str, tuple[str, Measure]] = {
    "full": ("full", Measure("forward_kl", temperature_student=0.7, temperature_teacher=1.3)),
    "mine": ("full", Measure("reverse_kl", signal="student_top_k", k=K, tail="bucket")),
    "theirs": ("top", Measure("reverse_kl", signal="teacher_top_k", k=K, tail="sampled")),
    "one": ("sampled", Measure("reverse_kl", signal="sampled", estimator="k3", ratio="live")),
    "one of k": ("top", Measure("jsd", beta=0.3, signal="sampled")),
    "other": ("other", Measure("skew_reverse_kl", alpha=0.2, temperature_teacher=1.3)),
}


class Case:
    """A student of 13 tokens, two references whose logits are known, and their smaller signals."""

    def __init__(self, rows: int = 17, dtype: torch.dtype = torch.float64) -> None:
        self.hidden = normal(20, rows, HIDDEN).to(dtype).requires_grad_()
        self.weight = normal(21, V, HIDDEN).to(dtype).requires_grad_()
        self.states = {name: normal(22 + n, rows, TEACHER_HIDDEN).to(dtype) for n, name in enumerate("tu")}
        self.teacher_weight = normal(24, V, TEACHER_HIDDEN).to(dtype).requires_grad_()
        self.ids = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(25))
        self.behaviour = -normal(26, rows).abs()
        self.behaviour[::3] = NAN
        self.projected: dict[str, list[int]] = {"student": [], "teacher": []}

    def student_head(self, hidden: Tensor) -> Tensor:
        self.projected["student"].append(len(hidden))
        return hidden @ self.weight.T

    def teacher_head(self, hidden: Tensor) -> Tensor:
        self.projected["teacher"].append(len(hidden))
        return hidden @ self.teacher_weight.T

    def targets(self) -> dict[str, Target]:
        log_p = (self.states["t"].double() @ self.teacher_weight.detach().double().T).log_softmax(-1)
        of_action = log_p.gather(1, self.ids[:, None])[:, 0]
        best, ids = log_p.topk(K)
        return {
            "full": FullTarget(self.states["t"], self.teacher_head),
            "other": FullTarget(self.states["u"], self.teacher_head),
            "top": TopKTarget(ids, best, of_action),
            "sampled": SampledTarget(of_action),
        }

    def terms(self, measures: dict[str, tuple[str, Measure]] = MEASURES, **options: Any) -> TokenTerms:
        options.setdefault("behaviour", self.behaviour)
        targets = options.pop("targets", None) or self.targets()
        return token_terms(
            self.hidden, self.student_head, self.ids, targets=targets, measures=measures, **options
        )

    def gradients(self, terms: TokenTerms) -> tuple[Tensor, ...]:
        """Of a sum in which every term of every token has a coefficient of its own."""
        mixed = [c @ term for c, term in zip(normal(27, 9, len(self.ids)), flat(terms), strict=False)]
        inputs = (self.hidden, self.weight, self.teacher_weight)
        *student, teacher = torch.autograd.grad(torch.stack(mixed).sum(), inputs, allow_unused=True)
        assert teacher is None
        return tuple(student)


def flat(terms: TokenTerms) -> list[Tensor]:
    """The differentiable terms."""
    return [terms.logprob, terms.entropy, *terms.divergences.values()]


def statistics(terms: TokenTerms) -> list[Tensor]:
    return [value for reference in terms.references.values() for value in reference if value is not None]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_terms_are_those_of_the_tempered_distributions(temperature: float) -> None:
    case = Case()
    measures = {
        "sampler's": (
            "full", Measure("reverse_kl", temperature_student=temperature, temperature_teacher=temperature)
        ),
        "own": ("full", Measure("jsd", beta=0.3, temperature_student=2.0, temperature_teacher=0.5)),
        "other": ("other", Measure("tvd")),
    }  # fmt: skip
    terms = case.terms(measures, temperature=temperature, statistics=True)
    student, teacher = case.hidden @ case.weight.T, case.states["t"] @ case.teacher_weight.T
    q, p = (Categorical(logits=logits / temperature) for logits in (student, teacher))
    torch.testing.assert_close(terms.logprob, q.log_prob(case.ids), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.entropy, q.entropy(), rtol=1e-12, atol=1e-14)

    torch.testing.assert_close(terms.divergences["sampler's"], kl_divergence(q, p), rtol=1e-11, atol=1e-14)
    own = divergence(student, teacher, "jsd", beta=0.3, temperature_student=2.0, temperature_teacher=0.5)
    torch.testing.assert_close(terms.divergences["own"], own, rtol=1e-12, atol=0)
    other = (student.softmax(-1) - (case.states["u"] @ case.teacher_weight.T).softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(terms.divergences["other"], other, rtol=1e-12, atol=0)

    of_teacher = terms.references["full"]
    torch.testing.assert_close(of_teacher.logprob, p.log_prob(case.ids).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(of_teacher.kl, kl_divergence(q, p).detach(), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(of_teacher.entropy, p.entropy().detach(), rtol=1e-12, atol=1e-14)
    place = [row.tolist().index(best) for row, best in zip(
        teacher.argsort(-1, descending=True), student.argmax(-1).tolist(), strict=True)]  # fmt: skip
    assert of_teacher.rank is not None and of_teacher.rank.tolist() == place and max(place) > 2
    assert not any(value.requires_grad for value in statistics(terms))


def test_what_is_not_known_of_a_reference_is_not_told() -> None:
    case = Case()
    assert case.terms().references == {}
    references = case.terms(statistics=True).references
    assert list(references) == ["full", "other", "top", "sampled"]
    for name in ("top", "sampled"):
        assert references[name][1:] == (None, None, None, None)
        torch.testing.assert_close(references[name].logprob, references["full"].logprob, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, K, V, V + 1])
def test_the_overlap_of_what_is_most_probable(k: int) -> None:
    """Row by row; a target that gives fewer is compared with as many, and chunks change nothing."""
    case = Case()
    references = case.terms({}, statistics=True, overlap=k).references
    student = (case.hidden @ case.weight.T).softmax(-1).detach()
    teacher = case.states["t"] @ case.teacher_weight.T.detach()
    for name, size in (("full", min(k, V)), ("top", min(k, K))):
        shared = []
        for q, p in zip(student.tolist(), teacher.tolist(), strict=True):
            mine, theirs = (sorted(range(V), key=row.__getitem__)[-size:] for row in (q, p))
            shared.append(sum(q[i] for i in mine if i in theirs) / sum(q[i] for i in mine))
        torch.testing.assert_close(references[name].overlap, torch.tensor(shared, dtype=torch.float64))
    assert references["sampled"].overlap is None
    parts = case.terms({}, statistics=True, overlap=k, chunk_elements=5 * V).references
    torch.testing.assert_close(parts["full"].overlap, references["full"].overlap)


@pytest.mark.parametrize("tail", ["bucket", "sampled", "none"])
@pytest.mark.parametrize("k", [1, K])
def test_a_top_k_target_measures_as_the_full_one_does(tail: Any, k: int) -> None:
    """Its entries may be in any order and more than are asked for."""
    case = Case()
    measure = Measure("jsd", beta=0.4, signal="teacher_top_k", k=k, tail=tail)
    targets = case.targets()
    top = targets["top"]
    assert isinstance(top, TopKTarget)
    targets["top"] = TopKTarget(top.ids.flip(-1), top.logprobs.flip(-1), top.sampled)
    terms = case.terms({"full": ("full", measure), "top": ("top", measure)}, targets=targets)
    known, all_known = terms.divergences["top"], terms.divergences["full"]
    torch.testing.assert_close(known, all_known, rtol=1e-11, atol=1e-14)
    mine, theirs = (
        torch.autograd.grad(d.sum(), case.hidden, retain_graph=True)[0] for d in (known, all_known)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("estimator", ["k1", "k3", "direct"])
def test_sampled_tokens_measure_alike_however_the_reference_is_known(estimator: Any) -> None:
    case = Case()
    ratio: Any = None if estimator == "direct" else "live"
    measure = Measure("reverse_kl", signal="sampled", estimator=estimator, ratio=ratio)
    found = case.terms({name: (name, measure) for name in ("full", "top", "sampled")}).divergences
    gradients = [torch.autograd.grad(d.sum(), case.hidden, retain_graph=True)[0] for d in found.values()]
    for name, gradient in zip(("top", "sampled"), gradients[1:], strict=True):
        torch.testing.assert_close(found[name], found["full"], rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-13)


def test_sampled_tokens_give_the_divergence_in_expectation_whatever_they_were_sampled_with() -> None:
    """Every token once, weighted by its probability under another policy, or where none is told under the
    student."""
    student, teacher, other = normal(30, HIDDEN), normal(31, V), normal(32, V).log_softmax(-1)
    weight = normal(33, V, HIDDEN)
    measure = Measure("reverse_kl", signal="sampled")
    for behaviour in (other, torch.full((V,), NAN, dtype=torch.float64)):
        hidden = student.clone().requires_grad_()
        terms = token_terms(
            hidden.expand(V, -1), lambda h: h @ weight.T, torch.arange(V), behaviour=behaviour,
            targets={"t": FullTarget(teacher.expand(V, -1), lambda h: h)}, measures={"d": ("t", measure)},
        )  # fmt: skip
        probability = torch.where(behaviour.isnan(), terms.logprob.detach(), behaviour).exp()
        estimate = probability @ terms.divergences["d"]
        exact = divergence(hidden @ weight.T, teacher, "reverse_kl")
        torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=0)
        mine, theirs = (torch.autograd.grad(v, hidden, retain_graph=True)[0] for v in (estimate, exact))
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk_elements", [1, V * 4, V * 16 + 5])
@pytest.mark.parametrize("measures", [{}, MEASURES], ids=["without", "with"])
def test_chunks_change_neither_values_nor_gradients(measures: Any, chunk_elements: int) -> None:
    case = Case()
    whole = case.terms(measures, statistics=True)
    chunked = case.terms(measures, statistics=True, chunk_elements=chunk_elements)
    assert list(chunked.divergences) == list(whole.divergences) == list(measures)
    assert list(chunked.references) == list(whole.references)
    both = zip(flat(chunked) + statistics(chunked), flat(whole) + statistics(whole), strict=True)
    for ours, expected in [*both, *zip(case.gradients(chunked), case.gradients(whole), strict=True)]:
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_elements", [V * 2, 10**6], ids=["chunks", "whole"])
def test_gradients_pass_finite_differences(chunk_elements: int) -> None:
    case = Case(rows=3)
    measures = {
        "full": MEASURES["full"],
        "theirs": MEASURES["theirs"],
        "bucket": MEASURES["mine"],
        "one": MEASURES["one"],
    }

    def terms(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        behaviour = case.behaviour.nan_to_num(-1.0)  # the detached current one has other finite differences
        found = token_terms(
            hidden, lambda h: h @ weight.T, case.ids, temperature=1.0, targets=case.targets(),
            measures=measures, behaviour=behaviour, chunk_elements=chunk_elements,
        )  # fmt: skip
        return tuple(flat(found))

    assert torch.autograd.gradcheck(terms, (case.hidden, case.weight))


@quick
@given(rows=st.integers(1, 6), keep=st.integers(0, 63), chunk=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_tokens_and_impossible_words_are_on_their_own(rows: int, keep: int, chunk: int, seed: int) -> None:
    """Rows left out change nothing for the others, nor does a vocabulary padded with impossible words."""
    kept = torch.tensor([bool(keep >> row & 1) for row in range(rows)])
    mine, theirs = normal(seed, rows, V), normal(seed + 1, rows, V)
    mine[:, 1:][normal(seed + 2, rows, V - 1) > 1.5] = -INF  # finite forward: both sides miss the same words
    theirs = theirs.masked_fill(mine == -INF, -INF)
    ids = mine.argmax(-1)
    kinds: list[Kind] = ["reverse_kl", "forward_kl", "tvd"]
    measures = {
        name: ("t", measure)
        for kind in kinds
        for name, measure in (
            (kind, Measure(kind)),
            (f"{kind} mine", Measure(kind, signal="student_top_k", k=2, tail="bucket")),
            (f"{kind} theirs", Measure(kind, signal="teacher_top_k", k=2, tail="none")),
        )
    }

    def found(chosen: Tensor, padding: int) -> tuple[list[Tensor], Tensor]:
        logits, target = (
            torch.nn.functional.pad(x[chosen], (0, padding), value=-INF) for x in (mine, theirs)
        )
        terms = token_terms(
            logits.requires_grad_(), lambda h: h * 1.0, ids[chosen], statistics=True, measures=measures,
            targets={"t": FullTarget(target, lambda h: h)}, chunk_elements=chunk * (V + padding),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(torch.stack(flat(terms)).sum(), logits)
        return [*flat(terms), *statistics(terms)], gradient

    values, gradient = found(torch.ones(rows).bool(), 0)
    some, of_some = found(kept, 3)
    assert gradient.isfinite().all() and (gradient[mine == -INF] == 0).all()
    torch.testing.assert_close(of_some, torch.nn.functional.pad(gradient[kept], (0, 3)), rtol=0, atol=1e-12)
    for value, part in zip(values, some, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(part, value[kept], rtol=0, atol=1e-12)


# What is computed, and held


class Operations(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and how many softmaxes were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.softmaxes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.softmaxes += func is torch.ops.aten._log_softmax.default
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_chunks_never_hold_the_logits_of_all_tokens() -> None:
    rows, of_chunk = 64, 8
    for size in (rows, of_chunk):
        case, saved = Case(rows), [0]

        def remember(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        targets = case.targets()
        with Operations() as operations:
            with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
                terms = case.terms(targets=targets, chunk_elements=size * V)
            case.gradients(terms)
        assert max(map(max, case.projected.values())) == size
        if size == rows:
            assert operations.largest == rows * V and sum(saved) > 5 * rows * V
        else:
            assert operations.largest <= 9 * rows < rows * V  # the coefficients of nine terms
            assert sum(saved) <= 6 * rows * HIDDEN  # of N, the hidden states and terms only


def test_measures_share_projections_and_softmaxes() -> None:
    case = Case(rows=6)
    targets = case.targets()
    case.projected = {"student": [], "teacher": []}
    with Operations() as operations:
        case.terms(targets=targets, statistics=True, chunk_elements=2 * V)
    assert case.projected == {"student": [1, 2, 2, 2], "teacher": [1, 1] + 6 * [2]}  # the width is asked once
    # Student at 1 and 0.7, the two references at 1 and 1.3, in three chunks.
    assert operations.softmaxes == 3 * (2 + 2 + 2)
    case.projected["teacher"].clear()
    case.terms({"full": MEASURES["full"]}, targets=targets)
    assert case.projected["teacher"] == [1, 1, 6]  # nobody asks for the other reference


def peak_elements(rows: int, vocabulary: int, chunk: int, measures: dict[str, tuple[str, Measure]]) -> float:
    """Most float32 numbers held at once, over what there was before, by the terms and their gradient; in
    units of ``chunk`` rows of logits."""
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight, theirs = torch.randn(vocabulary, 4), torch.randn(vocabulary, 4)
    ids = torch.zeros(rows, dtype=torch.long)
    targets: dict[str, Target] = {"t": FullTarget(torch.randn(rows, 4), lambda h: h @ theirs.T)}
    with profile(profile_memory=True) as profiled:
        terms = token_terms(
            hidden, lambda h: h @ weight.T, ids, targets=targets if measures else {}, measures=measures,
            chunk_elements=chunk * vocabulary,
        )  # fmt: skip
        torch.stack(flat(terms)).sum().backward()
        del terms
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 4 / (chunk * vocabulary)


@pytest.mark.parametrize(
    "kinds, tensors",
    [([], 6), (["reverse_kl"], 8.5), (["jsd"], 13.5), (["reverse_kl", "forward_kl", "jsd"], 17.5)],
)
def test_the_peak_is_of_one_chunk_however_many_tokens(kinds: Any, tensors: float) -> None:
    measures = {kind: ("t", Measure(kind)) for kind in kinds}
    few, many = (peak_elements(rows, 2000, 40, measures) for rows in (80, 640))
    assert few <= many < few + 0.5  # 560 tokens more, which have 14 times that in logits
    assert tensors - 3 < many < tensors


# What is refused, and what is not


def test_half_precision_models_are_scored_in_float32() -> None:
    low = Case(dtype=torch.bfloat16)
    targets = {
        "full": FullTarget(low.states["t"], low.teacher_head),
        "sampled": SampledTarget(low.targets()["sampled"][0].float()),
    }
    measures = {name: MEASURES[name] for name in ("full", "mine", "one")}
    terms = low.terms(measures, targets=targets, behaviour=None, statistics=True)
    values = [*flat(terms), *(v for v in statistics(terms) if v.is_floating_point())]
    assert {value.dtype for value in values} == {torch.float32}
    logits = (low.hidden @ low.weight.T).float()  # products are rounded to bfloat16, nothing after them
    expected = Categorical(logits=logits).entropy()
    torch.testing.assert_close(terms.entropy, expected, rtol=1e-5, atol=1e-5)


def test_forbidden_words_of_a_head_have_no_gradient() -> None:
    hidden = normal(40, 3, 4).requires_grad_()
    forbidden = torch.tensor([0.0, 0.0, -INF, 0.0])
    measures = {"d": ("t", Measure("jsd")), "k": ("t", MEASURES["mine"][1])}
    terms = token_terms(
        hidden, lambda h: h + forbidden, torch.tensor([0, 1, 3]), measures=measures, chunk_elements=4,
        targets={"t": FullTarget(hidden.detach() * 2, lambda h: h + forbidden)}, statistics=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(torch.stack(flat(terms)).sum(), hidden)
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all()
    kept = Categorical(logits=hidden[:, [0, 1, 3]].detach())
    torch.testing.assert_close(terms.entropy, kept.entropy())
    wider = token_terms(
        hidden, lambda h: h, torch.tensor([0, 1, 3]), statistics=True,
        targets={"t": FullTarget(hidden.detach(), lambda h: h + forbidden)},
    )  # fmt: skip
    kl = wider.references["t"].kl
    assert kl is not None and (kl == INF).all()  # the student may say what the reference cannot


def test_no_rows_give_empty_terms() -> None:
    terms = Case(rows=0).terms(statistics=True)
    assert {tuple(value.shape) for value in flat(terms) + statistics(terms)} == {(0,)}


def test_misaligned_terms_are_refused() -> None:
    case = Case(4)
    head = case.student_head
    with pytest.raises(AlignmentError, match=r"action ids are \[3\] where \[4\]"):
        token_terms(case.hidden, head, case.ids[:3])
    with pytest.raises(AlignmentError, match="vocabulary of 13"):
        token_terms(case.hidden, head, case.ids + V)
    with pytest.raises(AlignmentError, match=r"behaviour log-probs are \[3\]"):
        token_terms(case.hidden, head, case.ids, behaviour=case.behaviour[:3])
    states, targets = case.states["t"], case.targets()
    top, sampled = targets["top"], targets["sampled"]
    assert isinstance(top, TopKTarget) and isinstance(sampled, SampledTarget)
    wrong: list[tuple[Target, str]] = [
        (FullTarget(states, lambda h: h @ normal(41, TEACHER_HIDDEN, V + 1)), "'t' has 14 entries"),
        (FullTarget(states[:3], case.teacher_head), "4 positions of the student but 3 of 't'"),
        (top._replace(ids=top.ids[:3]), r"top-k ids of 't' are \[3, 4\] where \[4, 4\]"),
        (top._replace(ids=top.ids[0], logprobs=top.logprobs[0]), r"top-k ids of 't' are \[4\]"),
        (top._replace(ids=top.ids[:, :2]), r"top-k log-probs of 't' are \[4, 4\] where \[4, 2\]"),
        (top._replace(sampled=top.sampled[:, None]), r"log-probs of 't' are \[4, 1\]"),
        (top._replace(ids=top.ids + 5), "top-k ids of 't' from"),
        (top._replace(ids=top.ids[:, [0, 1, 2, 0]]), "'t' names a token twice"),
        (SampledTarget(sampled.logprob[1:]), r"log-probs of 't' are \[3\]"),
    ]
    for target, message in wrong:
        with pytest.raises(AlignmentError, match=message):
            case.terms({}, targets={"t": target})


def test_what_is_no_log_prob_is_refused() -> None:
    case = Case(4)
    targets = case.targets()
    top, sampled = targets["top"], targets["sampled"]
    assert isinstance(top, TopKTarget) and isinstance(sampled, SampledTarget)
    gap = torch.tensor([0.0, NAN, 0.0, 0.0])
    wrong: list[tuple[Target, str]] = [
        (top._replace(logprobs=top.logprobs.half()), "top-k log-probs of 't' are torch.float16"),
        (top._replace(sampled=top.sampled.bfloat16()), "log-probs of 't' are torch.bfloat16"),
        (SampledTarget(sampled.logprob.bfloat16()), "half-precision logits and hidden states are welcome"),
        (SampledTarget(sampled.logprob + gap), "hold NaN"),
        (SampledTarget(sampled.logprob.exp()), "Are they logits"),
        (top._replace(logprobs=top.logprobs + gap[:, None]), "top-k log-probs of 't' hold NaN"),
        (top._replace(logprobs=torch.full_like(top.logprobs, -0.5)), "mass of the top k of 't'"),
    ]
    for target, message in wrong:
        with pytest.raises(AlignmentError, match=message):
            case.terms({}, targets={"t": target})
    for behaviour, message in (
        (case.behaviour.half(), "behaviour log-probs are torch.float16"),
        (case.behaviour + 40.0, "behaviour log-probs hold"),
        (case.behaviour - INF, "never sampled"),
    ):
        with pytest.raises(AlignmentError, match=message):
            case.terms({}, behaviour=behaviour)


def test_a_measure_that_its_target_cannot_serve_is_refused_with_a_remedy() -> None:
    case = Case(4)
    student_k = Measure("reverse_kl", signal="student_top_k", k=2, tail="none")
    teacher_k = Measure("reverse_kl", signal="teacher_top_k", k=2, tail="none")
    more = Measure("reverse_kl", signal="teacher_top_k", k=K + 1, tail="none")
    warm = Measure("reverse_kl", signal="sampled", temperature_teacher=1.5)
    veto = Measure("reverse_kl", signal="sampled", geometric=0.5)
    wrong = [
        ("top", student_k, "signal student_top_k needs more of 'top' .* top 4 .* `signal: teacher_top_k`"),
        ("top", Measure("forward_kl"), "signal full needs more"),
        ("top", more, "k is 5, but 'top' gives only its top 4"),
        ("sampled", Measure("forward_kl"), "signal full .* hidden states .* `signal: sampled`"),
        ("sampled", teacher_k, "signal teacher_top_k needs more of 'sampled'"),
        ("sampled", warm, "at temperature 1; bringing them to 1.5 takes logits"),
        ("top", warm, "at temperature 1"),
        ("sampled", veto, "geometric"),
        ("teacher", teacher_k, "against 'teacher', but the targets are: full, other, top, sampled"),
    ]
    for reference, measure, message in wrong:
        with pytest.raises(ConfigError, match=message):
            case.terms({"pull": (reference, measure)})
    at_sampling = {"pull": ("sampled", warm)}
    assert case.terms(at_sampling, temperature=1.5).divergences["pull"].isfinite().all()
