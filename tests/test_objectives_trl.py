"""Agreement with TRL: GKD's loss and the top-k losses of its self-distillation, values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine import T, assert_same, config_of, engine, experience_of, in_float64, moved, plain

from opd_agents.objectives import Kind, Measure, divergence
from opd_agents.objectives.measures import measured
from opd_agents.types import Trajectory


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize(
    "kind, beta", [("forward_kl", 0.0), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9), ("reverse_kl", 1.0)]
)
def test_divergence_is_that_of_trl(
    kind: Kind, beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(2, 5, 31, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(2, 5, 31, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, 5, 6, 7, 8]])
    theirs, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        theirs, teacher, labels=labels, beta=beta, temperature=temperature
    )
    temperatures = {"temperature_student": temperature, "temperature_teacher": temperature}
    options = {"beta": beta} if kind == "jsd" else {}  # TRL's beta 0 and 1 are the two KLs
    value = divergence(ours, teacher, kind, **options, **temperatures)[labels != -100].mean()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    expected.backward()
    value.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind, alpha", [("forward_kl", 0.0), ("jsd", 0.3), ("reverse_kl", 1.0)])
def test_top_k_is_that_of_trl(kind: Kind, alpha: float, tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(9, 31, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(9, 31, generator=generator, dtype=torch.float64)
    theirs, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = trl.compute_topk_self_distillation_loss(
        theirs, teacher, distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=tail
    )
    measure = Measure(
        kind,
        beta=alpha if kind == "jsd" else 0.5,
        signal="student_top_k",
        k=5,
        tail="bucket" if tail else "none",
        renormalise="none" if tail else "both",
    )
    log_q, ids = ours.log_softmax(-1), torch.zeros(9, dtype=torch.int64)
    value = measured(log_q, teacher.log_softmax(-1), measure, ids, log_q[:, 0].detach())
    # TRL takes the logarithms of its shares in float32.
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    expected.sum().backward()
    value.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_gkd_preset_is_trls_loss_of_whole_episodes(
    beta: float, student: Any, teacher: Any, sampled: Sequence[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of all positions and labels of action tokens, as its trainer would have them."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    model, judge = moved(student), in_float64(teacher)
    experience = experience_of(student, sampled, {"teacher": judge})
    packed, logits = experience.packed, []
    labels = [torch.full_like(row, -100) for row in packed.rows]
    for row, position, target in zip(packed.row, packed.position, packed.target, strict=True):
        labels[row][position - 1] = target
    for one in (model, judge):
        logits.append(torch.cat([one(row[None]).logits[0] for row in packed.rows])[None])
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        logits[0], logits[1].detach(), labels=torch.cat(labels)[None], beta=beta, temperature=T
    )
    jsd = ["loss.components.distill.divergence=jsd", f"loss.components.distill.beta={beta}"]
    components = config_of("gkd", *(jsd if beta < 1 else [])).loss.components
    assert_same(engine(model, experience, components), plain(model, expected))
