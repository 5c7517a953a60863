"""First form of earliest-error correction (after SCoRe, arXiv 2509.14257), with evidence.

For a failed episode the earliest action that the teacher finds improbable is proposed, or the one that a
judge names. The environment is restored to the state before it (replayed and checked by digest, so the error
has not happened yet); what the teacher does there, or the judge proposes, replaces that one action, executed
for real; the student resumes. The repair is accepted if fresh student re-rollouts succeed more often after it
than after the student's own action from the same state. The failed episode itself is no evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import Correction
from opd_agents.correction.states import Acted, Place, act_at
from opd_agents.distributed import ALONE, World
from opd_agents.envs import AgentEnv, Snapshot
from opd_agents.episode import Episode, Limits, Start
from opd_agents.policies.base import Action, History, Policy
from opd_agents.rollout import rollout
from opd_agents.types import Actor, Branch, Outcome, StopReason, Task, Trajectory, Turn

FIRST_BRANCH = 2**20  # stream numbers of branches, out of the way of the step's episodes


@dataclass(frozen=True, slots=True)
class Repair:
    """What was tried at turn ``turn`` of ``parent``, and what the evidence says."""

    parent: Trajectory
    turn: int
    teacher_action: str
    trials: int  # fresh student re-rollouts in each arm
    success_student: float  # share of them that succeed after the student's own action
    success_repair: float  # ... after the teacher's
    accepted: bool
    tokens: int  # generated for this repair and its verification
    branch: Trajectory | None  # a successful continuation after an accepted repair, to train on


@dataclass(frozen=True, slots=True)
class _Proposal:
    parent: Trajectory
    turn: int
    saved: Snapshot  # before the action
    teacher: Action
    teacher_action: str  # as the environment gets it


def correct(
    errors: Sequence[Place],
    settings: Correction,
    *,
    stream: tuple[int, int],
    token_budget: float,
    student: Policy,
    teacher: Policy,
    make: Callable[..., AgentEnv],
    chat: Chat,
    limits: Limits,
    temperature: float,
    world: World = ALONE,
) -> list[Repair]:
    """Repairs of up to ``settings.episodes_per_step`` of the ``errors`` in ``token_budget`` generated tokens.

    ``stream`` is (seed, step). No-op repairs are refused. Of several processes each proposes and verifies its
    share, and all get all repairs.
    """
    random = np.random.Generator(np.random.Philox(key=list(stream), counter=[0, 0, 1, 2**63]))
    chosen: list[tuple[Trajectory, int]] = []
    for index in random.permutation(len(errors)).tolist():
        parent, turn = errors[index]
        token_budget -= _expected_tokens(parent, turn, settings.trials)
        if token_budget < 0 or len(chosen) == settings.episodes_per_step:
            break
        chosen.append((parent, turn))
    live: dict[int, _Proposal] = {}  # this process's: an environment stays where it was made

    def propose(places: Sequence[int]) -> list[bool]:
        states, streams = [chosen[place] for place in places], [(0, 0, 0)] * len(places)
        proposals = act_at(
            states, teacher, _proposal, make=make, chat=chat, limits=limits, streams=streams
        )  # fmt: skip
        live.update((place, p) for place, p in zip(places, proposals, strict=True) if p is not None)
        return [proposal is not None for proposal in proposals]

    def verify(places: Sequence[int]) -> list[Repair | None]:
        numbered = {numbers[place]: live[place] for place in places if place in live}
        play = partial(rollout, policy=student, make=make, chat=chat, limits=limits, temperature=temperature)
        repairs = iter(_verify(numbered, settings, stream, play))
        return [next(repairs) if place in live else None for place in places]

    proposed = world.shared(range(len(chosen)), propose)
    numbers = list(accumulate(proposed, initial=0))  # a proposal's: how many there are before it
    return [repair for repair in world.shared(range(len(chosen)), verify) if repair is not None]


def _verify(
    proposals: Mapping[int, _Proposal],
    settings: Correction,
    stream: tuple[int, int],
    play: Callable[[list[Episode]], list[Trajectory]],
) -> list[Repair]:
    """Re-roll out after both actions of each proposal; the keys number them over the whole step."""
    episodes = [
        _branch_episode(proposal, arm, trial, settings.trials, number, stream)
        for number, proposal in proposals.items()
        for arm in ("repair", "student")
        for trial in range(settings.trials)
    ]
    finished = play(episodes)
    arms = [finished[i : i + settings.trials] for i in range(0, len(finished), settings.trials)]
    judged = zip(proposals.values(), arms[::2], arms[1::2], strict=True)
    return [_judge(proposal, repaired, own, settings.min_gain) for proposal, repaired, own in judged]


def earliest_errors(
    trajectories: Sequence[Trajectory], packed: Packed, teacher_logprob: Tensor, below: float
) -> list[Place]:
    """(failed trajectory, its first turn to which the teacher gives a log-prob under ``below``);
    ``teacher_logprob`` [N] belongs to ``packed``."""
    found: dict[int, int] = {}
    for (episode, turn), value in zip(packed.turns, packed.per_turn(teacher_logprob).tolist(), strict=True):
        if may_be_repaired(trajectories[episode]) and value < below:
            found.setdefault(episode, turn)
    return [(trajectories[episode], turn) for episode, turn in sorted(found.items())]


def may_be_repaired(trajectory: Trajectory) -> bool:
    """A failed episode of the rollout."""
    played = not (trajectory.recorded or trajectory.demonstration or trajectory.branch)
    return trajectory.outcome in (Outcome.FAILURE, Outcome.UNFINISHED) and played


@dataclass(frozen=True, slots=True)
class Proposed:
    """Says at each state what was proposed for it, ``texts`` by episode."""

    texts: Mapping[str, str]

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [
            Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=self.texts[history.uid])
            for history in histories
        ]


def _expected_tokens(parent: Trajectory, turn: int, trials: int) -> int:
    """Both arms of every trial are likely to be as long as the rest of the failed episode."""
    rest = _new_tokens(parent.turns[turn:])
    return 2 * trials * rest


def _proposal(acted: Acted) -> _Proposal | None:
    """None for a repair that would change nothing."""
    if acted.same or acted.host.env is None:
        return None
    saved = acted.host.call(acted.host.env.snapshot)
    return _Proposal(acted.parent, acted.turn, saved, acted.action, acted.said.to_env)


def _branch_episode(
    proposal: _Proposal, arm: str, trial: int, trials: int, number: int, stream: tuple[int, int]
) -> Episode:
    """One re-rollout: the arm's action executed under fresh noise, then the student resumes."""
    parent, turn = proposal.parent, proposal.turn
    place = (2 * number + (arm == "student")) * trials + trial
    seed = int(np.random.SeedSequence([*stream, FIRST_BRANCH + place]).generate_state(1)[0])
    old = parent.turns[turn]
    action = proposal.teacher
    if arm == "student":
        action = Action(
            old.actor, old.stop_reason, old.action_ids, old.logprobs, policy_version=old.policy_version,
            forced=old.forced,
        )  # fmt: skip
    inherited = tuple(dataclasses.replace(t, weight=0.0) for t in parent.turns[:turn])
    branch = Branch(parent.uid, turn)
    start = Start(
        proposal.saved, branch, inherited, parent.messages, old.context_ids, old.starts_segment, action
    )
    return Episode(
        uid=f"{parent.uid}-{arm}{trial}",
        env_id=parent.env_id,
        env_kwargs=parent.env_kwargs,
        seed=seed,
        task=Task(parent.task.id, parent.task.split),
        stream=(*stream, FIRST_BRANCH + place),
        start=start,
    )


def _judge(
    proposal: _Proposal, repaired: Sequence[Trajectory], original: Sequence[Trajectory], min_gain: float
) -> Repair:
    turn = proposal.turn
    success_repair, success_student = _success(repaired), _success(original)
    if success_repair is None or success_student is None:
        accepted = False
    else:
        accepted = success_repair - success_student >= min_gain
    # the student arm repeats an action that is paid already; the teacher's is counted once
    resumed = sum(_new_tokens(t.turns[turn + 1 :]) for t in (*repaired, *original))
    return Repair(
        parent=proposal.parent,
        turn=turn,
        teacher_action=proposal.teacher_action,
        trials=len(repaired),
        success_student=success_student or 0.0,
        success_repair=success_repair or 0.0,
        accepted=accepted,
        branch=next(t for t in repaired if t.success) if accepted else None,
        tokens=resumed + proposal.teacher.n_sampled,
    )


def _success(arm: Sequence[Trajectory]) -> float | None:
    """The share that succeeds; an environment that failed is evidence of nothing."""
    played = [t.success for t in arm if t.outcome is not Outcome.ERROR]
    return sum(played) / len(played) if played else None


def _new_tokens(turns: Sequence[Turn]) -> int:
    return sum(turn.n_chosen for turn in turns)
