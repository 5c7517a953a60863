"""The four questions before compute is spent, asked of a sample of rollouts.

The student plays some of the stage's tasks and the teacher the same, with the same noise. The teacher scores
what the student wrote as it does in training, and acts in states that the student came to, which are gone
back to by verified replay: once, beside what the student did there, and to the end. `opd_agents.recommending`
reads the figures.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from opd_agents import envs
from opd_agents.batch import Packed, pack, range_of, turns_of
from opd_agents.config import RunConfig, Self
from opd_agents.config.base import bounds
from opd_agents.config.needs import Need
from opd_agents.correction import act_otherwise
from opd_agents.correction.evidence import Arm
from opd_agents.correction.states import saved_at
from opd_agents.correction.verify import branched
from opd_agents.episode import Episode, Limits
from opd_agents.errors import AlignmentError, EnvironmentContractError, ReplayDivergence
from opd_agents.frozen import TOP_K, frozen_terms
from opd_agents.intervals import Mean, mean, paired
from opd_agents.policies.base import Policy
from opd_agents.recommending import Answers, Depth, Figures, Recommendation, answer, plain, recommend
from opd_agents.rollout import rollout
from opd_agents.session import Session
from opd_agents.tasks import draw_episodes
from opd_agents.teachers import Capability, Teacher
from opd_agents.teachers.base import SERVES
from opd_agents.types import Outcome, Trajectory

FIRST_CONTINUED = 2**30  # stream numbers of continued episodes, out of the way of all that a step plays

TOLD_LIVE = {"text", "expert"}  # what a teacher may be told while it plays

T = TypeVar("T")
Play: TypeAlias = Callable[..., list[Trajectory]]
Place: TypeAlias = tuple[str, int]
"""A state: the uid of an episode, and the turn (from 0) before which it is."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was measured in ``seconds``, and what it says."""

    figures: Figures
    answers: Answers
    recommendation: Recommendation
    seconds: float

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        row: dict[str, Any] = plain(self)
        return row


def why_not_asked(session: Session) -> str | None:
    """What a stage lacks to be asked about."""
    if session.teacher is None:
        return "the stage has no teacher"
    return None if session.config.environments else "the stage has no environment to play in"


def ask(session: Session, rollouts: int) -> Asked:
    """The four questions of the teacher of a ``session`` that has one, with ``rollouts`` episodes of the
    student, and up to as many of the teacher from the start, and from each range of depths.

    Raises EnvironmentContractError where every episode failed, and what models raise.
    """
    started = time.perf_counter()
    figures = measure(session, rollouts)
    session.leave_out()
    return Asked(figures, answer(figures), recommend(figures), time.perf_counter() - started)


def measure(session: Session, rollouts: int) -> Figures:
    """What :func:`ask` reads."""
    teacher, config = session.teacher, session.config
    assert teacher is not None  # see why_not_asked
    limits = _limits(session)
    play: Play = partial(
        rollout, make=envs.launch, chat=session.chat, limits=limits, temperature=config.rollout.temperature
    )
    episodes = _drawn(config, rollouts, session.task_counts)
    played = _without_errors(play(episodes, policy=session.student_sampler))
    idle = _why_idle(session, teacher)
    alone = {one.uid: one for one in ([] if idle else play(episodes, policy=teacher))}
    theirs = {uid: one for uid, one in alone.items() if one.outcome is not Outcome.ERROR}
    pairs = [(theirs[one.uid].success, one.success) for one in played if one.uid in theirs]
    text = _text(session, played, teacher)
    states = States(idle) if idle else _states(session, played, teacher, play, limits)
    deepest = _deepest(played)
    of_ranges = partial(_depth, played=played, alone=alone, text=text, states=states)
    return Figures(
        student=Arm.of(played), teacher=Arm.of(theirs.values()), better=paired(pairs) if pairs else None,
        kl=text.mean("kl"), log_ratio=text.mean("log_ratio"), overlap=text.mean("overlap"),
        perplexity=_exp(text.mean("surprise")), own_perplexity=_exp(text.mean("own_surprise")),
        agreement=_arm(states.agreement), own_agreement=_arm(states.own_agreement),
        turns=_per_episode([len(one.turns) for one in played]),
        teacher_turns=_per_episode([len(one.turns) for one in theirs.values()]) if theirs else None,
        tokens=_per_episode([one.n_action_tokens for one in played]),
        depths=tuple(of_ranges(range(n, n + 1)) for n in range(deepest + 1)),
        astray=of_ranges(range(1, deepest + 1)) if deepest else None,
        no_states=states.why, is_student=isinstance(config.teacher, Self),
    )  # fmt: skip


