"""What another would have done at states that the student came to, beside what the student did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd_agents.chat import Chat
from opd_agents.correction.states import Acted, Place, act_at
from opd_agents.distributed import ALONE, World
from opd_agents.envs import AgentEnv
from opd_agents.episode import Limits
from opd_agents.policies.base import Policy
from opd_agents.types import Actor, Branch, Outcome, Trajectory, Turn

FIRST_ALTERNATIVE = 2**21  # stream numbers of the draws, out of the way of the step's episodes and repairs


@dataclass(frozen=True, slots=True)
class Alternatives:
    """``trajectories``: the student's history to a state, weighing 0, and another action there, which was
    not carried out. Of ``asked`` states it is the student's own at ``same``: there is nothing to compare."""

    trajectories: tuple[Trajectory, ...] = ()
    asked: int = 0
    same: int = 0

    def metrics(self) -> dict[str, float | None]:
        """``alternatives/agreement``: the share of answers that are the student's own action."""
        answered = len(self.trajectories) + self.same
        return {
            "alternatives/asked": self.asked,
            "alternatives/pairs": len(self.trajectories),
            "alternatives/agreement": self.same / answered if answered else None,
        }


def act_otherwise(
    trajectories: Sequence[Trajectory],
    states: int,
    policy: Policy,
    *,
    stream: tuple[int, int],
    make: Callable[..., AgentEnv],
    chat: Chat,
    limits: Limits,
    world: World = ALONE,
) -> Alternatives:
    """``policy`` acts at up to ``states`` of the student's turns in episodes of the rollout, drawn by
    ``stream`` (seed, step). Raises NotForkable and ReplayDivergence where a state cannot be come back to."""
    places = [
        (one, number)
        for one in trajectories
        if one.outcome is not Outcome.ERROR and not (one.branch or one.demonstration or one.recorded)
        for number, turn in enumerate(one.turns)
        if turn.actor is Actor.STUDENT
    ]
    random = np.random.Generator(np.random.Philox(key=list(stream), counter=[0, 0, 6, 2**63]))
    chosen = [places[index] for index in sorted(random.permutation(len(places))[:states].tolist())]
    numbered = [(place, (*stream, FIRST_ALTERNATIVE + n)) for n, place in enumerate(chosen)]

    def act(mine: Sequence[tuple[Place, tuple[int, int, int]]]) -> list[Trajectory | None]:
        places, streams = [place for place, _ in mine], [stream for _, stream in mine]
        return act_at(places, policy, _alternative, make=make, chat=chat, limits=limits, streams=streams)

    answered = zip(chosen, world.shared(numbered, act), strict=True)
    answers = [(one, parent.turns[turn].action) for (parent, turn), one in answered if one is not None]
    found = tuple(one for one, own in answers if one.turns[-1].action != own)
    return Alternatives(found, len(chosen), len(answers) - len(found))


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
