"""Trajectories + teacher signal + frozen token terms -> credit, without gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.composition import Composed
from opd_agents.frozen import FrozenTerms
from opd_agents.judging.opinions import NOTHING_SAID, Opinions
from opd_agents.plugins import CreditFunction
from opd_agents.types import Credit, Trajectory


def assign_credit(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    frozen: FrozenTerms | None,
    composed: Mapping[str, Composed],
    corrections: Mapping[tuple[str, int], str],
    opinions: Opinions = NOTHING_SAID,
    agreement: Mapping[tuple[str, int], float] = MappingProxyType({}),
) -> list[list[Credit]]:
    """One ``Credit`` per turn of each trajectory; ``composed`` are the advantages of policy components,
    ``corrections`` maps (trajectory uid, turn) to the verdict on a repair, ``opinions`` are a judge's,
    ``agreement`` is by (uid, turn), too."""
    count = packed.per_turn(torch.ones(len(packed.target))).clamp(min=1)
    terms = frozen.references.get("teacher") if frozen else None
    teacher = None if terms is None else packed.per_turn(terms.logprob)
    kl = None if terms is None or terms.kl is None else packed.per_turn(terms.kl)
    parts = {
        f"{name}.{part}": packed.per_turn(values) / count
        for name, one in composed.items()
        for part, values in one.parts.items()
    }
    credits: list[list[Credit]] = [[] for _ in trajectories]
    for number, (episode, index) in enumerate(packed.turns):
        trajectory = trajectories[episode]
        said = opinions.of(trajectory.uid, index)
        credits[episode].append(
            Credit(
                kl_sum=None if kl is None else float(kl[number]),
                kl_mean=None if kl is None else float(kl[number] / count[number]),
                teacher_logprob=None if teacher is None else float(teacher[number]),
                advantage={name: float(values[number]) for name, values in parts.items()},
                score=said.score if said else None,
                verdict=said.verdict if said else None,
                reason=said.reason if said else "",
                agreement=agreement.get((trajectory.uid, index)),
                correction=corrections.get((trajectory.uid, index)),
                weight=trajectory.turns[index].weight,
            )
        )
    return credits


def with_factors(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    credits: Sequence[Sequence[Credit]],
    functions: Mapping[str, CreditFunction],
) -> list[list[Credit]]:
    """The credits with the ``factors`` that each component's credit function gives."""
    turns: list[list[int]] = [[] for _ in trajectories]
    for episode, index in packed.turns:
        turns[episode].append(index)
    result = []
    for trajectory, own, indices in zip(trajectories, credits, turns, strict=True):
        given = {name: function(trajectory, own) for name, function in functions.items()} if own else {}
        chosen = [{name: values[index] for name, values in given.items()} for index in indices]
        result.append([replace(credit, factors=f) for credit, f in zip(own, chosen, strict=True)])
    return result


def factors(packed: Packed, credits: Sequence[Sequence[Credit]], component: str) -> Tensor:
    """The factor of every action token [N] in a component that has a credit function."""
    in_order = [iter(own) for own in credits]
    by_turn = [next(in_order[episode]).factors[component] for episode, _ in packed.turns]
    return torch.tensor(by_turn, dtype=torch.float32)[packed.turn]
