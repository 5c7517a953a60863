"""Whether a repair helps: fresh rollouts after it, beside rollouts of its rivals from the same state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from opd_agents.config import Correction
from opd_agents.correction.evidence import Arm, Evidence, Verdict, decide
from opd_agents.correction.practice import key_step, worth
from opd_agents.correction.states import may_be_repaired
from opd_agents.envs import Snapshot
from opd_agents.episode import Episode, Start
from opd_agents.policies.base import Action
from opd_agents.types import Branch, KeyStep, Task, Trajectory, Turn

FIRST_BRANCH = 2**20  # stream numbers of branches, out of the way of the step's episodes
FIRST_AUDIT = 2**22  # ... of an audit's; between them are those of alternatives
FIRST_PRACTICE = 2**25  # ... of what the student practises

Play = Callable[[list[Episode]], list[Trajectory]]


class Plays(NamedTuple):
    """Who plays on: the ``student``, and ``after`` a repair perhaps another."""

    student: Play
    after: Play


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
    practised: tuple[Trajectory, ...] = ()  # the student's own from the state before
    failed: Trajectory | None = None  # a continuation of one that does no worse than its rivals

    def with_keys(self, keys: Mapping[str, KeyStep]) -> Repair:
        """With these key steps, by the uid of what was practised, and what they are worth."""
        practised = []
        for one in self.practised:
            if (key := keys.get(one.uid)) is not None and one.branch is not None:
                known = worth(key, self.evidence, self.practised)
                one = dataclasses.replace(one, branch=dataclasses.replace(one.branch, key=key, worth=known))
            practised.append(one)
        return dataclasses.replace(self, practised=tuple(practised))


@dataclass
class _Case:
    """A proposal under verification: the rollouts of each arm so far."""

    number: int  # over the whole step
    proposal: Proposal
    arms: dict[str, list[Trajectory]]
    verdict: Verdict = "open"
    audit: Evidence | None = None
    practised: tuple[Trajectory, ...] = ()
    tokens: int = 0

    def evidence(self) -> Evidence:
        return _evidence(self.arms)


def verify(
    proposals: Mapping[int, Proposal], settings: Correction, stream: tuple[int, int], plays: Plays
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
                                            (*stream, FIRST_BRANCH), plays), strict=True):  # fmt: skip
            for arm, trajectories in arms.items():
                case.arms[arm] += trajectories
            last = wanted == rules.rollouts[-1]
            case.verdict = decide(case.evidence(), accept=rules.accept, stop=rules.stop, last=last)
    _audit(cases, settings, names, stream, plays)
    _practise(cases, settings, stream, plays.student)
    return [_repair(case, settings) for case in cases]


def _audit(
    cases: Sequence[_Case], settings: Correction, names: Sequence[str], stream: tuple[int, int], plays: Plays
) -> None:
    """More rollouts for some of the repairs, drawn whatever their verdict was."""
    if settings.audit is None:
        return
    trials, share = settings.audit.rollouts, settings.audit.share
    drawn = [case for case in cases if _uniform(stream, case.number) < share]
    played = _played(drawn, names, range(trials), trials, (*stream, FIRST_AUDIT), plays)
    for case, arms in zip(drawn, played, strict=True):
        case.audit = _evidence(arms)
        case.tokens += _new_tokens(case.proposal, arms)


def _practise(cases: Sequence[_Case], settings: Correction, stream: tuple[int, int], play: Play) -> None:
    """Rollouts of the student from the state before each accepted repair. Those of its rival ``retry`` are of
    the same state, but how they went decided whether there is anything to practise."""
    if settings.practice is None:
        return
    accepted = [case for case in cases if case.verdict == "accepted" and not case.proposal.control]
    groups = _played(
        accepted, ["practice"], range(settings.practice), settings.practice, (*stream, FIRST_PRACTICE),
        Plays(play, play),
    )  # fmt: skip
    for case, arms in zip(accepted, groups, strict=True):
        case.practised = tuple(_practised(case, arms["practice"]))
        case.tokens += _new_tokens(case.proposal, arms)


def _practised(case: _Case, played: Sequence[Trajectory]) -> Iterator[Trajectory]:
    """Each with its key step, all of one group."""
    proposal, evidence = case.proposal, case.evidence()
    parent, turn = proposal.parent, proposal.turn
    for one in played:
        key = key_step(one, parent, turn, proposal.text, case.arms)
        branch = Branch(parent.uid, turn, noise=parent.noise, key=key, worth=worth(key, evidence, played))
        yield dataclasses.replace(one, branch=branch, group=f"{parent.uid}@{turn}")


def _played(
    cases: Sequence[_Case],
    names: Sequence[str],
    trials: range,
    most: int,
    stream: tuple[int, int, int],
    plays: Plays,
) -> list[dict[str, list[Trajectory]]]:
    """Trials number ``trials`` of every arm of every case; ``most`` that there are of an arm, and the last of
    ``stream``, keep their streams apart."""
    *run, first = stream
    result: list[dict[str, list[Trajectory]]] = [{} for _ in cases]
    by_player: dict[Play, list[str]] = {}
    for arm in names:
        by_player.setdefault(plays.after if arm == "repair" else plays.student, []).append(arm)
    for play, arms in by_player.items():  # all that one plays at once
        episodes = [
            _episode(case.proposal, arm, trial, (run[0], run[1], first + place))
            for case in cases
            for arm in arms
            for trial in trials
            for place in [(len(names) * case.number + names.index(arm)) * most + trial]
        ]
        finished = iter(play(episodes) if episodes else ())
        for of_case in result:
            of_case |= {arm: [next(finished) for _ in trials] for arm in arms}
    return result


def _episode(proposal: Proposal, arm: str, trial: int, stream: tuple[int, int, int]) -> Episode:
    """One rollout under fresh noise: the arm's first action, then the student's."""
    parent, turn = proposal.parent, proposal.turn
    old = parent.turns[turn]
    own = Action(
        old.actor, old.stop_reason, old.action_ids, old.logprobs, policy_version=old.policy_version,
        forced=old.forced,
    )  # fmt: skip
    first = {"repair": proposal.action, "own": own}.get(arm)
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
        Branch(parent.uid, turn, noise=parent.noise),
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


def _repair(case: _Case, settings: Correction) -> Repair:
    proposal, accepted, evidence = case.proposal, case.verdict == "accepted", case.evidence()
    branch = failed = None
    if accepted and not proposal.control:
        branch = next(one for one in case.arms["repair"] if one.success)
        branch = _weighted(branch, proposal.turn, settings.prefix_weight)
    if not proposal.control and (not evidence.rivals or evidence.better >= settings.verify.stop):
        failed = next((one for one in case.arms["repair"] if may_be_repaired(one)), None)
    return Repair(
        parent=proposal.parent,
        turn=proposal.turn,
        teacher_action=proposal.text,
        evidence=evidence,
        accepted=accepted,
        tokens=case.tokens + _new_tokens(proposal, case.arms) + proposal.action.n_sampled,
        branch=branch,
        audit=case.audit,
        control=proposal.control,
        practised=case.practised,
        failed=failed,
    )


def _weighted(branch: Trajectory, inherited: int, weight: float) -> Trajectory:
    before = (dataclasses.replace(turn, weight=weight) for turn in branch.turns[:inherited])
    return dataclasses.replace(branch, turns=(*before, *branch.turns[inherited:]))


def _evidence(arms: Mapping[str, Sequence[Trajectory]]) -> Evidence:
    counted = {name: Arm.of(trajectories) for name, trajectories in arms.items()}
    return Evidence(counted.pop("repair"), counted)


def _new_tokens(proposal: Proposal, arms: Mapping[str, Sequence[Trajectory]]) -> int:
    """Generated for ``arms``: the first action of a rollout is not new where it is the arm's."""
    return sum(
        generated(one.turns[proposal.turn + (name in ("repair", "own")) :])
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
