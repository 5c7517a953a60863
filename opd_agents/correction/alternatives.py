"""What another would have done at states that the student came to, beside what the student did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from opd_agents.chat import Chat
from opd_agents.correction.states import Acted, Place, act_at
from opd_agents.distributed import ALONE, World
from opd_agents.envs import AgentEnv
from opd_agents.envs.actions import same_action
from opd_agents.episode import Limits
from opd_agents.judging.preferences import NO_PREFERENCE, Preferred
from opd_agents.policies.base import Policy
from opd_agents.types import Actor, Branch, Outcome, Trajectory, Turn

FIRST_ALTERNATIVE = 2**21  # stream numbers of the draws, out of the way of the step's episodes and repairs


@dataclass(frozen=True, slots=True)
class Alternatives:
    """``trajectories``: the student's history to a state, weighing 0, and another action there, which was
    not carried out, the most frequent of those that are not the student's own. ``agreement``: by uid and turn
    of the ``asked`` states that were answered, the share of the answers that are the student's own action.
    ``preferred``: what a judge said of the pairs that there were, where it was asked."""

    trajectories: tuple[Trajectory, ...] = ()
    asked: int = 0
    agreement: Mapping[tuple[str, int], float] = field(default_factory=dict)
    preferred: Preferred = NO_PREFERENCE

    def judged(self, preferred: Preferred) -> Alternatives:
        """The pairs of which the judge prefers one action, each with its order."""
        kept = [
            replace(one, branch=replace(one.branch, better=preferred.better[one.uid]))
            for one in self.trajectories
            if one.branch is not None and one.uid in preferred.better
        ]
        return replace(self, trajectories=tuple(kept), preferred=preferred)

    def metrics(self) -> dict[str, float | None]:
        """``alternatives/agreement``: the mean over states."""
        shares = self.agreement.values()
        return {
            "alternatives/asked": self.asked,
            "alternatives/pairs": len(self.trajectories),
            "alternatives/agreement": sum(shares) / len(shares) if shares else None,
        } | self.preferred.metrics()


def act_otherwise(
    trajectories: Sequence[Trajectory],
    states: int,
    policy: Policy,
    *,
    stream: tuple[int, int],
    make: Callable[..., AgentEnv],
    chat: Chat,
    limits: Limits,
    samples: int = 1,
    world: World = ALONE,
) -> Alternatives:
    """``policy`` acts ``samples`` times at each of up to ``states`` of the student's turns in episodes of the
    rollout, drawn by ``stream`` (seed, step). Raises NotForkable and ReplayDivergence where a state cannot be
    come back to."""
    places = [
        (one, number)
        for one in trajectories
        if one.outcome is not Outcome.ERROR and not (one.branch or one.demonstration or one.recorded)
        for number, turn in enumerate(one.turns)
        if turn.actor is Actor.STUDENT
    ]
    random = np.random.Generator(np.random.Philox(key=list(stream), counter=[0, 0, 6, 2**63]))
    chosen = [places[index] for index in sorted(random.permutation(len(places))[:states].tolist())]
    every = [place for place in chosen for _ in range(samples)]
    numbered = [(place, (*stream, FIRST_ALTERNATIVE + n)) for n, place in enumerate(every)]

    def act(mine: Sequence[tuple[Place, tuple[int, int, int]]]) -> list[Trajectory | None]:
        places, streams = [place for place, _ in mine], [stream for _, stream in mine]
        return act_at(places, policy, _alternative, make=make, chat=chat, limits=limits, streams=streams)

    answered = world.shared(numbered, act, samples)
    others: list[Trajectory] = []
    agreement: dict[tuple[str, int], float] = {}
    for number, (parent, turn) in enumerate(chosen):
        answers = [one for one in answered[number * samples : (number + 1) * samples] if one is not None]
        own = [same_action(one.turns[-1].action, parent.turns[turn].action) for one in answers]
        if answers:
            agreement[parent.uid, turn] = sum(own) / len(answers)
        if differing := [one for one, same in zip(answers, own, strict=True) if not same]:
            others.append(_most_frequent(differing))
    return Alternatives(tuple(others), len(chosen), agreement)


def _most_frequent(others: Sequence[Trajectory]) -> Trajectory:
    """The first one whose last action is the most frequent."""
    counts = Counter(one.turns[-1].action for one in others)
    return max(others, key=lambda one: counts[one.turns[-1].action])


def _alternative(acted: Acted) -> Trajectory:
    """Another action at the end of the student's history."""
    parent, said, old = acted.parent, acted.said, acted.parent.turns[acted.turn]
    other = Turn(
        context_ids=old.context_ids, action_ids=said.ids, logprobs=acted.action.logprobs,
        actor=acted.action.actor, policy_version=acted.action.policy_version, text=said.text,
        action=said.to_env, observation="", reward=0.0, terminated=False, truncated=False,
        stop_reason=acted.action.stop_reason, state_digest=old.state_digest, parse_error=said.error,
        spans=said.spans, starts_segment=old.starts_segment,
    )  # fmt: skip
    before = tuple(replace(turn, weight=0.0) for turn in parent.turns[: acted.turn])
    return replace(
        parent, uid=f"{parent.uid}-other{acted.turn}", turns=(*before, other), outcome=Outcome.UNFINISHED,
        reward=0.0, group="", branch=Branch(parent.uid, acted.turn, tried=False), final_digest="",
        exhausted=None, replaced=False,
    )  # fmt: skip
