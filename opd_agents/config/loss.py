"""What is learned: the components of the loss, their advantages, weights and gates.

Every published method is a combination of these (`configs/methods/*.yaml`); the mathematics is in
`opd_agents.objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from opd_agents.config.base import PLUG_IN, Scheduled, Section, SignedScheduled
from opd_agents.config.weights import BeliefRevision, LikelihoodShift, Weight
from opd_agents.types import Actor, Outcome, SpanKind

PlugIn: TypeAlias = Annotated[str, Field(pattern=PLUG_IN)]

# What the gradient of an estimator of the reverse KL is, with a ratio that is differentiated or not.
ESTIMATES: Mapping[str, Mapping[str, str]] = {
    "k1": {"live": "reverse_kl", "detached": ""},
    "k2": {"live": "?", "detached": "reverse_kl"},
    "k3": {"live": "reverse_kl", "detached": "forward_kl"},
}
GRADIENTS = {
    "": "an expected gradient of zero",
    "?": "the gradient of no divergence",
    "reverse_kl": "the gradient of reverse_kl",
    "forward_kl": "the gradient of forward_kl",
}


def _check_given(section: Section, **fields: tuple[bool, str]) -> None:
    """Each field (needed, what it is of) is given where it is needed, and only there."""
    for name, (needed, what) in fields.items():
        if needed != (vars(section)[name] is not None):
            remedy = "is missing" if needed else f"has no use (`{name}: null` takes it out)"
            raise ValueError(f"`{name}` {remedy}; it is {what}")


def _check_signless(key: str, weights: Sequence[Weight]) -> None:
    if signed := [one.kind for one in weights if isinstance(one, LikelihoodShift | BeliefRevision)]:
        raise ValueError(f"`{key}`: {signed[0]} follows a reward's sign; it is a gate of `rewards`")


class Select(Section):
    """Which action tokens a component sees; an empty field selects all, but for alternatives, which are seen
    only where ``source`` names them."""

    actor: Actor | None = None
    source: Literal["rollout", "correction", "practice", "demonstration", "alternative"] | None = None
    outcome: Outcome | list[Outcome] | None = None
    spans: list[SpanKind] | None = None

    @model_validator(mode="after")
    def _chosen_tokens(self) -> Select:
        if self.spans == [] or self.outcome == []:
            raise ValueError("`spans` or `outcome` is empty and would select nothing; leave it out for all")
        if self.spans and SpanKind.FORCED in self.spans:
            raise ValueError("`spans`: forced tokens are no choice of the model and are never trained")
        return self


class _Component(Section):
    """One term of the loss: ``coef * sum_t w_t l_t / denominator``.

    ``denominator``: the mean over ``token``s that are selected, over those of non-zero weight (``selected``),
    over their ``weights``; over ``turn``s or ``episode``s of the mean within each; or a ``constant``.
    """

    coef: Scheduled = 1.0
    select: Select = Select()
    denominator: Literal["token", "turn", "episode", "selected", "weights", "constant"] = "token"
    constant: float | None = Field(None, gt=0)  # the denominator when `denominator: constant`
    weights: list[Weight] = []  # multiplied
    credit: PlugIn | None = None  # further weights of the actions

    @model_validator(mode="after")
    def _constant_given(self) -> _Component:
        if (self.denominator == "constant") != (self.constant is not None):
            raise ValueError("`constant` is needed with `denominator: constant`, and only there")
        _check_signless("weights", self.weights)
        return self


class Distill(_Component):
    """A divergence between the student and a ``reference`` (`teacher`, or one of `references`) at every
    position, differentiated; see `opd_agents.objectives.divergence`."""

    kind: Literal["distill"]
    reference: str = "teacher"
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "alpha", "tvd"] = (
        "reverse_kl"
    )
    beta: float | None = None  # of jsd, between 0 and 1
    alpha: float | None = Field(None, gt=0, lt=1)  # of skew_kl, skew_reverse_kl and alpha
    signal: Literal["full", "student_top_k", "teacher_top_k", "sampled"] = "full"
    k: int | None = Field(None, gt=0)  # of a top-k signal
    tail: Literal["bucket", "sampled", "none"] | None = None  # of a top-k signal
    renormalise: Literal["none", "teacher", "both"] = "none"  # over the top k, where there is no tail
    estimator: Literal["direct", "per_candidate", "k1", "k2", "k3"] = "direct"
    ratio: Literal["live", "detached"] | None = None  # of k1, k2 and k3
    geometric: Scheduled = 0.0  # the target is p q^geometric, normalised, q detached
    clip: float | None = Field(None, gt=0)  # most that one candidate token adds, in nats
    temperature_student: float | None = Field(None, gt=0)  # None: the rollout's
    temperature_teacher: float | None = Field(None, gt=0)  # None: the rollout's
    ratio_clip: float | None = Field(None, gt=1)  # weight by the detached, clipped importance ratio

    @model_validator(mode="after")
    def _parameters_fit(self) -> Distill:
        top_k = self.signal in ("student_top_k", "teacher_top_k")
        _check_given(
            self,
            beta=(self.divergence == "jsd", "of divergence jsd"),
            alpha=(
                self.divergence in ("skew_kl", "skew_reverse_kl", "alpha"),
                "of the divergences skew_kl, skew_reverse_kl and alpha",
            ),
            k=(top_k, "of the signals student_top_k and teacher_top_k"),
            tail=(top_k, "bucket, sampled or none, of the signals student_top_k and teacher_top_k"),
            ratio=(self.estimator in ESTIMATES, "live or detached, of the estimators k1, k2 and k3"),
        )
        if self.ratio_clip is not None and "sampled" in (self.signal, self.tail):
            raise ValueError(
                "`ratio_clip` with a sampled signal or tail would divide by the sampling probability twice"
            )
        if self.beta is not None and not 0 < self.beta < 1:
            raise ValueError(
                f"`beta` is {self.beta:g}, but jsd is of a beta between 0 and 1; at the ends it is 0. What it"
                " tends to, over beta or 1 - beta, is `divergence: forward_kl` at 0 and `reverse_kl` at 1"
            )
        if self.renormalise != "none" and self.tail != "none":
            raise ValueError("`renormalise` is for a top-k signal with `tail: none`")
        if self.estimator in ESTIMATES:
            self._estimate_fits()
        if self.estimator == "per_candidate" and (
            self.divergence != "reverse_kl" or self.signal == "sampled" or self.tail not in (None, "none")
        ):
            raise ValueError(
                "estimator per_candidate is of reverse_kl, over all tokens or a top k with `tail: none`"
            )
        return self

    def _estimate_fits(self) -> None:
        """Which pairs of estimator and ratio have the gradient of what; the others of nothing stated."""
        if self.signal != "sampled":
            raise ValueError(f"estimator {self.estimator} is of `signal: sampled`")
        gives = ESTIMATES[self.estimator][self.ratio or ""]
        if gives != self.divergence:
            raise ValueError(
                f"estimator {self.estimator} with a {self.ratio} ratio has {GRADIENTS[gives]}, not that of"
                f" {self.divergence}. For the reverse KL take k1 or k3 live or k2 detached, for the forward"
                " one k3 detached"
            )


class ReferencePart(Section):
    """One part of an advantage from a reference: ``coef * gates * d``, d = log p(token) - log q(token), of
    the sampled token, detached; q is the student that sampled. See `objectives.reference_advantages`.

    With ``unit: turn`` the d of all tokens of a turn are added up, and so they are in any case in a span of
    bytes that a teacher with another tokenizer scores as one: every token of it has the sum, and what is said
    of tokens here holds of turns or spans.
    """

    reference: str = "teacher"
    coef: SignedScheduled = 1.0
    unit: Literal["token", "turn"] = "token"
    discount: float = Field(0.0, ge=0, le=1)  # of the d of later action tokens of the episode
    include_now: bool = True  # whether a token's own d counts, where `discount` adds the later ones
    length_normalise: bool = False  # the return by the number of tokens that are left
    baseline: Literal["none", "closed_form"] = "none"  # closed_form: minus E_q[d] = -KL(q || p)
    clip: float | None = Field(None, gt=0)  # of |d|, in nats
    gates: list[Weight] = []

    @model_validator(mode="after")
    def _something_counts(self) -> ReferencePart:
        if not self.include_now and self.discount == 0:
            raise ValueError("`include_now: false` with `discount: 0` leaves no d at all")
        _check_signless("gates", self.gates)
        if self.baseline == "closed_form" and (
            self.length_normalise or not self.include_now or self.unit == "turn"
        ):
            raise ValueError(
                "`baseline: closed_form` is that of a token's own d, undivided: not for `include_now: false`,"
                " `length_normalise` or `unit: turn`"
            )
        return self


class RewardPart(Section):
    """One part of an advantage from a reward: ``coef * gates * (r - baseline) / scale``.

    The reward is the environment's, a ``reward`` of yours, the judge's score from 0 (0.0) to 9 (1.0) or the
    ``discriminator``'s of the episode. ``verbal: episode`` gives all of an episode its score, or the mean of
    those of its actions; ``verbal: action`` compares all actions of a group, each by its own. What has no
    score has no advantage.

    ``key_step`` is of `correction.practice` (SCoRe, arXiv 2509.14257), whose episodes begin where an action
    was repaired: what the student does there is the key step, and it does what the repair does, what it did
    before, or something else; as text, or by the same answer and the same state after it.

    - ``published``: the reward of an episode is 1 where it succeeds, else 0 where it does not come to an end
      or ends with the key step, else .5, 0 and .1 of a key step that is the repair, the old action, another;
      that of an episode from a task's beginning is 1 or 0.
    - ``match``: of the key step alone, .5 where it is the repair and else 0, whether or not the episode comes
      to an end.
    - ``value``: of the key step alone, how much more often the student succeeds after it than before it, by
      the rollouts that verified the repair; unknown, and so of no advantage, of another action.
    """

    reward: PlugIn | None = None  # instead of the environment's
    verbal: Literal["episode", "action"] | None = None  # the judge's instead of the environment's
    discriminator: bool = False  # how much like the teacher's the section `discriminator` finds the episode
    key_step: Literal["published", "match", "value"] | None = None
    coef: SignedScheduled = 1.0
    baseline: Literal["group", "leave_one_out", "none"] = "group"
    normalise: Literal["std", "batch_std", "none"] = "std"
    unfinished: Literal["scored", "masked"] = "scored"  # episodes that a budget cut off, or their last action
    gates: list[Weight] = []

    @model_validator(mode="after")
    def _comparable(self) -> RewardPart:
        if self.baseline == "none" and self.normalise != "none":
            raise ValueError(
                "`normalise` divides by the spread of rewards, which is 0 where they agree: with `baseline:"
                " none` say `normalise: none`"
            )
        own = (
            self.reward is not None,
            self.verbal is not None,
            self.discriminator,
            self.key_step is not None,
        )
        if sum(own) > 1:
            raise ValueError(
                "`reward`, `verbal`, `discriminator` and `key_step` are rewards of their own: give each a"
                " part of its own"
            )
        if self.discriminator and self.baseline == "none":
            raise ValueError(
                "`discriminator: true` needs a baseline: its scores mean something beside each other only"
            )
        return self


class Policy(_Component):
    """A policy gradient: the surrogate ``-min(r A, clip(r) A)`` with a composed, detached advantage A."""

    kind: Literal["policy"]
    references: dict[str, ReferencePart] = {}
    rewards: dict[str, RewardPart] = {}
    whiten: bool = False  # the composed advantage over the batch's tokens
    ratio: Literal["token", "turn", "sequence", "trrd", "shaped", "none"] = "token"
    trrd_alpha: float | None = Field(None, ge=0, le=1)  # of trrd: r^alpha (q / p)^(1 - alpha)
    trrd_reference: str | None = None
    shaping: float | None = Field(None, gt=0)  # of shaped: q / (q + shaping)
    clip_low: float | None = Field(0.2, gt=0, lt=1)  # None: not clipped
    clip_high: float | None = Field(0.2, gt=0)
    mismatch: Literal["tis", "icepop"] | None = None  # ratio to the trainer's old log-probs, corrected
    mismatch_low: float | None = Field(None, gt=0)  # of icepop
    mismatch_high: float | None = Field(None, gt=0)  # of both

    @model_validator(mode="after")
    def _composed(self) -> Policy:
        if not (self.references or self.rewards):
            raise ValueError("a `policy` component needs an advantage: `references`, `rewards`, or both")
        if self.references.keys() & self.rewards.keys():
            raise ValueError("`references` and `rewards` must not share the name of a part")
        _check_given(
            self,
            trrd_alpha=(self.ratio == "trrd", "of ratio trrd"),
            trrd_reference=(self.ratio == "trrd", "of ratio trrd"),
            shaping=(self.ratio == "shaped", "of ratio shaped"),
            mismatch_low=(self.mismatch == "icepop", "of mismatch icepop"),
            mismatch_high=(self.mismatch is not None, "of mismatch tis and icepop"),
        )
        if self.mismatch_high is not None and self.mismatch_high <= (self.mismatch_low or 0):
            raise ValueError("`mismatch_low` must be below `mismatch_high`")
        if self.ratio == "shaped" and (self.clip_low is not None or self.clip_high is not None):
            raise ValueError(
                "ratio shaped is a probability, far below 1 for most tokens: say `clip_low: null` and"
                " `clip_high: null`"
            )
        if self.ratio in ("shaped", "none") and self.mismatch:
            raise ValueError(f"`mismatch` corrects a ratio to old log-probs: ratio {self.ratio} has none")
        return self


class CrossEntropy(_Component):
    """The negative log-likelihood of the selected actions; supervised fine-tuning."""

    kind: Literal["ce"]


class Entropy(_Component):
    """Minus the entropy of the student's distribution: a bonus for keeping it."""

    kind: Literal["entropy"]


