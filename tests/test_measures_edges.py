"""Measures of impossible tokens, of padded vocabularies and of too little, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import (
    ANY,
    INF,
    KINDS,
    LOG_P,
    STUDENT,
    TEACHER,
    N,
    Score,
    V,
    anywhere,
    assert_same,
    expectation,
    normal,
    of,
    of_top_k,
    value_and_gradient,
)
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError, UnknownName
from opd_agents.objectives import Kind, Measure, divergence
from opd_agents.objectives.estimators import ESTIMATED
from opd_agents.objectives.measures import Signal, measured, measured_sampled, measured_top_k

quick = settings(max_examples=60, deadline=None, derandomize=True)

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
