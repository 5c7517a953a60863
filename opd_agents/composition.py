"""Components of the loss over the packed table: whom they select, how much each token weighs, and what a
policy component's advantage is composed of. Without gradient, once per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.config import Policy, ReferencePart, RewardPart, Select
from opd_agents.config.weights import Weight
from opd_agents.correction.practice import match_reward, published_reward, value_reward
from opd_agents.errors import AlignmentError
from opd_agents.judging.opinions import BEST, Opinions
from opd_agents.objectives import group_advantages, reference_advantages, whitened
from opd_agents.plugins import Reward
from opd_agents.types import Outcome, Trajectory
from opd_agents.weighting import At, WeightInputs, factor


@dataclass(frozen=True, slots=True)
class Composed:
    """A policy component's advantage [N], its parts [N] by name, and those of rewards by episode [E] (of a
    reward by action the sum of their sizes)."""

    advantage: Tensor
    parts: Mapping[str, Tensor]
    rewards: Mapping[str, Tensor]


def selected(packed: Packed, trajectories: Sequence[Trajectory], select: Select) -> Tensor:
    """Weight of every action token [N] for one component: the turn's weight where selected, else 0.

    Raises AlignmentError where tokens are to be selected by spans and a turn has none.
    """
    weights = []
    for episode, index in packed.turns:
        trajectory, turn = trajectories[episode], trajectories[episode].turns[index]
        chosen = (select.actor is None or turn.actor is select.actor) and _of(trajectory, select)
        weights.append(turn.weight if chosen else 0.0)
    result = torch.tensor(weights)[packed.turn]
    if select.spans is None:
        return result
    if bool((packed.kind < 0).any()):
        raise AlignmentError(
            f"select.spans {[kind.value for kind in select.spans]}: some actions were recorded without spans,"
            " so it is not known which of their tokens these are; roll out with a chat, or leave spans out."
        )
    return torch.where(packed.of_kinds(select.spans), result, torch.zeros(()))


def _of(trajectory: Trajectory, select: Select) -> bool:
    outcomes = [select.outcome] if isinstance(select.outcome, Outcome) else select.outcome
    source = source_of(trajectory)
    seen = select.source == source or (select.source is None and source != "alternative")
    return seen and not trajectory.replaced and (outcomes is None or trajectory.outcome in outcomes)


def source_of(trajectory: Trajectory) -> str:
    if trajectory.branch is not None and trajectory.group:
        return "practice"
    if trajectory.branch is not None:
        return "correction" if trajectory.branch.tried else "alternative"
    return "demonstration" if trajectory.demonstration else "rollout"


def weigh(weights: Sequence[Weight], inputs: WeightInputs, at: At) -> Tensor:
    """The product of further weights [N], 1 where there are none."""
    result = torch.ones(len(inputs.target))
    for weight in weights:
        result = result * factor(weight, inputs, at)
    return result


def compose(
    component: Policy,
    packed: Packed,
    trajectories: Sequence[Trajectory],
    inputs: WeightInputs,
    at: At,
    rewards: Mapping[str, Reward],
    opinions: Opinions,
) -> Composed:
    """``sum_j coef_j g_j d_j + sum_i coef_i g_i A_i`` of every token; ``rewards``: the plug-ins of parts, and
    ``opinions`` what a judge said, which verbal ones are of."""
    parts, compared = {}, {}
    for name, part in component.references.items():
        parts[name] = _reference_part(part, inputs, at)
    for name, reward_part in component.rewards.items():
        if (score := scores_of_actions(reward_part, opinions)) is not None:
            of_turns = action_advantages(packed, trajectories, reward_part, component.select, score)
            own = torch.zeros(len(trajectories)).index_add(0, _episodes(packed), of_turns.abs())
            advantage = of_turns[packed.turn]
        else:
            reward = _of_episode(reward_part, opinions) or rewards.get(name)
            own = reward_advantages(trajectories, reward_part, component.select, reward)
            advantage = own[packed.episode]
        parts[name] = _reward_part(reward_part, advantage, inputs, at)
        compared[name] = own
    total = torch.stack(list(parts.values())).sum(0)
    if component.whiten:
        total = whitened(total, inputs.selected.float())
    return Composed(total, parts, compared)


def _reference_part(part: ReferencePart, inputs: WeightInputs, at: At) -> Tensor:
    terms, nothing = inputs.references[part.reference], torch.zeros(())
    d, kl = terms.logprob - inputs.logprob, None
    # A token that the reference gives no probability stops the run, unless it is another component's matter.
    d = torch.where(inputs.selected | d.isfinite(), d, nothing)
    if part.baseline == "closed_form" and terms.kl is not None:
        kl = torch.where(inputs.selected, terms.kl, nothing)
    of_tokens = inputs.spans.get(part.reference, torch.arange(len(d)))
    d, episode, place = _summed(d, inputs.episode, inputs.turn if part.unit == "turn" else of_tokens)
    values = reference_advantages(
        d, episode, discount=part.discount, include_now=part.include_now,
        length_normalise=part.length_normalise, clip=part.clip, kl=kl,
    )  # fmt: skip
    return at(part.coef) * weigh(part.gates, inputs, at) * values[place]


def _summed(d: Tensor, episode: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of each unit's d [units], its episode [units], and the unit of each token, int64 [N]."""
    _, place, sizes = unit.unique_consecutive(return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    return torch.zeros(len(sizes), dtype=d.dtype).index_add(0, place, d), episode[first], place


def _reward_part(part: RewardPart, advantage: Tensor, inputs: WeightInputs, at: At) -> Tensor:
    gates = torch.ones(len(advantage))
    for gate in part.gates:
        gates = gates * factor(gate, inputs, at, advantage)
    return at(part.coef) * gates * advantage


def reward_advantages(
    trajectories: Sequence[Trajectory], part: RewardPart, select: Select, reward: Reward | None = None
) -> Tensor:
    """Advantage of each trajectory [E]; 0 for errors and ungrouped episodes, as accepted repairs are.

    ``reward`` of a trajectory is what is compared (NaN: none); None: what the environment gave. A group's
    demonstrations are compared with the student's episodes, unless ``select.source`` is rollout. An
    unfinished episode counts with the reward that it has, or where the part masks it not at all, as one whose
    environment failed or which a demonstration replaced.
    """
    given = {i: reward(t) if reward else t.reward for i, t in _compared(trajectories, part, select)}
    return _advantages(given, group_numbers(trajectories), part)


def action_advantages(
    packed: Packed,
    trajectories: Sequence[Trajectory],
    part: RewardPart,
    select: Select,
    score: Callable[[Trajectory, int], float],
) -> Tensor:
    """Advantage of each turn of the packed table by its own ``score`` (NaN: none), over all those of its
    group; 0 where there is none, and where :func:`reward_advantages` of an episode is."""
    groups, compared = group_numbers(trajectories), dict(_compared(trajectories, part, select))
    given = {
        number: score(trajectories[episode], turn)
        for number, (episode, turn) in enumerate(packed.turns)
        if episode in compared
    }
    return _advantages(given, groups[_episodes(packed)], part)


def _compared(
    trajectories: Sequence[Trajectory], part: RewardPart, select: Select
) -> Iterator[tuple[int, Trajectory]]:
    """The episodes that a reward compares, with their places."""
    for index, one in enumerate(trajectories):
        grouped = bool(one.group) or part.baseline == "none"
        branched = one.branch is not None and not one.group  # what is practised is of a group
        played = not (branched or one.recorded) and one.outcome is not Outcome.ERROR
        masked = part.unfinished == "masked" and one.cut_off
        apart = one.replaced or (select.source == "rollout" and one.demonstration)
        if grouped and played and not masked and not apart:
            yield index, one


def _advantages(given: Mapping[int, float], groups: Tensor, part: RewardPart) -> Tensor:
    """Of items [M] in ``groups`` [M], those that are ``given`` a number compared with each other."""
    counted = [index for index, value in given.items() if not math.isnan(value)]
    result = torch.zeros(len(groups))
    if counted:
        result[counted] = group_advantages(
            torch.tensor([given[index] for index in counted], dtype=torch.float32), groups[counted],
            baseline=part.baseline, normalise=part.normalise,
        )  # fmt: skip
    return result


def _of_episode(part: RewardPart, opinions: Opinions) -> Reward | None:
    """A reward of whole episodes that is a judge's, or SCoRe's."""
    if part.verbal is not None:
        return lambda one: _on_scale(opinions.episode_score(one))
    return None if part.key_step is None else published_reward


def scores_of_actions(part: RewardPart, opinions: Opinions) -> Callable[[Trajectory, int], float] | None:
    """A reward of single actions."""

    def verbal(one: Trajectory, turn: int) -> float:
        said = opinions.of(one.uid, turn)
        return _on_scale(said.score if said else None)

    if part.verbal == "action":
        return verbal
    return {"match": match_reward, "value": value_reward}.get(part.key_step or "")


def _on_scale(score: float | None) -> float:
    return math.nan if score is None else score / BEST


def _episodes(packed: Packed) -> Tensor:
    """The episode of each turn."""
    return torch.tensor([episode for episode, _ in packed.turns], dtype=torch.int64)


def group_numbers(trajectories: Sequence[Trajectory]) -> Tensor:
    """A number for the group of each trajectory, int64 [E]; -1: of none, as a branch."""
    names = {group: number for number, group in enumerate(sorted({t.group for t in trajectories if t.group}))}
    return torch.tensor([names.get(t.group, -1) for t in trajectories], dtype=torch.int64)
