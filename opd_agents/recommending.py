"""What the figures of a sample of rollouts say of four questions, and what to do first.

On-policy distillation pays where a teacher is better than the student, writes in patterns that the student
can follow, where an episode is long enough for the student to go astray, and where the teacher still knows
what to do there. The rule: patterns that do not fit, supervised training on the teacher's own episodes first;
where all four hold, distillation on the student's own, and reinforcement learning beyond what the teacher
can; where there is no gap, the teacher is exhausted. Everything here is arithmetic on what
`opd_agents.questions` measures.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from opd_agents.correction.evidence import Arm
from opd_agents.intervals import Mean, interval, percent

MIN_GAP = 0.05  # of success: what a teacher must be better by
MIN_KL = 0.01  # nats a token: whose distributions are nearer has nothing to tell
MIN_OVERLAP = 0.5  # of the student's probability on its top k: what must be on the teacher's
MAX_EXCESS = 1.0  # nats a token: perplexity of the student's text to the teacher, e times that to the student
MIN_AGREEMENT = 0.25  # with the teacher in the same state, as a share of the student's with itself
TELLING = 0.2  # agreement with itself under which actions are too varied to be compared
MIN_TURNS = 2.0  # an episode, of whoever needs more
MIN_TOKENS = 256.0  # of actions an episode: so many are long enough in a single turn
MIN_KEPT = 0.5  # of the success that the teacher has alone: what is left of it in the student's states
CEILING = 0.95  # success from which on there is nothing to reinforce

# What speaks for the teacher's own episodes before the student's, by the answer that does not hold.
SFT_FIRST = {
    "compatible": "the teacher's patterns are not the student's, so that what it says of the student's"
    " actions leads nowhere: a cold start on the teacher's own episodes first",
    "horizon": "an episode is too short to go astray in, so that distillation on the student's own buys"
    " little over the teacher's own",
    "reliable": "where the student goes astray the teacher does not know the way either: a cold start on its"
    " own episodes leads back to where it does; later weigh or gate what it says, or let it play the"
    " beginnings",
}


@dataclass(frozen=True, slots=True)
class Depth:
    """Turns ``first`` to ``last`` (from 1, both included) of the student's episodes: KL(student || teacher)
    in nats a token (log q - log p of the sampled ones where that is all there is), ``refused`` actions,
    that were no valid call or that a tool refused, and those that the teacher did, too.

    Of episodes that were gone back to before one of these turns: how often the teacher ``continued`` them
    with success, the ``student`` itself had, and the teacher had ``alone`` in the same tasks.
    """

    first: int
    last: int
    kl: Mean | None
    refused: Arm
    agreement: Arm
    continued: Arm
    student: Arm
    alone: Arm

    @property
    def turns(self) -> str:
        return f"turn {self.first}" if self.first == self.last else f"turns {self.first}-{self.last}"

    @property
    def least(self) -> float:
        """What the teacher must solve from here."""
        return MIN_KEPT * (self.alone.share or 0.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a sample of the student's episodes, and of the teacher's own in the same tasks; what could not be
    known is None, or an arm without rollouts.

    ``better``: the teacher's success rate less the student's, on the same tasks. ``kl``: KL(student ||
    teacher), and ``log_ratio``: log q - log p of the sampled tokens, both in nats a token; ``overlap``: see
    `ReferenceTerms`; ``perplexity`` of the student's text to the teacher, and ``own_perplexity`` to the
    student. ``agreement``: the teacher does in a state what the student did; ``own_agreement``: the student
    does it again. ``turns`` and ``tokens`` (of actions) an episode. ``depths``: by ranges of turns, and
    ``astray`` all after the first. ``no_states``: why the teacher did not act, or play on, in the student's.
    ``is_student``: the teacher is the student itself, told more. Of several states of one episode an arm
    counts the mean, as one.
    """

    student: Arm
    teacher: Arm
    better: Mean | None
    kl: Mean | None
    log_ratio: Mean | None
    overlap: Mean | None
    perplexity: Mean | None
    own_perplexity: Mean | None
    agreement: Arm
    own_agreement: Arm
    turns: Mean
    teacher_turns: Mean | None
    tokens: Mean
    depths: tuple[Depth, ...]
    astray: Depth | None = None
    no_states: str | None = None
    is_student: bool = False

    @property
    def distance(self) -> Mean | None:
        """The KL, or what estimates it."""
        return self.kl or self.log_ratio

    @property
    def lost(self) -> str:
        """The turns in which little is left of the success that the teacher has alone; empty where there are
        none."""
        after = [one for one in self.depths[1:] if one.continued.share is not None]
        return ", ".join(one.turns for one in after if (one.continued.share or 0.0) < one.least)


