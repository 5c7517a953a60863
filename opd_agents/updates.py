"""Experience -> optimizer steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from opd_agents.batch import EMPTY, Packed
from opd_agents.credit import factors
from opd_agents.errors import AlignmentError
from opd_agents.experience import Experience
from opd_agents.loss import Plan, micro_losses, plan, selected
from opd_agents.policies.models import backward_flops, forward_flops
from opd_agents.policies.recomputation import recomputed
from opd_agents.session import Session
from opd_agents.sharding import updating
from opd_agents.teachers import HiddenStates
from opd_agents.types import Credit, Trajectory


def update(
    session: Session,
    experience: Experience,
    rewards: Mapping[str, Tensor],
    credits: Sequence[Sequence[Credit]],
) -> dict[str, float]:
    """``updates_per_step`` optimizer steps, each on its share of the trajectories; mean losses and norms.

    ``rewards``: per policy component the advantage of each trajectory [E]; ``credits`` of all actions, for
    the factors of components that have a credit function. Raises AlignmentError where no
    component finds a token to learn from, and for a gradient that is not finite.
    """
    config, components = session.config, session.config.loss.components
    packed, trajectories = experience.packed, experience.trajectories
    weights = {name: selected(packed, trajectories, c.select) for name, c in components.items()}
    _refuse_empty(weights, packed, step=session.step + 1)
    weighted = [name for name, component in components.items() if component.credit]
    weights |= {name: weights[name] * factors(packed, credits, name) for name in weighted}
    measured: dict[str, list[float]] = {}
    measure = session.step % config.trainer.gradient_shares_every == 0
    with updating(session.model, session.trained):
        for number, batch in enumerate(minibatches(session, packed, trajectories)):
            planned = plan(packed, components, weights, rewards, batch, session.progress)
            if not bool(planned.keep.any()):
                continue
            shares = measure and number == 0
            losses = accumulate(session, packed, planned, experience.signal, experience.owned, shares=shares)
            norm = session.optimizer.clip(config.trainer.clip_norm)
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
    session: Session,
    packed: Packed,
    planned: Plan,
    signal: HiddenStates | None,
    owned: Tensor,
    *,
    shares: bool,
) -> dict[str, float]:
    """Gradient of the whole update batch; each component's loss, and with ``shares`` its part of the sum of
    the components' gradient norms, for which each component has passes of its own.

    A rank passes over the tokens that are its own (``owned``, bool [N]); gradients and losses are the sums
    over all ranks.
    """
    if not shares:
        return _by_component(_backward(session, packed, planned, signal, owned))
    losses, norms = dict[str, float](), dict[str, float]()
    masters = session.optimizer.masters
    total: list[Tensor | None] = [None] * len(masters)
    for name, component in planned.components.items():
        coefficients = {name: planned.coefficients[name]}
        alone = dataclasses.replace(planned, components={name: component}, coefficients=coefficients)
        losses |= _backward(session, packed, alone, signal, owned)
        norms[name] = session.optimizer.clip(math.inf)
        for i, (former, master) in enumerate(zip(total, masters, strict=True)):
            if master.grad is not None:
                total[i] = master.grad if former is None else former.add_(master.grad)
                master.grad = None
    for gradient, master in zip(total, masters, strict=True):
        master.grad = gradient
    whole = sum(norms.values())
    parts = {f"grad_share/{name}": norm / whole if whole else 0.0 for name, norm in norms.items()}
    return _by_component(losses) | parts


def _by_component(losses: Mapping[str, float]) -> dict[str, float]:
    return {f"loss/{name}": value for name, value in losses.items()} | {"loss": sum(losses.values())}


def _backward(
    session: Session, packed: Packed, planned: Plan, signal: HiddenStates | None, owned: Tensor
) -> dict[str, float]:
    """Add the gradient over this rank's micro-batches; each component's loss, summed over all ranks.

    Every pass gathers parameters from all ranks, so a rank with fewer micro-batches than another makes up
    for them with empty ones.
    """
    config, world, model = session.config, session.world, session.trained.model
    losses, flops, lean = dict.fromkeys(planned.components, 0.0), 0, config.trainer.gradient_checkpointing
    micros = list(packed.micro_batches(config.trainer.micro_batch_tokens, planned.keep & owned))
    passes = max(world.gather(len(micros)))
    for micro in micros + [EMPTY] * (passes - len(micros)):
        forward = partial(
            micro_losses, packed=packed, micro=micro, plan=planned, signal=signal,
            temperature=config.rollout.temperature,
        )  # fmt: skip
        with recomputed(model) if lean else nullcontext():
            parts = session.trained(forward)
        torch.stack(list(parts.values())).sum().backward()
        session.optimizer.collect()
        size = (model, micro.n_tokens, micro.ids.shape[1] / 2)
        flops += forward_flops(*size) * (2 if lean else 1) + backward_flops(*size)
        for name, part in parts.items():
            losses[name] += float(part.detach())
    session.totals["flops"] += world.total(flops)
    everywhere = world.gather(losses)
    return {name: sum(rank[name] for rank in everywhere) for name in losses}