class Preference(_Component):
    """A loss on pairs: what ``chosen`` selects against what ``rejected`` does, of ``episodes`` of one group,
    or of two ``actions`` at one state, the student's and that of `rollout.alternatives`. See
    `opd_agents.objectives.preference`."""

    kind: Literal["preference"]
    form: Literal["dpo", "spin", "orpo"]
    pairs: Literal["episodes", "actions"] = "episodes"
    beta: float | None = Field(None, gt=0)  # of dpo and spin
    reference: str | None = None  # of dpo and spin: one of `references`
    chosen: Select
    rejected: Select

    @model_validator(mode="after")
    def _form_fits(self) -> Preference:
        anchored = self.form in ("dpo", "spin")
        _check_given(self, beta=(anchored, "of dpo and spin"), reference=(anchored, "of dpo and spin"))
        if self.select != Select() or self.weights or self.credit or self.denominator != "token":
            raise ValueError("a `preference` counts pairs: take `chosen` and `rejected`, without weights")
        if "correction" in (self.chosen.source, self.rejected.source):
            raise ValueError("`source: correction`: accepted repairs are of no group and so in no pair")
        if (self.pairs == "actions") != (self.chosen.source == "alternative"):
            raise ValueError(
                "`pairs: actions` goes with `chosen: {source: alternative}`: what another did at the"
                " student's states"
            )
        return self


Component: TypeAlias = Annotated[
    Distill | Policy | CrossEntropy | Entropy | Preference, Field(discriminator="kind")
]


class Loss(Section):
    """What is minimised: the sum of ``components``. One that is null is none: so a preset's is taken out."""

    components: dict[str, Component] = {}
    both_kl_legs: bool = False  # one reference both in an advantage and in a divergence, on purpose

    @field_validator("components", mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_leg(self) -> Loss:
        losses = {c.reference for c in self.components.values() if isinstance(c, Distill)}
        policies = [c for c in self.components.values() if isinstance(c, Policy)]
        parts = {part.reference for c in policies for part in c.references.values()}
        if (twice := losses & parts) and not self.both_kl_legs:
            raise ValueError(
                f"the reference `{min(twice)}` stands in a `distill` component and in an advantage, so that"
                " its KL would count twice; drop one, or say `both_kl_legs: true`"
            )
        if self.both_kl_legs and not twice:
            raise ValueError("`both_kl_legs` is set, but no reference has both")
        return self
