"""Weights and gates: factors of a token's loss, or of one part of its advantage, without gradient.

The formulas are in `opd_agents.objectives.weights`. A ``reference`` is `teacher`, or one of `references`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from opd_agents.config.base import Scheduled, Section


class OutcomeWeight(Section):
    """By the episode's outcome: ``success``, or ``otherwise``."""

    kind: Literal["outcome"]
    success: float = Field(1.0, ge=0)
    otherwise: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _not_nothing(self) -> OutcomeWeight:
        if self.success == self.otherwise == 0:
            raise ValueError("`success` and `otherwise` are both 0, which leaves no token at all")
        return self


class GroupFailed(Section):
    """1 in groups none of whose episodes succeeded, 0 in others."""

    kind: Literal["group_failed"]


class PassRate(Section):
    """p^alpha (1 - p)^beta of the group's success rate p (PACED, arXiv 2603.11178)."""

    kind: Literal["pass_rate"]
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(1.0, ge=0)


class Perplexity(Section):
    """Softmax over the selected episodes of a group of +-log perplexity / temperature, times their number
    (SCOPE, arXiv 2604.10688). ``of``: `student` or a reference."""

    kind: Literal["perplexity"]
    of: str = "student"
    prefer: Literal["high", "low"]
    temperature: float = Field(1.0, gt=0)


class TopTokens(Section):
    """1 on the ``share`` of each episode's tokens of highest score, 0 on others (TIP, arXiv 2604.14084)."""

    kind: Literal["top_tokens"]
    score: Literal["soft_or", "entropy", "divergence"] = "soft_or"
    share: float = Field(0.5, gt=0, le=1)
    reference: str = "teacher"


class TeacherEntropy(Section):
    """1 where the reference's entropy is ``above`` so many nats (EOPD, arXiv 2603.07079)."""

    kind: Literal["teacher_entropy"]
    above: float = Field(0.8, ge=0)
    reference: str = "teacher"


class Accepted(Section):
    """1 where the student's best token is among the reference's best ``k``, else ``otherwise`` (SelecTKD,
    arXiv 2510.24021, its greedy acceptance)."""

    kind: Literal["accepted"]
    k: int = Field(5, gt=0)
    otherwise: float = Field(0.01, ge=0, lt=1)
    reference: str = "teacher"


class WithoutTokens(Section):
    """0 on tokens of these texts, each one token; with ``first_only`` on the first of each in an episode.
    `end` stands for the tokens that end a turn."""

    kind: Literal["without_tokens"]
    tokens: list[str] = Field(min_length=1)
    first_only: bool = False


class Prefix(Section):
    """1 on the first ``tokens`` action tokens, or the first ``turns`` actions, of an episode."""

    kind: Literal["prefix"]
    tokens: Scheduled | None = None
    turns: Scheduled | None = None

    @model_validator(mode="after")
    def _one(self) -> Prefix:
        if (self.tokens is None) == (self.turns is None):
            raise ValueError("give either `tokens` or `turns`")
        return self


class Depth(Section):
    """``by_turn[k]`` on the k-th action (from 0) of an episode, the last of them on all later ones: how far a
    teacher is to be trusted at this depth, such as how often it succeeds from the student's states there."""

    kind: Literal["depth"]
    by_turn: list[Annotated[float, Field(ge=0)]] = Field(min_length=1)


class Agreement(Section):
    """sigmoid(slope d) of the sampled token's d = log p - log q (SDAR, arXiv 2605.15155)."""

    kind: Literal["sigmoid"]
    slope: float = Field(5.0, gt=0)
    reference: str = "teacher"


class LikelihoodShift(Section):
    """(1 - strength) + strength * clip(exp(sign(A) d), 1 - clip, 1 + clip): a gate of a reward's advantage A,
    whose sign it never changes (RLSD, arXiv 2604.03128)."""

    kind: Literal["likelihood_shift"]
    strength: Scheduled = 0.5
    clip: float = Field(0.2, gt=0, lt=1)
    reference: str = "teacher"


