"""Whether a repair helps: fresh rollouts after it, beside rollouts of its rivals from the same state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_agents.config import Correction
from opd_agents.correction.evidence import Arm, Evidence, Verdict, decide
from opd_agents.envs import Snapshot
from opd_agents.episode import Episode, Start
from opd_agents.policies.base import Action
from opd_agents.types import Branch, Task, Trajectory, Turn

FIRST_BRANCH = 2**20  # stream numbers of branches, out of the way of the step's episodes
FIRST_AUDIT = 2**22  # ... of an audit's; between them are those of alternatives

Play = Callable[[list[Episode]], list[Trajectory]]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Another action for turn ``turn`` of ``parent``: ``action``, as the environment gets it ``text``.
    ``saved`` is the state before. A ``control`` is a random action at a random turn."""

    parent: Trajectory
    turn: int
    saved: Snapshot
    action: Action
    text: str
    control: bool


@dataclass(frozen=True, slots=True)
class Repair:
    """What was tried at turn ``turn`` of ``parent``, and what the ``evidence`` says, and that of the
    ``audit``, if there was one. ``tokens`` were generated for all of it."""

    parent: Trajectory
    turn: int
    teacher_action: str
    evidence: Evidence
    accepted: bool
    tokens: int
    branch: Trajectory | None  # a successful continuation after an accepted repair, to train on
    audit: Evidence | None = None
    control: bool = False


@dataclass
class _Case:
    """A proposal under verification: the rollouts of each arm so far."""

    number: int  # over the whole step
    proposal: Proposal
    arms: dict[str, list[Trajectory]]
    verdict: Verdict = "open"
    audit: Evidence | None = None
    tokens: int = 0

    def evidence(self) -> Evidence:
        return _evidence(self.arms)


def verify(
    proposals: Mapping[int, Proposal], settings: Correction, stream: tuple[int, int], play: Play
) -> list[Repair]:
    """The proposals with their verdicts, in their order; the keys number them over the whole step.

    Each look plays, of all proposals that are still open, what their arms lack.
    """
    rules, names = settings.verify, ("repair", *settings.verify.rivals)
    cases = [_Case(n, proposal, {arm: [] for arm in names}) for n, proposal in proposals.items()]
    looks = list(zip((0, *rules.rollouts), rules.rollouts, strict=False))
    for done, wanted in looks:
        live = [case for case in cases if case.verdict == "open"]
        for case, arms in zip(live, _played(live, names, range(done, wanted), rules.rollouts[-1],
                                            (*stream, FIRST_BRANCH), play), strict=True):  # fmt: skip
            for arm, trajectories in arms.items():
                case.arms[arm] += trajectories
            last = wanted == rules.rollouts[-1]
            case.verdict = decide(case.evidence(), accept=rules.accept, stop=rules.stop, last=last)
    _audit(cases, settings, names, stream, play)
    return [_repair(case) for case in cases]


def _audit(
    cases: Sequence[_Case], settings: Correction, names: Sequence[str], stream: tuple[int, int], play: Play
) -> None:
    """More rollouts for some of the repairs, drawn whatever their verdict was."""
    if settings.audit is None:
        return
    trials, share = settings.audit.rollouts, settings.audit.share
    drawn = [case for case in cases if _uniform(stream, case.number) < share]
    played = _played(drawn, names, range(trials), trials, (*stream, FIRST_AUDIT), play)
    for case, arms in zip(drawn, played, strict=True):
        case.audit = _evidence(arms)
        case.tokens += _new_tokens(case.proposal, arms)


def _played(
    cases: Sequence[_Case],
    names: Sequence[str],
    trials: range,
    most: int,
    stream: tuple[int, int, int],
    play: Play,
) -> list[dict[str, list[Trajectory]]]:
    """Trials number ``trials`` of every arm of every case; ``most`` that there are of an arm, and the last of
    ``stream``, keep their streams apart."""
    *run, first = stream
    episodes = [
        _episode(case.proposal, arm, trial, (run[0], run[1], first + place))
        for case in cases
        for index, arm in enumerate(names)
        for trial in trials
        for place in [(len(names) * case.number + index) * most + trial]
    ]
    finished = iter(play(episodes) if episodes else ())
    return [{arm: [next(finished) for _ in trials] for arm in names} for _ in cases]


def _episode(proposal: Proposal, arm: str, trial: int, stream: tuple[int, int, int]) -> Episode:
    """One rollout under fresh noise: the arm's first action, then the student's."""
    parent, turn = proposal.parent, proposal.turn
    old = parent.turns[turn]
    own = Action(
        old.actor, old.stop_reason, old.action_ids, old.logprobs, policy_version=old.policy_version,
        forced=old.forced,
    )  # fmt: skip
    first = {"repair": proposal.action, "own": own, "retry": None}[arm]
    return branched(parent, turn, proposal.saved, first, f"{arm}{trial}", stream)


def branched(
    parent: Trajectory,
    turn: int,
    saved: Snapshot,
    first: Action | None,
    name: str,
    stream: tuple[int, int, int],
) -> Episode:
    """Another course of ``parent`` from the state ``saved`` before turn ``turn``, under fresh noise:
    ``first`` is done there, or whatever the policy does."""
    old = parent.turns[turn]
    start = Start(
        saved,
        Branch(parent.uid, turn),
        tuple(dataclasses.replace(t, weight=0.0) for t in parent.turns[:turn]),
        parent.messages,
        old.context_ids,
        old.starts_segment,
        first,
    )
    return Episode(
        uid=f"{parent.uid}-{name}",
        env_id=parent.env_id,
        env_kwargs=parent.env_kwargs,
        seed=int(np.random.SeedSequence(stream).generate_state(1)[0]),
        task=Task(parent.task.id, parent.task.split),
        stream=stream,
        start=start,
    )


def _repair(case: _Case) -> Repair:
    proposal, accepted = case.proposal, case.verdict == "accepted"
    trained = accepted and not proposal.control
    return Repair(
        parent=proposal.parent,
        turn=proposal.turn,
        teacher_action=proposal.text,
        evidence=case.evidence(),
        accepted=accepted,
        tokens=case.tokens + _new_tokens(proposal, case.arms) + proposal.action.n_sampled,
        branch=next(one for one in case.arms["repair"] if one.success) if trained else None,
        audit=case.audit,
        control=proposal.control,
    )


def _evidence(arms: Mapping[str, Sequence[Trajectory]]) -> Evidence:
    counted = {name: Arm.of(trajectories) for name, trajectories in arms.items()}
    return Evidence(counted.pop("repair"), counted)


def _new_tokens(proposal: Proposal, arms: Mapping[str, Sequence[Trajectory]]) -> int:
    """Generated for ``arms``: the first action of a rollout is new only where the student tried again."""
    return sum(
        generated(one.turns[proposal.turn + (name != "retry") :])
        for name, trajectories in arms.items()
        for one in trajectories
    )


def generated(turns: Sequence[Turn]) -> int:
    """Tokens that were chosen, of all of ``turns``."""
    return sum(turn.n_chosen for turn in turns)


def _uniform(stream: tuple[int, int], number: int) -> float:
    return float(
        np.random.Generator(np.random.Philox(key=list(stream), counter=[0, number, 8, 2**63])).random()
    )