@dataclass(frozen=True, slots=True)
class Answer:
    """``holds``: what the figures say, None where they say nothing; ``sure``: their intervals leave no
    doubt."""

    holds: bool | None
    sure: bool
    says: str


@dataclass(frozen=True, slots=True)
class Answers:
    """To the four questions, in their order."""

    gap: Answer
    compatible: Answer
    horizon: Answer
    reliable: Answer


class Choice(StrEnum):
    """What to do first."""

    SFT = "SFT first"
    OPD = "OPD"
    OPD_THEN_RL = "OPD then RL"
    RL = "RL"
    SELF_DISTILLATION = "self-distillation"
    HARDER_TASKS = "harder tasks"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """``open``: the answers behind the choice that intervals leave undecided, by their names."""

    choice: Choice
    reason: str
    open: tuple[str, ...]


def recommend(figures: Figures) -> Recommendation:
    """The first rule that fits. What could not be asked is not held against a teacher."""
    answers = answer(figures)
    if answers.gap.holds is False:
        return _recommendation(*_without_gap(figures.student.share or 0.0), gap=answers.gap)
    for name, why in SFT_FIRST.items():
        if (one := getattr(answers, name)).holds is False:
            return _recommendation(Choice.SFT, why, gap=answers.gap, **{name: one})
    every = {field.name: getattr(answers, field.name) for field in dataclasses.fields(answers)}
    choice, why = _with_all(figures)
    if unknown := [name for name, one in every.items() if one.holds is None]:
        why += f"; unknown: {', '.join(unknown)}"
    return _recommendation(choice, f"nothing that was found speaks against it{why}", **every)


def _recommendation(choice: Choice, reason: str, **behind: Answer) -> Recommendation:
    undecided = [name for name, one in behind.items() if one.holds is not None and not one.sure]
    return Recommendation(choice, reason, tuple(undecided))


def _without_gap(student: float) -> tuple[Choice, str]:
    """``student``: its success rate."""
    why = "there is nothing to distil from a teacher that is no better"
    if student >= CEILING:
        return Choice.HARDER_TASKS, f"{why}, and the student solves these tasks"
    if student > 0:
        return Choice.RL, f"{why}; a reward can build on the tasks that the student does solve"
    why += ", and no success that a reward could build on: let the student, told more, teach itself"
    return Choice.SELF_DISTILLATION, why


def _with_all(figures: Figures) -> tuple[Choice, str]:
    """Where nothing speaks against a teacher: what comes of it, and what is to be minded."""
    if figures.is_student:
        return Choice.SELF_DISTILLATION, ": the student, told more, is the better one"
    why, teacher = "", figures.teacher.share
    if figures.lost:
        why = f"; but the teacher is lost at {figures.lost}: begin with fewer turns, or gate what it says"
        why += " there"
    if teacher is None or teacher >= CEILING:
        return Choice.OPD, why
    why += f"; it ends at the teacher's {teacher:.0%}, and a verifier's reward leads beyond"
    return Choice.OPD_THEN_RL, why


def answer(figures: Figures) -> Answers:
    """All four, each from its own figures."""
    return Answers(_gap(figures), _compatible(figures), _horizon(figures), _reliable(figures))


def _gap(figures: Figures) -> Answer:
    """By success where the teacher acts, else by how far its distributions are from the student's."""
    better, distance = figures.better, figures.distance
    about = "" if figures.kl else "about "  # from the sampled tokens alone
    apart = f"KL(student || teacher) {about}{distance} nats a token" if distance else ""
    if better is None:
        if distance is None:
            return Answer(None, False, "the teacher neither acted nor scored")
        return Answer(*_at_least(distance, MIN_KL), f"{apart}; {figures.no_states}")
    says = (
        f"the teacher solves {percent(figures.teacher)} of the tasks, the student {percent(figures.student)}"
    )
    says += f", a difference of {_points(better)} points" + (f"; {apart}" if apart else "")
    if better.value >= MIN_GAP:
        return Answer(True, better.low > 0, says)
    near = distance is not None and distance.high < MIN_KL
    return Answer(False, near or better.high < MIN_GAP, says)


