"""The white-box presets in exact expectation, every sequence of a small vocabulary enumerated through the
engine; and what a tabular student becomes that follows their loss to its end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from engine import assert_same, config_of, engine, experience_of, in_float64, plain
from rolling import trajectory, turn
from tabular import normal
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from opd_agents.config import Distill
from opd_agents.experience import Experience
from opd_agents.loss import measure
from opd_agents.objectives.measures import measured
from opd_agents.schedules import Clock, value_at

BEGIN, WORDS = 3, 3  # the prompt, and the words 0 (the end), 1 and 2


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A student and a teacher of four tokens, of which the prompt's is as likely as any."""

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=WORDS + 1, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, initializer_range=1.0,
            tie_word_embeddings=False,
        )  # fmt: skip
        return in_float64(LlamaForCausalLM(config).eval())

    return build(0), build(1)


def every_sequence() -> list[tuple[int, ...]]:
    """All that a student can write: up to three tokens, 0 being the last; the prompt's token may come too."""

    def grown(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(prefix) == 3 or prefix[-1:] == (0,):
            return [prefix]
        return [one for token in range(WORDS + 1) for one in grown((*prefix, token))]

    return grown(())


def by_token(model: Any, sequence: tuple[int, ...]) -> Tensor:
    """Log-probs [T, V] before each token of a sequence."""
    logits: Tensor = model(torch.tensor([[BEGIN, *sequence]])).logits[0, : len(sequence)]
    return logits.log_softmax(-1)


@cache
def enumerated(student: Any, teacher: Any, share: float = 0.0) -> tuple[Experience, Tensor]:
    """Every sequence, as drawn from (1 - a) q + a p: its probability is the weight of its tokens."""
    found, probabilities = [], []
    for number, sequence in enumerate(every_sequence()):
        with torch.no_grad():
            q, p = (by_token(model, sequence).exp() for model in (student, teacher))
        mixed = ((1 - share) * q + share * p)[torch.arange(len(sequence)), list(sequence)]
        probabilities.append(mixed.prod())
        one = turn([BEGIN], sequence, logprobs=tuple(mixed.log().tolist()), weight=float(mixed.prod()))
        found.append(trajectory([one], uid=f"e{number}"))
    assert float(sum(probabilities)) == pytest.approx(1.0)
    experience = experience_of(student, found, {"teacher": teacher}, temperature=1.0)
    return experience, torch.stack(probabilities)


def expected(
    models: tuple[Any, Any], method: str, changes: Sequence[str] = (), share: float = 0.0
) -> tuple[float, Tensor]:
    """Of a preset's loss, summed over the tokens of a sequence, over all sequences."""
    raw = config_of(method).loss.components
    sums = [f"loss.components.{name}.{key}" for name in raw for key in ("denominator=constant", "constant=1")]
    components = config_of(method, *sums, *changes).loss.components
    return engine(models[0], enumerated(*models, share)[0], components, temperature=1.0)


@cache
def kl_at_visited_states(models: tuple[Any, Any], share: float = 0.0) -> tuple[float, Tensor]:
    """KL(q || p) at every state, the states being given."""
    student, teacher = models
    total = torch.zeros((), dtype=torch.float64)
    for sequence, probability in zip(every_sequence(), enumerated(*models, share)[1], strict=True):
        q, p = by_token(student, sequence), by_token(teacher, sequence).detach()
        total = total + probability * (q.exp() * (q - p)).sum()
    return plain(student, total)


@cache
def kl_of_sequences(models: tuple[Any, Any]) -> tuple[float, Tensor]:
    student, teacher = models
    total = torch.zeros((), dtype=torch.float64)
    for sequence in every_sequence():
        places = (torch.arange(len(sequence)), list(sequence))
        q, p = by_token(student, sequence)[places].sum(), by_token(teacher, sequence)[places].sum().detach()
        total = total + q.exp() * (q - p)
    return plain(student, total)


def assert_same_gradient(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> None:
    assert_same((0.0, one[1]), (0.0, other[1]))


DISTILL = "loss.components.distill"
K1, K2, K3 = (
    [f"{DISTILL}.signal=sampled", f"{DISTILL}.estimator={e}", f"{DISTILL}.ratio={r}"]
    for e, r in (("k1", "live"), ("k2", "detached"), ("k3", "live"))
)
SAMPLED_TAIL = [f"{DISTILL}.k=2", f"{DISTILL}.tail=sampled", f"{DISTILL}.renormalise=none"]
# (preset, changes): all estimate the gradient of the reverse KL at every state.
ESTIMATES: list[tuple[str, list[str]]] = [
    ("gkd", []),
    ("gkd", [f"{DISTILL}.signal=sampled"]),
    ("gkd", K1),
    ("gkd", K2),
    ("gkd", K3),
    ("revisiting_opd", [*SAMPLED_TAIL, f"{DISTILL}.weights=[]"]),
    ("rethinking_opd", [f"{DISTILL}.k=4"]),
    ("thinking_machines", []),
    ("thinking_machines", [f"{DISTILL}.references.teacher.baseline=closed_form"]),
    ("fast_opd", []),
]


@pytest.mark.parametrize(("method", "changes"), ESTIMATES)
def test_on_average_over_samples_the_gradient_is_that_of_the_whole_reverse_kl(
    method: str, changes: list[str], models: tuple[Any, Any]
) -> None:
    assert_same_gradient(expected(models, method, changes), kl_at_visited_states(models))


@pytest.mark.parametrize(("method", "changes"), ESTIMATES[:-1])
def test_so_it_is_whatever_each_token_was_sampled_with(
    method: str, changes: list[str], models: tuple[Any, Any]
) -> None:
    """The ratio to the mixture that minillm samples from (where none is clipped) takes its part back."""
    assert_same_gradient(
        expected(models, method, changes, share=0.2), kl_at_visited_states(models, share=0.2)
    )


def test_minillms_two_parts_make_up_the_kl_of_sequences(models: tuple[Any, Any]) -> None:
    """Undiscounted, neither whitened nor by length: what its authors decompose."""
    long = "loss.components.long"
    whole = [f"{long}.whiten=false", f"{long}.references.teacher={{discount: 1, length_normalise: false}}"]
    assert_same_gradient(expected(models, "minillm", whole), kl_of_sequences(models))


def test_without_its_long_part_minillm_is_gkd(models: tuple[Any, Any]) -> None:
    assert_same(expected(models, "minillm", ["loss.components.long.coef=0"]), expected(models, "gkd"))


def test_undiscounted_thinking_machines_learns_the_kl_of_sequences(models: tuple[Any, Any]) -> None:
    later = [f"{DISTILL}.references.teacher.discount=1"]
    assert_same_gradient(expected(models, "thinking_machines", later), kl_of_sequences(models))
    state = expected(models, "thinking_machines")[1]
    assert float((state - kl_of_sequences(models)[1]).norm()) > 0.1 * float(state.norm())


def test_veto_is_on_average_the_policy_gradient_of_its_advantage(models: tuple[Any, Any]) -> None:
    """log p - (1 - beta) log q of the sampled token."""
    ours = expected(models, "veto")[1]
    student, teacher = models
    total = torch.zeros((), dtype=torch.float64)
    for sequence, probability in zip(every_sequence(), enumerated(*models)[1], strict=True):
        places = (torch.arange(len(sequence)), list(sequence))
        q, p = by_token(student, sequence)[places], by_token(teacher, sequence)[places]
        advantage = (p - (1 - 0.8) * q).detach()
        total = total - probability * (advantage * q).sum()
    assert_same_gradient((0.0, ours), plain(student, total))


def settled(component: Any, teacher: Tensor, progress: float = 0.0) -> tuple[Tensor, Tensor]:
    """Where a tabular student [S, V] starts, and where the gradient has taken it, both as probabilities."""
    assert isinstance(component, Distill)
    asked = measure(component, lambda value: value_at(value, Clock(progress, {})), 1.0)
    logits, tokens = normal(5, *teacher.shape), torch.zeros(len(teacher), dtype=torch.int64)
    start = logits.softmax(-1)
    optimizer = torch.optim.Adam([logits.requires_grad_()], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        log_q = logits.log_softmax(-1)
        measured(log_q, teacher, asked, tokens, log_q[:, 0].detach()).sum().backward()
        optimizer.step()
    return start, logits.softmax(-1).detach()


def distill_of(method: str, *changes: str, name: str = "distill") -> Any:
    return config_of(method, *(f"loss.components.{name}.{c}" for c in changes)).loss.components[name]


TEACHER = (0.5 * normal(6, 3, 12)).log_softmax(-1)
# Component, how far the run is, and the distribution that it ends in.
FIXED: dict[str, tuple[Any, float, Tensor]] = {
    "gkd": (distill_of("gkd"), 0.0, TEACHER),
    "gkd, jsd": (distill_of("gkd", "divergence=jsd", "beta=0.5"), 0.0, TEACHER),
    "distillm": (distill_of("distillm"), 0.0, TEACHER),
    "distillm2, teacher's text": (distill_of("distillm2", name="teacher_text"), 0.0, TEACHER),
    "distillm2, student's text": (distill_of("distillm2", name="student_text"), 0.0, TEACHER),
    "rethinking_opd": (distill_of("rethinking_opd", "k=12"), 0.0, TEACHER),
    "veto at its start": (distill_of("veto"), 0.0, TEACHER / (1 - 0.8)),
    "veto halfway": (distill_of("veto"), 0.5, TEACHER / (1 - 0.4)),
    "veto at its end": (distill_of("veto"), 1.0, TEACHER),
    "entropy_aware, forward": (
        distill_of("entropy_aware", "k=4", name="forward"),
        0.0,
        torch.full_like(TEACHER, -1e9).scatter(1, *TEACHER.topk(4)[::-1]),
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_tabular_student_ends_in_the_fixed_point(name: str) -> None:
    component, progress, target = FIXED[name]
    start, end = settled(component, TEACHER, progress)
    torch.testing.assert_close(end, target.softmax(-1), atol=2e-3, rtol=0)
    assert float((start - target.softmax(-1)).abs().max()) > 0.1


def test_revisiting_opd_settles_the_shares_of_the_top_k_and_leaves_the_rest_alone() -> None:
    start, end = settled(distill_of("revisiting_opd", "k=4"), TEACHER)
    ids = TEACHER.topk(4).indices
    shares = [x.gather(1, ids) / x.gather(1, ids).sum(-1, keepdim=True) for x in (end, TEACHER.exp())]
    torch.testing.assert_close(*shares, atol=1e-5, rtol=0)
    rest = [x.scatter(1, ids, 0.0) for x in (start, end)]
    rest = [x / x.sum(-1, keepdim=True) for x in rest]
    torch.testing.assert_close(*rest, atol=1e-6, rtol=0)
    assert float((end - TEACHER.exp()).abs().max()) > 0.05
