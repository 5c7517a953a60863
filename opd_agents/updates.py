"""Experience -> optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.batch import EMPTY, MicroBatch, Packed
from opd_agents.composition import source_of
from opd_agents.config import Component, Preference
from opd_agents.config.needs import selects_of
from opd_agents.discriminator import teacher_student_pairs
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.experience import Assigned, Experience
from opd_agents.loss import Plan, looks_beyond, micro_losses, plan
from opd_agents.objectives import token_terms
from opd_agents.policies.models import backward_flops, forward_flops, head, hidden_states
from opd_agents.policies.recomputation import recomputed
from opd_agents.session import Session
from opd_agents.sharding import updating


def update(session: Session, experience: Experience, assigned: Assigned) -> dict[str, float]:
    """``updates_per_step`` optimizer steps, each on its share of the trajectories; mean losses and norms.

    Raises ConfigError where no component can find a token to learn from, AlignmentError for a loss or a
    gradient that is not finite.
    """
    config, components = session.config, session.config.loss.components
    if session.step == 0:
        _refuse_empty(components, experience.packed)
    measured: dict[str, list[float]] = {}
    measure = session.step % config.trainer.gradient_shares_every == 0
    beyond = any(map(looks_beyond, components.values()))
    with updating(session.model, session.trained):
        for number, batch in enumerate(minibatches(session, experience)):
            current = experience.frozen.logprob  # at the weights that sampled, which the first update has
            if beyond and number:
                current = _current_logprobs(session, experience, batch)
            planned = plan(
                experience, components, assigned, batch, session.at, config.rollout.temperature, current
            )
            if not bool(planned.keep.any()):
                continue
            losses = accumulate(session, experience, planned, shares=measure and number == 0)
            norm = session.optimizer.clip(config.trainer.clip_norm)
            if not (math.isfinite(norm) and math.isfinite(losses["loss"])):  # of an infinite KL it is 0
                raise AlignmentError(
                    f"The gradient of step {session.step + 1} has norm {norm}; losses: {losses}. An infinite"
                    " divergence means a token that one model has and the other gives no probability."
                )
            losses |= {"grad_norm": norm, "learning_rate": session.learning_rate}
            losses |= _clip_shares(session, planned)
            session.optimizer_step()
            for key, value in losses.items():
                measured.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in measured.items()}


def update_discriminator(session: Session, experience: Experience) -> dict[str, float | None]:
    """One update of the discriminator, if there is one, on all pairs of the step; its metrics."""
    discriminator, likeness, packed = session.discriminator, experience.likeness, experience.packed
    if discriminator is None or likeness is None or session.config.discriminator is None:
        return {}
    pairs = teacher_student_pairs(experience.trajectories, ~likeness.isnan())
    own = session.config.discriminator.learning_rate
    rate = session.learning_rate if own is None else session.warmed_up(own)
    return session.world.from_main(lambda: discriminator.learn(packed, likeness, pairs, rate))


def _refuse_empty(components: Mapping[str, Component], packed: Packed) -> None:
    """A loss that can see no token would silently train nothing. A later step may lack what a loss looks for,
    as may any an outcome, demonstrations, repairs, whatever a teacher could tell."""
    spans = [select.spans for component in components.values() for select in selects_of(component)]
    seen = (bool(packed.of_kinds(some).any()) if some else len(packed.target) > 0 for some in spans)
    if packed.turns and not any(seen):
        raise ConfigError(
            f"The first step has {len(packed.target)} action tokens, but no loss component selects any of"
            f" them: check the `select.spans` of {', '.join(components)}."
        )


def minibatches(session: Session, experience: Experience) -> Iterator[Tensor]:
    """Token masks that deal out the trajectories evenly and at random, separately those of each source; whole
    groups, demonstrations included, where a component compares their episodes with each other, and
    alternatives with the episodes that they are of."""
    updates, config = session.config.trainer.updates_per_step, session.config
    random = np.random.Generator(np.random.Philox(key=[config.seed, session.step], counter=[0, 0, 2, 2**63]))
    paired = any(isinstance(component, Preference) for component in config.loss.components.values())
    trajectories = experience.trajectories
    share = torch.full((len(trajectories),), -1)
    kinds = [source_of(trajectory) for trajectory in trajectories]
    together, repaired = ("rollout", "demonstration"), ("correction", "practice")
    first = (together,) if paired else ((one,) for one in together)
    for sources in (*first, *((one,) for one in repaired)):
        mine = [i for i, kind in enumerate(kinds) if kind in sources]
        units: dict[str | int, list[int]] = {}
        for i in mine:
            units.setdefault((paired and trajectories[i].group) or i, []).append(i)
        dealt = list(units.values())
        for place, which in enumerate(random.permutation(len(dealt)).tolist()):
            share[dealt[which]] = place % updates
    places = {trajectory.uid: i for i, trajectory in enumerate(trajectories)}
    for i, trajectory in enumerate(trajectories):
        if trajectory.branch is not None and not trajectory.branch.tried:
            share[i] = share[places[trajectory.branch.parent]]
    assert bool((share >= 0).all())  # every source has been dealt out
    for number in range(updates):
        yield share[experience.packed.episode] == number


def accumulate(session: Session, experience: Experience, planned: Plan, *, shares: bool) -> dict[str, float]:
    """Gradient of the whole update batch; each component's loss, and with ``shares`` the norm of its gradient
    and that norm's part of their sum, for which each component has passes of its own.

    A rank passes over the tokens that are its own; gradients and losses are the sums over all ranks.
    """
    if not shares:
        return _by_component(_backward(session, experience, planned))
    losses, norms = dict[str, float](), dict[str, float]()
    masters = session.optimizer.masters
    total: list[Tensor | None] = [None] * len(masters)
    for name, part in planned.parts.items():
        losses |= _backward(session, experience, Plan({name: part}))
        norms[name] = session.optimizer.clip(math.inf)
        for i, (former, master) in enumerate(zip(total, masters, strict=True)):
            if master.grad is not None:
                total[i] = master.grad if former is None else former.add_(master.grad)
                master.grad = None
    for gradient, master in zip(total, masters, strict=True):
        master.grad = gradient
    whole = sum(norms.values())
    measured = {f"grad_norm/{name}": norm for name, norm in norms.items()}
    measured |= {f"grad_share/{name}": norm / whole if whole else 0.0 for name, norm in norms.items()}
    return _by_component(losses) | measured


def _clip_shares(session: Session, planned: Plan) -> dict[str, float]:
    """Of the tokens that count in a component that clips, the share whose gradient that took."""
    shares = {}
    for name, part in planned.parts.items():
        if part.clipped is not None:
            clipped = session.world.total(int(part.clipped.sum()))
            shares[f"clipped/{name}"] = clipped / max(1, int(part.coefficients.ne(0).sum()))
    return shares


def _by_component(losses: Mapping[str, float]) -> dict[str, float]:
    return {f"loss/{name}": value for name, value in losses.items()} | {"loss": sum(losses.values())}


def _backward(session: Session, experience: Experience, planned: Plan) -> dict[str, float]:
    """Add the gradient over this rank's micro-batches; each component's loss, summed over all ranks."""
    config, packed = session.config, experience.packed
    losses, flops, lean = dict.fromkeys(planned.parts, 0.0), 0, config.trainer.gradient_checkpointing
    for micro in _passes(session, packed, planned.keep & experience.owned):
        forward = partial(
            micro_losses, packed=packed, micro=micro, plan=planned, signals=experience.signals,
            temperature=config.rollout.temperature,
        )  # fmt: skip
        with recomputed(session.trained.model) if lean else nullcontext():
            parts = session.trained(forward)
        torch.stack(list(parts.values())).sum().backward()
        session.optimizer.collect()
        size = (session.trained.model, micro.n_tokens, micro.ids.shape[1] / 2)
        flops += forward_flops(*size) * (2 if lean else 1) + backward_flops(*size)
        for name, part in parts.items():
            losses[name] += float(part.detach())
    session.spend("update", session.world.total(flops))
    everywhere = session.world.gather(losses)
    return {name: sum(rank[name] for rank in everywhere) for name in losses}


def _passes(session: Session, packed: Packed, keep: Tensor) -> list[MicroBatch]:
    """This rank's micro-batches. Every pass gathers parameters from all ranks, so a rank with fewer of them
    than another makes up with empty ones."""
    micros = list(packed.micro_batches(session.config.trainer.micro_batch_tokens, keep))
    return micros + [EMPTY] * (max(session.world.gather(len(micros))) - len(micros))


@torch.no_grad()
def _current_logprobs(session: Session, experience: Experience, batch: Tensor) -> Tensor:
    """Log-probs [N] of the batch's tokens at the weights that are about to be updated; 0 for others."""
    packed, result = experience.packed, torch.zeros(len(experience.packed.target))

    def scored(student: PreTrainedModel, micro: MicroBatch) -> Tensor:
        hidden = hidden_states(student, micro.ids)[micro.row, micro.column]
        ids, temperature = packed.target[micro.tokens].to(hidden.device), session.config.rollout.temperature
        return token_terms(hidden, head(student), ids, temperature=temperature).logprob

    for micro in _passes(session, packed, batch & experience.owned):
        result[micro.tokens] = session.trained(partial(scored, micro=micro)).float().cpu()
        flops = forward_flops(session.trained.model, micro.n_tokens, micro.ids.shape[1] / 2)
        session.spend("update", session.world.total(flops))
    return session.world.sum(result)
