"""What a run is asked to do: frozen pydantic models, unknown keys refused."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field, model_validator

from opd_agents.config.base import Scheduled, Section, all_zero_somewhere, bounds


class Build(Section):
    """A fresh, randomly initialised model: ``config`` are the fields of a transformers config class."""

    model_type: str = "llama"
    config: dict[str, Any]
    tokenizer: str | None = None  # checkpoint whose tokenizer is shared; else one is made of expert episodes
    tokenizer_episodes: int = Field(500, gt=0)  # that many of them


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685) on a frozen base; ``targets``: module names, or all linear layers
    but the head. There is no dropout: the sampler and the trainer must be one policy."""

    rank: int = Field(32, gt=0)
    alpha: float = Field(64.0, gt=0)
    targets: Literal["all-linear"] | list[str] = "all-linear"


class Student(Section):
    """``dtype`` is that of the weights in every forward pass. Trained bfloat16 weights have float32 masters
    in the optimizer."""

    model: str | None = None
    build: Build | None = None
    lora: Lora | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class ChatSettings(Section):
    """``history: append`` keeps the sampled ids of all turns as one growing row; ``template`` renders the
    whole conversation anew before every turn, as the template's own rules want it (stripped reasoning)."""

    history: Literal["append", "template"] = "append"
    template: str | None = None
    kwargs: dict[str, Any] = {}
    system: str | None = None  # replaces the environment's system prompt, also by the empty string
    syntax: str = "auto"  # of tool calls; auto: the one that reads what the template writes
    thinking_budget: int | None = Field(None, gt=0)  # tokens; then the think span is closed for the model


class EnvironmentSource(Section):
    id: str
    split: str = "train"
    weight: float = Field(1.0, gt=0)
    limit: int | None = Field(None, gt=0)  # only the first tasks of the split: a fixed, small data set
    options: dict[str, Any] = {}


class Recorded(Section):
    """Recorded conversations: chat-message JSONL or a `datasets` dataset on disk, in epochs of new order.

    ``student``: share of groups that the student rolls out instead, the lambda of GKD (arXiv 2306.13649).
    """

    dataset: str
    split: str = "train"
    student: float = Field(0.0, ge=0, lt=1)


class Trajectories(Section):
    """The student's own episodes of before the run, as `opd-agents rollout --out` writes them to the file
    ``trajectories``, with their token ids and log-probs, in epochs of new order. The student must begin as
    the policy that played them."""

    trajectories: str


Source: TypeAlias = Literal["student", "teacher", "expert"]


class Demonstrations(Section):
    """Further episodes of each group, acted by another: ``always``, or only where all of it failed
    (``group_failed``); or one in the place of each of the student's that the judge scores below ``at_least``
    (``rejected``; OVD, arXiv 2601.21968), which then stays on record and out of the loss."""

    actor: Literal["teacher", "expert"] = "teacher"
    per_group: int = Field(1, gt=0)  # not of `rejected`
    when: Literal["always", "group_failed", "rejected"] = "always"
    at_least: int | None = Field(None, ge=1, le=9)  # of `rejected`

    @model_validator(mode="after")
    def _rejection_fits(self) -> Demonstrations:
        if (self.at_least is not None) != (self.when == "rejected"):
            raise ValueError("`at_least` is needed with `when: rejected`, and only there")
        if self.when == "rejected" and self.per_group != 1:
            raise ValueError(
                "`when: rejected` puts one demonstration in the place of one episode: per_group 1"
            )
        return self