def _drawn(config: RunConfig, rollouts: int, sizes: Sequence[int]) -> list[Episode]:
    """A task each, as the first step would draw them if all were the student's."""
    alone = {"episodes_per_step": rollouts, "group_size": 1, "source": "student", "demonstrations": None}
    drawn = config.model_copy(update={"rollout": config.rollout.model_copy(update=alone)})
    return draw_episodes(drawn, 0, sizes)


def _limits(session: Session) -> Limits:
    """The widest that the run will have: a curriculum of turns begins with few."""
    rollout = session.config.rollout
    turns, tokens = (
        None if most is None else int(bounds(most)[1])
        for most in (rollout.max_turns, rollout.max_action_tokens)
    )
    return dataclasses.replace(session.limits, max_turns=turns, max_action_tokens=tokens)


def _why_idle(session: Session, teacher: Teacher) -> str | None:
    """Why what the teacher does would say nothing of it."""
    if Capability.ACT not in teacher.can:
        return "the teacher does not act"
    told = session.references.conditioners.get("teacher")
    if told is not None and not TOLD_LIVE & set(told.settings.sources):
        return f"what the teacher is told ({', '.join(told.settings.sources)}) it learns after the episode"
    return None


def _without_errors(played: Sequence[Trajectory]) -> list[Trajectory]:
    sound = [one for one in played if one.outcome is not Outcome.ERROR and one.turns]
    if not sound:
        first = f"the first, {played[0].task}: {played[0].error}"
        raise EnvironmentContractError(f"All {len(played)} episodes of the student failed; {first}")
    return sound


# ---- what the teacher says of the student's text


@dataclass(frozen=True, slots=True)
class Text:
    """``values`` [N] by name of the action tokens of ``packed``, to be read where ``heard`` (bool [N])."""

    packed: Packed
    values: Mapping[str, Tensor]
    heard: Tensor

    def mean(self, name: str, ranges: range | None = None) -> Mean | None:
        """Of all tokens, or those of the turns of some ranges; None where there are none."""
        if name not in self.values:
            return None
        where = self.heard
        if ranges is not None:
            here = torch.tensor([range_of(turn) in ranges for _, turn in self.packed.turns])
            where = where & here[self.packed.turn]
        if not bool(where.any()):
            return None
        episode = self.packed.episode[where]
        counts, sums = episode.bincount(), episode.bincount(self.values[name][where].double())
        return mean(sums[counts > 0].tolist(), counts[counts > 0].tolist())


def _text(session: Session, played: Sequence[Trajectory], teacher: Teacher) -> Text:
    """Scored as in training; of a model in this process all of its distributions, also where no loss reads
    them."""
    session.student_sampler.release()
    config, packed = session.config, pack(played)
    asked: Mapping[str, frozenset[Need]] = {"teacher": frozenset({"full"})}
    if teacher.can & SERVES["spans"] != {Capability.HIDDEN_STATES}:
        asked = {name: needs for name, needs in session.references.needs.items() if name == "teacher"}
    tokens, every = config.trainer.micro_batch_tokens, torch.ones(len(packed.target), dtype=torch.bool)
    signals, taught = session.references.score(packed, played, every, tokens, asked)
    terms = frozen_terms(session.model, packed, signals, config.rollout.temperature, tokens, overlap=TOP_K)
    values = {"own_surprise": -terms.logprob}
    if "teacher" in terms.references:
        of_teacher = terms.references["teacher"]
        values |= {"surprise": -of_teacher.logprob, "log_ratio": terms.logprob - of_teacher.logprob}
        known = {"kl": of_teacher.kl, "overlap": of_teacher.overlap}
        values |= {name: value for name, value in known.items() if value is not None}
    return Text(packed, values, taught.get("teacher", every))


# ---- what the teacher does in the student's states


@dataclass(frozen=True, slots=True)
class States:
    """Of the student's: whether the teacher did the same there, and the student again; what came of it when
    the teacher played on. ``why`` what is not here is not."""

    why: str | None = None
    agreement: Mapping[Place, float] = field(default_factory=dict)
    own_agreement: Mapping[Place, float] = field(default_factory=dict)
    continued: Mapping[Place, Trajectory] = field(default_factory=dict)


