"""Figures of a step's tokens: how sure the student is, how far from its references, and what the components
of the loss see of it. Over tokens that every rank knows, so that all have the same figures."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from opd_agents.batch import range_of, turns_of
from opd_agents.composition import selected
from opd_agents.config import Component, CrossEntropy, Distill, Policy
from opd_agents.episode_metrics import recovery, refused_or_repeated
from opd_agents.experience import Assigned, Experience
from opd_agents.teachers import SpanLogprobs
from opd_agents.types import Actor, SpanKind

UNLIKELY = math.log(100)  # nats: an action that the teacher finds so much less probable than the student
ROUNDING = 1e-4  # nats a token: less is no figure to divide by
FEW = 100  # tokens, of which one may well hold much

Figures = dict[str, float | None]


def token_metrics(
    experience: Experience, assigned: Assigned, components: Mapping[str, Component], *, recorded: bool
) -> Figures:
    """All of them, each explained where it is made; ``recorded``: also of recorded conversations."""
    return {
        **_student(experience),
        **_distances(experience, recorded=recorded),
        **_astray(experience),
        **_selected(experience, assigned, components),
        **_advantages(experience, assigned, components),
    }


def of_actor(experience: Experience, actor: Actor) -> Tensor:
    packed, trajectories = experience.packed, experience.trajectories
    of_turn = [trajectories[episode].turns[index].actor is actor for episode, index in packed.turns]
    return torch.tensor(of_turn, dtype=torch.bool)[packed.turn]


def _mean(values: Tensor, where: Tensor) -> float | None:
    return float(values[where].mean()) if bool(where.any()) else None


def _by_place(experience: Experience, key: str, values: Tensor, where: Tensor) -> Figures:
    """The mean of tokens [N], of those in each kind of span and of those in each range of turns."""
    packed = experience.packed
    depth = torch.tensor([range_of(turn) for _, turn in packed.turns], dtype=torch.int64)[packed.turn]
    found = {key: _mean(values, where)}
    found |= {f"{key}_{kind}": _mean(values, where & packed.of_kinds([kind])) for kind in SpanKind}
    ranges = range(int(depth.max()) + 1 if len(depth) else 0)
    found |= {f"{key}_{_turns(number)}": _mean(values, where & (depth == number)) for number in ranges}
    return {key: found.pop(key)} | _known(found)


def _known(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if value is not None}


def _turns(number: int) -> str:
    first, last = turns_of(number)
    return f"turn_{first}" if first == last else f"turns_{first}_{last}"


def _student(experience: Experience) -> Figures:
    """The entropy of its distributions, nats a token."""
    student = of_actor(experience, Actor.STUDENT)
    if not bool(student.any()):
        return {}
    return _by_place(experience, "student/entropy", experience.frozen.entropy, student)


def _distances(experience: Experience, *, recorded: bool) -> Figures:
    """Of the student from every reference, each over the tokens that it had something to say about.

    ``distill/kl`` is the mean KL(student || teacher) in nats per student token, ``recorded/kl`` that per
    recorded token; of a teacher that tells log-probs only, ``distill/log_ratio`` is the mean log q - log p of
    the student's tokens, which estimates it. Of another reference it is ``kl/NAME`` or ``log_ratio/NAME``.
    ``taught/NAME`` is the share of the student's tokens that a reference of some of them only (one that is
    told more, one with routes, one with another tokenizer) had something to say about, ``span_tokens/NAME``
    how many of them a span has on average. ``distill/overlap``: see `ReferenceTerms`;
    ``distill/teacher_entropy`` is the teacher's, nats a token of the student's; ``distill/snr``: how many
    standard errors the mean d is away from 0."""
    row: Figures = {}
    student = of_actor(experience, Actor.STUDENT)
    for name, terms in experience.frozen.references.items():
        own, taught = name == "teacher", experience.taught.get(name, torch.ones_like(student))
        heard = student & taught
        if name in experience.taught:
            row[f"taught/{name}"] = _mean(taught.float(), student)
        if isinstance(signal := experience.signals[name], SpanLogprobs):
            row[f"span_tokens/{name}"] = int(heard.sum()) / max(1, int((heard & ~signal.joined).sum()))
        what = "log_ratio" if terms.kl is None else "kl"
        values = experience.frozen.logprob - terms.logprob if terms.kl is None else terms.kl
        if not own:
            row[f"{what}/{name}"] = _mean(values, heard)
            continue
        row |= _by_place(experience, f"distill/{what}", values, heard)
        more = {"distill/overlap": terms.overlap, "distill/teacher_entropy": terms.entropy}
        row |= _known({key: _mean(of, heard) for key, of in more.items() if of is not None})
        d = terms.logprob - experience.frozen.logprob
        row |= _known({"distill/snr": _signal_to_noise(experience, d, heard)})
        if recorded and terms.kl is not None:
            row["recorded/kl"] = _mean(terms.kl, of_actor(experience, Actor.CORPUS) & taught)
    return row


def _signal_to_noise(experience: Experience, d: Tensor, heard: Tensor) -> float | None:
    """How many standard errors the mean d of a token is away from 0, over the episodes that have any."""
    episode, size = experience.packed.episode, len(experience.trajectories)
    sums, counts = (
        torch.zeros(size, dtype=torch.float64).index_add(0, episode[heard], values[heard].double())
        for values in (d, torch.ones_like(d))
    )
    means = sums[counts > 0] / counts[counts > 0]
    if len(means) < 2:
        return None
    if float(d[heard].abs().mean()) < ROUNDING:
        return 0.0
    return float(means.mean().abs() / (means.std() / len(means) ** 0.5))


def _astray(experience: Experience) -> Figures:
    """What comes after a wrong action: one that was refused, repeats another in the same state, or that the
    teacher finds a hundred times less probable than the student."""
    packed, frozen = experience.packed, experience.frozen
    rolled = {one.uid for one in experience.rollouts if not one.error}
    teacher = frozen.references.get("teacher")
    d = torch.zeros(()) if teacher is None else packed.per_turn(teacher.logprob - frozen.logprob)
    unlikely = (d < -UNLIKELY).expand(len(packed.turns)).tolist()
    found = [list(refused_or_repeated(one)) for one in experience.trajectories]
    for (episode, turn), is_unlikely in zip(packed.turns, unlikely, strict=True):
        found[episode][turn] |= is_unlikely
    whose = [(one, of) for one, of in zip(experience.trajectories, found, strict=True) if one.uid in rolled]
    row: Figures = {**recovery([one for one, _ in whose], [of for _, of in whose])}
    if teacher is None or teacher.kl is None:
        return row
    later = [
        experience.trajectories[episode].uid in rolled and any(found[episode][:turn])
        for episode, turn in packed.turns
    ]
    where = torch.tensor(later, dtype=torch.bool)[packed.turn] & of_actor(experience, Actor.STUDENT)
    where = where & experience.taught.get("teacher", torch.ones_like(where))
    return row | _known({"distill/kl_astray": _mean(teacher.kl, where)})


# ---- what the components of the loss see


def _selected(experience: Experience, assigned: Assigned, components: Mapping[str, Component]) -> Figures:
    """The share of all action tokens that a component selects, where it says ``spans`` their share in what
    it would select without, and what the largest token holds of all that the component says."""
    packed, trajectories, row = experience.packed, experience.trajectories, Figures()
    for name, counted in assigned.counted.items():
        row[f"selected/{name}"] = _mean(counted.float(), torch.ones_like(counted))
        select = components[name].select
        if select.spans is not None:
            whole = selected(packed, trajectories, select.model_copy(update={"spans": None})) != 0
            row[f"spans/{name}"] = _mean(packed.of_kinds(select.spans).float(), whole)
        said = _said(components[name], name, experience, assigned)
        if said is not None and (share := _largest(said[counted])) is not None:
            row[f"top_token/{name}"] = share
    return row


def _said(component: Component, name: str, experience: Experience, assigned: Assigned) -> Tensor | None:
    """The size of what a component says of each token [N], nats or advantage times weight."""
    frozen, weight = experience.frozen, assigned.weights[name]
    match component:
        case Distill(reference=reference):
            terms = frozen.references[reference]
            return weight * (terms.kl if terms.kl is not None else (terms.logprob - frozen.logprob).abs())
        case Policy():
            return weight * assigned.composed[name].advantage.abs()
        case CrossEntropy():
            return weight * -frozen.logprob
    return None


def _largest(said: Tensor) -> float | None:
    """The largest part of the sum; of few tokens, or where there is but rounding, nothing to tell."""
    if len(said) < FEW or not float(said.mean()) > ROUNDING:
        return None
    return float(said.max() / said.sum())


def _advantages(
    experience: Experience, assigned: Assigned, components: Mapping[str, Component]
) -> dict[str, float | None]:
    """Root mean square of each part of an advantage over the tokens that its component selects, and of those
    from references over those from rewards; groups whose episodes any reward tells apart."""
    rows: Figures = {}
    told: set[str] | None = None
    for name, composed in assigned.composed.items():
        chosen = assigned.counted[name]
        for part, values in composed.parts.items():
            rows[f"advantage/{name}.{part}"] = _rms(values[chosen])
        for values in composed.rewards.values():
            apart = zip(experience.trajectories, values.tolist(), strict=True)
            told = (told or set()) | {t.group for t, a in apart if t.group and a and t.branch is None}
        rows |= _ratio(components[name], name, composed.parts, chosen)
    if told is not None:
        total = len({t.group for t in experience.rollouts if t.group})
        rows |= {"groups/total": total, "groups/nonzero": len(told)}
    return rows


def _ratio(component: Component, name: str, parts: Mapping[str, Tensor], chosen: Tensor) -> Figures:
    """Of a component that has both kinds of parts, where the rewards tell anything apart."""
    if not (isinstance(component, Policy) and component.references and component.rewards):
        return {}
    references, rewards = (
        _rms(torch.stack([parts[part] for part in side]).sum(0)[chosen])
        for side in (component.references, component.rewards)
    )
    return {f"advantage_ratio/{name}": references / rewards} if rewards else {}


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0