class Alternatives(Section):
    """What another (or the student, once more) would do at ``states`` of the student's, drawn anew in every
    step from its turns: for a `preference` with `pairs: actions`. Each is restored, shown ``samples`` times,
    and left; nothing is carried out. The share of the samples that do what the student did is the state's
    agreement, for a weight of that kind. The better of the two actions of a pair is the ``actor``'s, or the
    one that the `judge` prefers, asked in either order; where its answers disagree there is no pair."""

    actor: Literal["student", "teacher", "expert"] = "teacher"
    states: int = Field(16, gt=0)
    samples: int = Field(1, gt=0)  # of its actions at each state
    preferred_by: Literal["actor", "judge"] = "actor"

    @model_validator(mode="after")
    def _comparable(self) -> Alternatives:
        if self.actor == "expert" and self.samples > 1:
            raise ValueError("`samples`: a scripted expert does one thing at a state; leave it at 1")
        return self


class Curriculum(Section):
    """Which tasks are drawn, by what the student's own episodes on them have shown.

    A task's pass rate is p = (2 m + successes) / (2 + episodes), by a Beta prior with the mean m: the rate on
    all tasks of its environment together, so that tasks of which nothing is known are drawn, too. What an
    episode showed counts half after ``half_life`` steps. Pass rates stand in every checkpoint, and a run
    whose student is such a checkpoint begins with them, as the next stage does.

    ``draw: competence`` takes tasks in proportion to p (1 - p): those at the edge of what the student can do,
    neither solved nor hopeless (PACED, arXiv 2603.11178, weighs their loss so); ``uniform`` takes them
    evenly, and keeps count for the next stage. ``band`` leaves out the tasks whose pass rate is not between
    its two ends, until what is known of them has faded enough; where nothing is left, all are drawn. With
    ``next_level`` the `environments` are levels, from the easiest on: at first the first alone is drawn, and
    the next joins it while the pass rate on all of its tasks together is at least that.
    """

    draw: Literal["competence", "uniform"] = "competence"
    band: list[float] | None = Field(None, min_length=2, max_length=2)  # [lowest, highest]
    next_level: float | None = Field(None, gt=0.5, lt=1)
    half_life: float = Field(20.0, gt=0)  # steps

    @model_validator(mode="after")
    def _in_order(self) -> Curriculum:
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= 1:
            raise ValueError("`band`: two pass rates, 0 <= lowest < highest <= 1, such as [0.1, 0.9]")
        return self


class Beginning(Section):
    """The ``actor`` plays the first turns of every episode, so many that ``left`` would remain of those that
    it needs alone for the group's task: from back to front, where that grows (TCOD-B2F, arXiv 2604.24005).
    Where it does not succeed alone the student begins."""

    actor: Literal["teacher", "expert"] = "expert"
    left: Scheduled


class Rollout(Section):
    """Where experience comes from. ``source``: one actor, a mixture drawn per turn, or recordings. The shares
    of a mixture may be schedules; they are divided by their sum."""

    source: Source | Recorded | Trajectories | dict[Source, Scheduled] = "student"
    episodes_per_step: int = Field(32, gt=0)
    group_size: int = Field(1, gt=0)
    max_turns: Scheduled | None = None  # on top of the environment's own limit
    temperature: float = Field(1.0, gt=0)
    max_tokens_per_turn: int = Field(256, gt=0)
    max_context_tokens: int = Field(8192, gt=0)
    max_observation_tokens: int = Field(2048, gt=0)  # of one turn; the middle of what is longer is cut out
    step_timeout: float | None = Field(None, gt=0)  # seconds of wall clock for one environment step
    episode_timeout: float | None = Field(None, gt=0)  # ... for the reset and all steps of an episode
    max_live: int | None = Field(None, gt=0)  # environments of one id at once; null: as many as it allows
    max_action_tokens: Scheduled | None = None  # of an episode, which then ends unfinished
    teacher_share: float = Field(0.0, ge=0, lt=1)  # of the teacher in each token's distribution
    demonstrations: Demonstrations | None = None
    alternatives: Alternatives | None = None
    redraws: int = Field(0, ge=0)  # times that groups of equal rewards are replaced by fresh ones (DAPO)
    beginning: Beginning | None = None  # else it is the source's from the first turn on
    curriculum: Curriculum | None = None  # else tasks are drawn evenly

    @property
    def actors(self) -> set[Source]:
        """Who acts in environments: nobody where all experience is recorded."""
        match self.source:
            case Recorded(student=share):
                return {"student"} if share else set()
            case Trajectories():
                return set()
        begins: set[Source] = {self.beginning.actor} if self.beginning else set()
        return begins | ({self.source} if isinstance(self.source, str) else set(self.source))

    @property
    def writers(self) -> set[Source]:
        """Who wrote the experience, now or before the run, but for the authors of a corpus."""
        return {"student"} if isinstance(self.source, Trajectories) else self.actors

    @model_validator(mode="after")
    def _playable(self) -> Rollout:
        if self.episodes_per_step % self.group_size:
            raise ValueError(
                f"episodes_per_step {self.episodes_per_step} is no multiple of group_size {self.group_size}"
            )
        left = self.beginning.left if self.beginning else None
        for name, most in (
            ("max_turns", self.max_turns),
            ("max_action_tokens", self.max_action_tokens),
            ("beginning.left", left),
        ):
            if most is not None and bounds(most)[0] < 1:
                raise ValueError(f"`{name}` falls below 1, which leaves no room for an action")
        if isinstance(self.source, dict) and all_zero_somewhere(self.source.values()):
            raise ValueError("`source`: at some point of the run all shares are 0, and nobody would act")
        return self


