"""Agreement with TRL's GKD loss, values and gradients."""

from __future__ import annotations

import pytest
import torch

from opd_agents.objectives import Kind, divergence


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