def _states(
    session: Session, played: Sequence[Trajectory], teacher: Policy, play: Play, limits: Limits
) -> States:
    forkable = [one for one in played if _forks(one)]
    if not forkable:
        return States("no environment can go back to a state (its fork_mode is none)")
    stream = (session.config.seed, session.step)
    several = len(forkable) * (_deepest(forkable) + 1)
    act = partial(
        act_otherwise, forkable, several, stream=stream, make=envs.launch, chat=session.chat, limits=limits
    )
    found = States()
    try:
        own = act(session.student_sampler).agreement
        found = States(agreement=act(teacher).agreement, own_agreement=own)
        continued = _continued(forkable, stream, partial(play, policy=teacher), limits)
        return dataclasses.replace(found, continued=continued)
    except (ReplayDivergence, AlignmentError) as error:  # this of a teacher who is told what the expert does
        return dataclasses.replace(found, why=str(error))
    finally:
        session.student_sampler.release()


def _forks(one: Trajectory) -> bool:
    return envs.env_class(one.env_id).fork_mode != "none"


def _continued(
    played: Sequence[Trajectory], stream: tuple[int, int], play: Callable[[list[Episode]], list[Trajectory]],
    limits: Limits,
) -> dict[Place, Trajectory]:  # fmt: skip
    """Of each episode, from one of its turns in every range but the first, drawn by ``stream``."""
    random = np.random.Generator(np.random.Philox(key=list(stream), counter=[0, 0, 10, 2**63]))
    places = [
        (one, int(random.choice(turns)))
        for one in played
        for depth in range(1, _deepest([one]) + 1)
        for turns in [[turn for turn in range(len(one.turns)) if range_of(turn) == depth]]
    ]
    episodes = [
        branched(one, turn, saved, None, f"on{turn}", (*stream, FIRST_CONTINUED + number))
        for number, ((one, turn), saved) in enumerate(
            zip(places, saved_at(places, make=envs.launch, limits=limits), strict=True)
        )
        if saved is not None
    ]
    ended = play(episodes) if episodes else []
    return {
        (one.branch.parent, one.branch.turn): one
        for one in ended
        if one.branch is not None and one.outcome is not Outcome.ERROR
    }


# ---- by depth


def _deepest(played: Sequence[Trajectory]) -> int:
    return max(range_of(len(one.turns) - 1) for one in played)


def _depth(
    ranges: range, played: Sequence[Trajectory], alone: Mapping[str, Trajectory], text: Text, states: States
) -> Depth:
    """Of the turns of some neighbouring ranges."""

    def here(said: Mapping[Place, T]) -> dict[Place, T]:
        return {(uid, turn): one for (uid, turn), one in said.items() if range_of(turn) in ranges}

    wrong = {
        (one.uid, number): turn.parse_error is not None or turn.tool_error is not None
        for one in played
        for number, turn in enumerate(one.turns)
    }
    continued = here(states.continued)
    went_on = {uid for uid, _ in continued}
    return Depth(
        first=turns_of(ranges[0])[0], last=turns_of(ranges[-1])[1],
        kl=text.mean("kl", ranges) or text.mean("log_ratio", ranges),
        refused=_arm(here(wrong)),
        agreement=_arm(here(states.agreement)),
        continued=_arm({place: one.success for place, one in continued.items()}),
        student=Arm.of(one for one in played if one.uid in went_on),
        alone=Arm.of(alone[uid] for uid in sorted(went_on)),
    )  # fmt: skip


def _arm(said: Mapping[Place, float]) -> Arm:
    """Each episode counts once, with the mean of its states: they are not independent."""
    by_episode: dict[str, list[float]] = {}
    for (uid, _), value in said.items():
        by_episode.setdefault(uid, []).append(value)
    return Arm(round(sum(sum(of_one) / len(of_one) for of_one in by_episode.values())), len(by_episode))


def _per_episode(values: Sequence[float]) -> Mean:
    return mean(values, [1] * len(values))


def _exp(logarithm: Mean | None) -> Mean | None:
    """A perplexity."""
    if logarithm is None:
        return None
    return Mean(*(float(np.exp(bound)) for bound in (logarithm.value, logarithm.low, logarithm.high)))