class BeliefRevision(Section):
    """(1 - strength) + strength * clip(1 + clip z, 1 - clip, 1 + clip) of each turn: a gate of a reward's
    advantage A, whose sign it never changes (AgentOPSD, arXiv 2608.05987). z is sign(A) times how much the
    turn revises the belief in success, standardised over the episode's turns. The belief begins as the
    group's success rate; a turn adds its sum of d to the log-odds, times ``decay`` with every turn since."""

    kind: Literal["belief_revision"]
    strength: float = Field(0.5, gt=0, le=1)
    clip: float = Field(0.2, gt=0, lt=1)
    decay: float = Field(0.95, ge=0, le=1)
    reference: str = "teacher"


class TurnDivergence(Section):
    """Falling where turns diverge more than those before (SOD, arXiv 2605.07725). ``published``: the product
    of d_u / d_(u+1), which is d_1 / d_k; ``running``: the mean of all turns before, over d_k. Both at most
    1 + cap; d is a turn's mean |log p - log q|; a first turn has 1."""

    kind: Literal["turn_divergence"]
    form: Literal["published", "running"]
    cap: float = Field(0.2, ge=0)
    reference: str = "teacher"


class TurnDisagreement(Section):
    """1 - (1 - a)(1 - b) of each turn: a its mean |d|, b its mean student entropy, both scaled to [0, 1] over
    the batch (T-DUR of ATOD, arXiv 2606.27814)."""

    kind: Literal["turn_disagreement"]
    reference: str = "teacher"


class Trust(Section):
    """exp(-measure / scale) of each turn: trust in a reference that is sure (``entropy``: its mean entropy on
    the turn, nats) or that finds the history plausible (``perplexity``: its mean -log p of all action tokens
    of the episode before the turn, nats; a first turn has 1)."""

    kind: Literal["trust"]
    measure: Literal["entropy", "perplexity"]
    scale: float = Field(1.0, gt=0)
    reference: str = "teacher"


class KLCollapse(Section):
    """0 from the first turn on whose mean KL(student || reference) is below ``floor`` times that of the
    episode's turns before it, in episodes without success: a reference that repeats the student's derailment
    agrees with it, and teaches nothing."""

    kind: Literal["kl_collapse"]
    floor: float = Field(0.1, gt=0, lt=1)
    reference: str = "teacher"


class VerbalScore(Section):
    """1 on actions that the judge's score is ``at_least`` so much of, 0 on others. An action without a score
    of its own has its episode's; one without either, as where the judge failed, has ``unjudged``."""

    kind: Literal["verbal_score"]
    at_least: int = Field(ge=1, le=9)
    unjudged: float = Field(1.0, ge=0)


class VerdictWeight(Section):
    """By the judge's verdict on the action, or else on its episode (SAGE-OPD, arXiv 2606.19659); without one,
    as where the judge failed, ``unjudged``."""

    kind: Literal["verdict"]
    skip: float = Field(0.0, ge=0)
    weak: float = Field(0.5, ge=0)
    strong: float = Field(1.0, ge=0)
    unjudged: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _not_nothing(self) -> VerdictWeight:
        if self.skip == self.weak == self.strong == 0:
            raise ValueError("`skip`, `weak` and `strong` are all 0, which leaves no token at all")
        return self


class ActionAgreement(Section):
    """The share of another's sampled actions at the state that are the student's own, or with ``inverted``
    the share that are not: those of `rollout.alternatives`. ``unasked`` at states where it did not act."""

    kind: Literal["agreement"]
    inverted: bool = False
    unasked: float = Field(0.0, ge=0)


Weight: TypeAlias = Annotated[
    OutcomeWeight
    | GroupFailed
    | PassRate
    | Perplexity
    | TopTokens
    | TeacherEntropy
    | Accepted
    | WithoutTokens
    | Prefix
    | Depth
    | Agreement
    | LikelihoodShift
    | BeliefRevision
    | TurnDivergence
    | TurnDisagreement
    | Trust
    | KLCollapse
    | VerbalScore
    | VerdictWeight
    | ActionAgreement,
    Field(discriminator="kind"),
]
