"""Trajectories + teacher signal + frozen token terms -> credit, without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType

import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.composition import Composed
from opd_agents.frozen import FrozenTerms
from opd_agents.judging.opinions import NOTHING_SAID, Opinions
from opd_agents.plugins import CreditFunction
from opd_agents.types import TOKEN_DIGITS, Credit, Trajectory, Turn


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


def with_tokens(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    credits: Sequence[Sequence[Credit]],
    frozen: FrozenTerms | None,
    composed: Mapping[str, Composed] = MappingProxyType({}),
    learned: Tensor | None = None,
) -> list[list[Credit]]:
    """The credits with what is known by token; ``learned`` (bool [N]; None: all) is where some component
    learns from."""
    terms = frozen.references.get("teacher") if frozen else None
    kl = advantage = None
    if frozen is not None and terms is not None:
        kl = frozen.logprob - terms.logprob if terms.kl is None else terms.kl
    if composed:
        advantage = torch.stack([one.advantage for one in composed.values()]).sum(0)
    said = torch.ones(len(packed.target), dtype=torch.bool) if learned is None else learned
    columns = zip(*(_by_turn(packed, values) for values in (kl, advantage, said)), strict=True)
    in_order = [iter(own) for own in credits]
    result: list[list[Credit]] = [[] for _ in trajectories]
    for (episode, index), (kls, advantages, taught) in zip(packed.turns, columns, strict=True):
        turn = trajectories[episode].turns[index]
        alike = len(set(advantages)) == 1
        own = replace(
            next(in_order[episode]),
            token_kl=tuple(_placed(turn, kls)),
            token_advantage=advantages[:1] if alike else tuple(_placed(turn, advantages)),
            unlearned=tuple(_gaps(_placed(turn, taught))),
        )
        result[episode].append(own)
    return result


def _by_turn(packed: Packed, values: Tensor | None) -> list[tuple[float, ...]]:
    """Rounded ``values`` [N] of each turn; nothing of None."""
    if values is None:
        return [()] * len(packed.turns)
    sizes = packed.turn.bincount(minlength=len(packed.turns)).tolist()
    return [tuple(part.tolist()) for part in values.double().round(decimals=TOKEN_DIGITS).split(sizes)]


def _placed(turn: Turn, values: Sequence[float]) -> Iterator[float]:
    """One for each id of the action, 0 where it was forced; of nothing none."""
    forced = {place for start, stop in turn.forced for place in range(start, stop)}
    given = iter(values)
    return (0.0 if i in forced else next(given) for i in range(len(turn.action_ids) if values else 0))


def _gaps(learned: Iterator[float]) -> Iterator[tuple[int, int]]:
    """The ranges of zeros."""
    for value, run in groupby(enumerate(learned), key=lambda pair: pair[1]):
        places = [place for place, _ in run]
        if not value:
            yield places[0], places[-1] + 1


def factors(packed: Packed, credits: Sequence[Sequence[Credit]], component: str) -> Tensor:
    """The factor of every action token [N] in a component that has a credit function."""
    in_order = [iter(own) for own in credits]
    by_turn = [next(in_order[episode]).factors[component] for episode, _ in packed.turns]
    return torch.tensor(by_turn, dtype=torch.float32)[packed.turn]
