"""First form of earliest-error correction (after SCoRe, arXiv 2509.14257), with evidence.

For a failed episode the earliest action that the teacher finds improbable is proposed. The environment is
restored to the state before it (replayed and checked by digest, so the error has not happened yet); the
teacher replaces that one action, executed for real; the student resumes. The repair is accepted if fresh
student re-rollouts succeed more often after it than after the student's own action from the same state. The
failed episode itself is no evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import Correction
from opd_agents.envs import AgentEnv
from opd_agents.errors import ReplayDivergence
from opd_agents.policies.base import Action, History, Policy
from opd_agents.rollout import Episode, Limits, Start, rollout
from opd_agents.types import Branch, Outcome, StopReason, Task, Trajectory, Turn

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
    env: AgentEnv  # in the state before the action
    teacher: Action
    teacher_action: str  # as the environment gets it


def correct(
    trajectories: Sequence[Trajectory],
    packed: Packed,
    teacher_logprob: Tensor,
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
) -> list[Repair]:
    """Repairs of up to ``settings.episodes_per_step`` failed episodes in ``token_budget`` generated tokens.

    ``teacher_logprob`` [N] belongs to ``packed``; ``stream`` is (seed, step). No-op repairs are refused.
    """
    errors = _earliest_errors(trajectories, packed, teacher_logprob, settings.propose_below)
    random = np.random.Generator(np.random.Philox(key=list(stream), counter=[0, 0, 1, 2**63]))
    chosen: list[tuple[Trajectory, int]] = []
    for index in random.permutation(len(errors)).tolist():
        parent, turn = errors[index]
        token_budget -= _expected_tokens(parent, turn, settings.trials)
        if token_budget < 0 or len(chosen) == settings.episodes_per_step:
            break
        chosen.append((parent, turn))
    proposals = _propose(chosen, teacher, make, chat, limits)
    episodes = [
        _branch_episode(proposal, arm, trial, settings.trials, number, stream)
        for number, proposal in enumerate(proposals)
        for arm in ("repair", "student")
        for trial in range(settings.trials)
    ]
    for proposal in proposals:
        proposal.env.close()  # every re-rollout has its own fork
    finished = rollout(episodes, student, make=make, chat=chat, limits=limits, temperature=temperature)
    arms = [finished[i : i + settings.trials] for i in range(0, len(finished), settings.trials)]
    return [_judge(p, arms[2 * i], arms[2 * i + 1], settings.min_gain) for i, p in enumerate(proposals)]


def _earliest_errors(
    trajectories: Sequence[Trajectory], packed: Packed, teacher_logprob: Tensor, below: float
) -> list[tuple[Trajectory, int]]:
    """(failed trajectory, its first turn to which the teacher gives a log-prob under ``below``)."""
    found: dict[int, int] = {}
    for (episode, turn), value in zip(packed.turns, packed.per_turn(teacher_logprob).tolist(), strict=True):
        if trajectories[episode].outcome in (Outcome.FAILURE, Outcome.UNFINISHED) and value < below:
            found.setdefault(episode, turn)
    return [(trajectories[episode], turn) for episode, turn in sorted(found.items())]


def _expected_tokens(parent: Trajectory, turn: int, trials: int) -> int:
    """Both arms of every trial are likely to be as long as the rest of the failed episode."""
    rest = sum(len(t.action_ids) for t in parent.turns[turn:])
    return 2 * trials * rest


def _propose(
    chosen: Sequence[tuple[Trajectory, int]],
    teacher: Policy,
    make: Callable[..., AgentEnv],
    chat: Chat,
    limits: Limits,
) -> list[_Proposal]:
    """Restore each state, let the teacher act in it, and drop repairs that would change nothing."""
    restored = [(parent, turn, restore(parent, turn, make)) for parent, turn in chosen]
    histories = [
        History(
            parent.uid, (0, 0, 0), _ids_before(parent, turn), parent.messages, limits.max_tokens_per_turn, env
        )
        for parent, turn, env in restored
    ]
    proposals = []
    for (parent, turn, env), action in zip(restored, teacher.act(histories), strict=True):
        text = chat.parse(action.ids, ended=True).action
        if action.stop_reason is StopReason.END and text != parent.turns[turn].action:
            proposals.append(_Proposal(parent, turn, env, action, text))
        else:
            env.close()
    return proposals


def restore(parent: Trajectory, turn: int, make: Callable[..., AgentEnv]) -> AgentEnv:
    """A live environment in the state before ``turn``, by verified replay.

    Raises ReplayDivergence where a recorded digest is not met.
    """
    env = make(parent.env_id, **parent.env_kwargs)
    env.reset(seed=parent.seed, options={"task_id": parent.task.id, "split": parent.task.split})
    if env.state_digest() != parent.turns[0].state_digest:
        raise ReplayDivergence(
            f"{parent.uid}: resetting {parent.env_id} to {parent.task} gave another state than before."
        )
    actions = [t.action for t in parent.turns[:turn]]
    env.replay(actions, [t.state_digest for t in parent.turns[1 : turn + 1]])
    return env


def _ids_before(parent: Trajectory, turn: int) -> tuple[int, ...]:
    past = tuple(i for t in parent.turns[:turn] for i in (*t.context_ids, *t.action_ids))
    return past + parent.turns[turn].context_ids


def _branch_episode(
    proposal: _Proposal, arm: str, trial: int, trials: int, number: int, stream: tuple[int, int]
) -> Episode:
    """One re-rollout: the arm's action executed under fresh noise, then the student resumes."""
    parent, turn = proposal.parent, proposal.turn
    place = (2 * number + (arm == "student")) * trials + trial
    seed = int(np.random.SeedSequence([*stream, FIRST_BRANCH + place]).generate_state(1)[0])
    env = proposal.env.fork(reseed=seed)
    old = parent.turns[turn]
    action = proposal.teacher
    if arm == "student":
        action = Action(
            old.actor, old.stop_reason, old.action_ids, old.logprobs, policy_version=old.policy_version
        )
    inherited = tuple(dataclasses.replace(t, weight=0.0) for t in parent.turns[:turn])
    start = Start(env, Branch(parent.uid, turn), inherited, parent.messages, old.context_ids, action)
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
    success_repair = sum(t.success for t in repaired) / len(repaired)
    success_student = sum(t.success for t in original) / len(original)
    accepted = success_repair - success_student >= min_gain
    # the student arm repeats an action that is paid already; the teacher's is counted once
    resumed = sum(_new_tokens(t.turns[turn + 1 :]) for t in (*repaired, *original))
    return Repair(
        parent=proposal.parent,
        turn=turn,
        teacher_action=proposal.teacher_action,
        trials=len(repaired),
        success_student=success_student,
        success_repair=success_repair,
        accepted=accepted,
        branch=next(t for t in repaired if t.success) if accepted else None,
        tokens=resumed + len(proposal.teacher.ids),
    )


def _new_tokens(turns: Sequence[Turn]) -> int:
    return sum(len(turn.action_ids) for turn in turns)