def _compatible(figures: Figures) -> Answer:
    """All that is known must hold: the overlap, the perplexity, and what the teacher itself would do."""
    tested: list[tuple[bool, bool]] = []
    says: list[str] = []
    if figures.overlap is not None:
        tested.append(_at_least(figures.overlap, MIN_OVERLAP))
        says.append(f"{figures.overlap} of the student's probability is on the top tokens of both")
    if figures.log_ratio is not None:
        nearness = (-figures.log_ratio.value, -figures.log_ratio.high, -figures.log_ratio.low)
        tested.append(_at_least(Mean(*nearness), -MAX_EXCESS))
        says.append(
            f"perplexity of its text {figures.perplexity} to the teacher, {figures.own_perplexity} to itself"
        )
    with_itself = figures.own_agreement.share
    if with_itself is not None and figures.agreement.played:
        if with_itself >= TELLING:
            tested.append(_at_least(_mean_of(figures.agreement), MIN_AGREEMENT * with_itself))
        says.append(
            f"the teacher does the same in {percent(figures.agreement)} of its states, the student again in "
            f"{percent(figures.own_agreement)}"
        )
    if not tested:
        return Answer(
            None, False, "; ".join(says) or f"not asked: {figures.no_states or 'no log-probs, no actions'}"
        )
    holds = all(one for one, _ in tested)
    sure = all(sure for _, sure in tested) if holds else any(sure for one, sure in tested if not one)
    return Answer(holds, sure, "; ".join(says))


def _horizon(figures: Figures) -> Answer:
    """Turns, of whoever needs more: a student may fail early. Or many tokens in few turns."""
    turns = max((one for one in (figures.turns, figures.teacher_turns) if one), key=lambda one: one.value)
    enough, long = _at_least(turns, MIN_TURNS), _at_least(figures.tokens, MIN_TOKENS)
    holds = enough[0] or long[0]
    sure = any(sure for one, sure in (enough, long) if one) if holds else enough[1] and long[1]
    says = f"{turns.value:.1f} turns and {figures.tokens.value:.0f} tokens an episode"
    if len(known := [one for one in figures.depths if one.kl]) > 1:
        says += "; KL a token " + ", ".join(f"{one.kl} at {one.turns}" for one in (known[0], known[-1]))
    return Answer(holds, sure, says)


def _reliable(figures: Figures) -> Answer:
    """Whether enough of the teacher's own success is left in the student's states."""
    astray = figures.astray
    if astray is None or astray.continued.share is None:
        return Answer(None, False, f"not asked: {figures.no_states or 'no state after the first turn'}")
    says = (
        f"from the student's states after turn 1 the teacher solves {percent(astray.continued)}, alone "
        f"{percent(astray.alone)} of the same tasks; the student {percent(astray.student)}"
    )
    if figures.lost:
        says += f"; less than half of what it can at {figures.lost}"
    return Answer(*_at_least(_mean_of(astray.continued), astray.least), says)


def _at_least(mean: Mean, least: float) -> tuple[bool, bool]:
    """Whether a mean is, and whether all of its interval is on that side."""
    holds = mean.value >= least
    return holds, mean.low >= least if holds else mean.high < least


def _mean_of(arm: Arm) -> Mean:
    return Mean(arm.share or 0.0, *interval(arm))


def _points(mean: Mean) -> str:
    return f"{100 * mean.value:.0f} ({100 * mean.low:.0f} to {100 * mean.high:.0f})"


def plain(value: Any) -> Any:
    """Figures as JSON has them: arms with their intervals, null for what is not finite."""
    match value:
        case Arm():
            low, high = interval(value)
            shares = {"share": value.share, "interval": [low, high] if value.played else None}
            return {"wins": value.wins, "played": value.played} | shares
        case float():
            return value if math.isfinite(value) else None
        case tuple():
            return [plain(one) for one in value]
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