class Discriminator(Section):
    """A model with a scalar head that learns, one update a step, to tell the episodes of
    `rollout.demonstrations` from the student's on the same tasks (Bradley-Terry; GAD, arXiv 2511.10643). Its
    score of an episode is the reward of the parts that say `discriminator: true`. The kind of its optimizer,
    weight decay and clipping are the ``trainer``'s."""

    model: str | None = None  # a checkpoint with the student's vocabulary; null: the student as it begins
    learning_rate: Scheduled | None = None  # null: the student's


FLOP_PARTS = ("rollout", "teacher", "update")  # what a run computes for; see Session.count
EVALUATION_METRICS = ("eval/success", "eval/success_low", "eval/success_high", "eval/success_greedy")


class Until(Section):
    """Ends a run, or a stage of it, before its steps are done: where the mean of the last ``window`` values
    of a ``metric`` of the steps, or of their evaluations (`eval/success`), is at least ``above`` or at most
    ``below``, or where it has not gained ``gain`` on the mean of the ``window`` values before them: a
    plateau. A negative gain is of a metric that is to fall. What only some steps measure counts in these."""

    metric: str
    window: int = Field(1, gt=0)
    above: float | None = None
    below: float | None = None
    gain: float | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Until:
        if sum(one is not None for one in (self.above, self.below, self.gain)) != 1:
            raise ValueError(f"`until` of {self.metric}: give one of `above`, `below` and `gain`")
        return self


class TrainerSettings(Section):
    steps: int = Field(100, gt=0)
    flops: float | None = Field(None, gt=0)  # stop after the step that reaches this many FLOPs
    until: list[Until] = []  # stop after the step with which one of these holds
    updates_per_step: int = Field(1, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Scheduled = 1e-4
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(16384, gt=0)
    gradient_shares_every: int = Field(10, gt=0)  # steps between measurements of each component's gradient
    checkpoint_every: int = Field(10, gt=0)
    keep_last: int = Field(2, gt=0)
    keep_best: Literal["success", "success_greedy"] | None = "success"  # of the evaluations; in best/
    gradient_checkpointing: bool = False  # recompute activations going backward: less memory, more time
    tensorboard: bool = True  # the metrics in the run folder's tensorboard/, too
    trackers: list[Literal["wandb", "mlflow"]] = []  # ... and there; their own variables set them up
    threads: int | None = Field(None, gt=0)  # of torch on the CPU; a tiny model is fastest with one


class EvaluationSettings(Section):
    suite: str
    split: str = "validation"
    limit: int | None = Field(None, gt=0)
    every: int = Field(25, gt=0)
    at_start: bool = True
