"""Earliest-error correction (after SCoRe, arXiv 2509.14257), with evidence.

For a failed episode the earliest action that the teacher finds improbable is proposed, or the one that a
judge names. The environment is restored to the state before it (replayed and checked by digest, so the error
has not happened yet); what the teacher does there, or the judge proposes, replaces that one action, executed
for real; the student resumes. The repair is accepted on the evidence of fresh rollouts alone (see `verify`):
neither the failed episode nor what proposed the repair counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from opd_agents.chat import Chat
from opd_agents.config import Correction
from opd_agents.correction.states import Acted, Place, act_at
from opd_agents.correction.thought import Reasoning, with_reasoning
from opd_agents.correction.verify import Plays, Proposal, Repair, generated, verify
from opd_agents.distributed import ALONE, World
from opd_agents.envs import AgentEnv
from opd_agents.episode import Limits
from opd_agents.policies.base import Action, History, Policy, RandomPolicy
from opd_agents.rollout import rollout
from opd_agents.teachers.api import Writable
from opd_agents.types import Actor, StopReason, Trajectory

FIRST_PROPOSAL = 2**23  # stream numbers of the draws of proposed actions


def correct(
    errors: Sequence[Place],
    settings: Correction,
    *,
    stream: tuple[int, int],
    token_budget: float,
    student: Policy,
    proposes: Policy,
    resumes: Policy,
    make: Callable[..., AgentEnv],
    chat: Chat,
    limits: Limits,
    temperature: float,
    world: World = ALONE,
    again: int = 0,
) -> list[Repair]:
    """Repairs of up to ``settings.episodes_per_step`` of the ``errors``, as many as ``token_budget``
    generated tokens are likely to bring through the first look.

    One ``proposes`` an action, after which another ``resumes``. ``stream`` is (seed, step), ``again`` how
    often it was called in this step before. Repairs that change nothing are dropped. Of several processes
    each proposes and verifies its share, and all get all repairs.
    """
    chosen = _chosen(errors, settings, stream, token_budget, again)
    first = again * settings.episodes_per_step
    live: dict[int, Proposal] = {}  # this process's: an environment stays where it was made

    def propose(places: Sequence[int]) -> list[bool]:
        at = partial(act_at, make=make, chat=chat, limits=limits)
        for control, policy in ((False, proposes), (True, Writable(RandomPolicy(), chat))):
            mine = [place for place in places if chosen[place].control is control]
            streams = [(*stream, FIRST_PROPOSAL + first + place) for place in mine]
            states = [(chosen[place].parent, chosen[place].turn) for place in mine]
            made_of = partial(_proposal, control=control, chat=chat, reasoning=settings.reasoning)
            proposals = at(states, policy, made_of, streams=streams)
            live.update((place, p) for place, p in zip(mine, proposals, strict=True) if p is not None)
        return [place in live for place in places]

    def prove(places: Sequence[int]) -> list[Repair | None]:
        numbered = {numbers[place]: live[place] for place in places if place in live}
        play = partial(rollout, make=make, chat=chat, limits=limits, temperature=temperature)
        alone = partial(play, policy=student)
        plays = Plays(alone, alone if resumes is student else partial(play, policy=resumes))
        repairs = iter(verify(numbered, settings, stream, plays))
        return [next(repairs) if place in live else None for place in places]

    proposed = world.shared(range(len(chosen)), propose)
    numbers = list(accumulate(proposed, initial=first))  # a proposal's: how many there are before it
    return [repair for repair in world.shared(range(len(chosen)), prove) if repair is not None]


class _Chosen(NamedTuple):
    parent: Trajectory
    turn: int
    control: bool


def _chosen(
    errors: Sequence[Place], settings: Correction, stream: tuple[int, int], token_budget: float, again: int
) -> list[_Chosen]:
    """Some of ``errors``, drawn without replacement, a share of them turned into controls."""
    random, chance = (
        np.random.Generator(np.random.Philox(key=list(stream), counter=[0, again, number, 2**63]))
        for number in (1, 9)
    )
    arms = 1 + len(settings.verify.rivals)
    chosen: list[_Chosen] = []
    for index in random.permutation(len(errors)).tolist():
        parent, turn = errors[index]
        control = bool(chance.random() < settings.random)
        if control:
            turn = int(chance.integers(len(parent.turns)))
        # every rollout is likely to be as long as the rest of the failed episode
        token_budget -= arms * settings.verify.rollouts[0] * generated(parent.turns[turn:])
        if token_budget < 0 or len(chosen) == settings.episodes_per_step:
            break
        chosen.append(_Chosen(parent, turn, control))
    return chosen


@dataclass(frozen=True, slots=True)
class Proposed:
    """Says at each state what was proposed for it, ``texts`` by episode."""

    texts: Mapping[str, str]

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [
            Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=self.texts[history.uid])
            for history in histories
        ]


def _proposal(acted: Acted, control: bool, chat: Chat, reasoning: Reasoning) -> Proposal | None:
    """None for a repair that would change nothing, or that the chat cannot write as it is to be."""
    saved = acted.host.call(acted.env.snapshot)
    action = with_reasoning(acted, chat, reasoning)
    if action is None or acted.changes_nothing():
        return None
    return Proposal(acted.parent, acted.turn, saved, action, acted.said.to_env, control)
