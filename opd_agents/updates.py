"""Experience -> optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.errors import AlignmentError
from opd_agents.experience import Experience
from opd_agents.loss import Plan, micro_losses, plan, selected
from opd_agents.policies.models import forward_flops
from opd_agents.session import Session
from opd_agents.teachers import HiddenStates
from opd_agents.types import Trajectory


def update(session: Session, experience: Experience, rewards: Mapping[str, Tensor]) -> dict[str, float]:
    """``updates_per_step`` optimizer steps, each on its share of the trajectories; mean losses and norms.

    ``rewards``: per policy component the advantage of each trajectory [E]. Raises AlignmentError where no
    component finds a token to learn from, and for a gradient that is not finite.
    """
    config, components = session.config, session.config.loss.components
    packed, trajectories = experience.packed, experience.trajectories
    weights = {name: selected(packed, trajectories, c.select) for name, c in components.items()}
    _refuse_empty(weights, packed, step=session.step + 1)
    measured: dict[str, list[float]] = {}
    measure = session.step % config.trainer.gradient_shares_every == 0
    for number, batch in enumerate(minibatches(session, packed, trajectories)):
        planned = plan(packed, components, weights, rewards, batch, session.progress)
        if not bool(planned.keep.any()):
            continue
        losses = accumulate(session, packed, planned, experience.signal, shares=measure and number == 0)
        norm = float(torch.nn.utils.clip_grad_norm_(session.parameters, config.trainer.clip_norm))
        if not math.isfinite(norm):
            raise AlignmentError(f"The gradient of step {session.step + 1} is {norm}; losses: {losses}.")
        losses |= {"grad_norm": norm, "learning_rate": session.learning_rate}
        session.optimizer_step()
        for key, value in losses.items():
            measured.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in measured.items()}


def _refuse_empty(weights: Mapping[str, Tensor], packed: Packed, step: int) -> None:
    """A loss that sees no token would silently train nothing; only a step of failed environments has none."""
    if packed.turns and not any(bool(weight.any()) for weight in weights.values()):
        raise AlignmentError(
            f"Step {step} has {len(packed.target)} action tokens, but no loss component selects any of them: "
            f"check the `select` of {', '.join(weights)} against rollout.source."
        )


def minibatches(session: Session, packed: Packed, trajectories: Sequence[Trajectory]) -> Iterator[Tensor]:
    """Token masks that deal out the trajectories, and separately the repaired ones, evenly and at random."""
    updates, config = session.config.trainer.updates_per_step, session.config
    random = np.random.Generator(np.random.Philox(key=[config.seed, session.step], counter=[0, 0, 2, 2**63]))
    share = torch.empty(len(trajectories), dtype=torch.int64)
    for repaired in (False, True):
        mine = [i for i, t in enumerate(trajectories) if (t.branch is not None) == repaired]
        for place, which in enumerate(random.permutation(len(mine)).tolist()):
            share[mine[which]] = place % updates
    for number in range(updates):
        yield share[packed.episode] == number


def accumulate(
    session: Session, packed: Packed, planned: Plan, signal: HiddenStates | None, *, shares: bool
) -> dict[str, float]:
    """Gradient of the whole update batch over its micro-batches; each component's loss, and with ``shares``
    its part of the sum of the components' gradient norms."""
    config, losses = session.config, dict.fromkeys(planned.components, 0.0)
    separate: dict[str, list[Tensor]] = {}
    for micro in packed.micro_batches(config.trainer.micro_batch_tokens, planned.keep):
        parts = micro_losses(session.model, packed, micro, planned, signal, config.rollout.temperature)
        passes = 1 + 2 * (len(parts) if shares else 1)  # a backward pass costs two forward passes
        session.totals["flops"] += passes * forward_flops(
            session.model, micro.n_tokens, micro.ids.shape[1] / 2
        )
        if shares:
            for name, part in parts.items():
                gradient = torch.autograd.grad(part, session.parameters, retain_graph=True, allow_unused=True)
                add_gradients(separate.setdefault(name, []), session.parameters, gradient)
        else:
            torch.stack(list(parts.values())).sum().backward()
        for name, part in parts.items():
            losses[name] += float(part.detach())
    result = {f"loss/{name}": value for name, value in losses.items()} | {"loss": sum(losses.values())}
    if not shares:
        return result
    for parameter, *gradients in zip(session.parameters, *separate.values(), strict=True):
        parameter.grad = torch.stack(gradients).sum(0)
    norms = {name: float(torch.stack([g.norm() for g in grads]).norm()) for name, grads in separate.items()}
    total = sum(norms.values())
    return result | {f"grad_share/{name}": norm / total if total else 0.0 for name, norm in norms.items()}


def add_gradients(
    total: list[Tensor], parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """Add one micro-batch's gradients in place; a parameter that a component does not reach has none."""
    if not total:
        total.extend(torch.zeros_like(parameter) for parameter in parameters)
    for into, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            into += gradient
