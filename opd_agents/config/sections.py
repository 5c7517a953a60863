"""What a run is asked to do: frozen pydantic models, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opd_agents.types import Actor, Outcome, SpanKind

PLUG_IN = r"^[\w.]+:\w+$"  # module:name, importable here or through `imports`


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Section):
    """A coefficient over the run: ``kind`` from ``start`` to ``end`` as the run's progress goes 0 to 1."""

    kind: Literal["linear", "cosine"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)


Scheduled: TypeAlias = Annotated[float, Field(ge=0)] | Schedule


class Build(Section):
    """A fresh, randomly initialised model: ``config`` are the fields of a transformers config class."""

    model_type: str = "llama"
    config: dict[str, Any]
    tokenizer: str | None = None  # checkpoint whose tokenizer is shared; else one is made of expert episodes


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


class Teacher(Section):
    """``local``: the checkpoint ``model``. ``self``: the student's own frozen base, its adapter switched off.
    ``module:name``: a class of yours, made with ``options``."""

    kind: Literal["local", "self"] | Annotated[str, Field(pattern=PLUG_IN)] = "local"
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _options_of_a_class(self) -> Teacher:
        if self.options and self.kind in ("local", "self"):
            raise ValueError(f"`options` are of a class of your own (kind: module:name), not of {self.kind}")
        if self.model is not None and self.kind == "self":
            raise ValueError("`model` is for other kinds: of kind self the student's own base teaches")
        return self


class Sampler(Section):
    kind: Literal["transformers"] = "transformers"


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


Source: TypeAlias = Literal["student", "teacher", "expert"]


class Rollout(Section):
    """Where experience comes from. ``source``: one actor, a mixture drawn per turn, or recordings."""

    source: Source | Recorded | dict[Source, float] = "student"
    episodes_per_step: int = Field(32, gt=0)
    group_size: int = Field(1, gt=0)
    max_turns: int | None = Field(None, gt=0)  # on top of the environment's own limit
    temperature: float = Field(1.0, gt=0)
    max_tokens_per_turn: int = Field(256, gt=0)
    max_context_tokens: int = Field(8192, gt=0)
    max_observation_tokens: int = Field(2048, gt=0)  # of one turn; the middle of what is longer is cut out
    step_timeout: float | None = Field(None, gt=0)  # seconds of wall clock for one environment step

    @property
    def actors(self) -> set[Source]:
        """Who acts in environments: nobody where all experience is recorded."""
        if isinstance(self.source, Recorded):
            return {"student"} if self.source.student else set()
        return {self.source} if isinstance(self.source, str) else set(self.source)

    @model_validator(mode="after")
    def _whole_groups(self) -> Rollout:
        if self.episodes_per_step % self.group_size:
            raise ValueError(
                f"episodes_per_step {self.episodes_per_step} is no multiple of group_size {self.group_size}"
            )
        return self


class Select(Section):
    """Which action tokens a component sees; an empty field selects all."""

    actor: Actor | None = None
    source: Literal["rollout", "correction"] | None = None
    outcome: Outcome | None = None
    spans: list[SpanKind] | None = None

    @model_validator(mode="after")
    def _chosen_tokens(self) -> Select:
        if self.spans == []:
            raise ValueError("`spans` is empty and would select nothing; leave it out for all tokens")
        if self.spans and SpanKind.FORCED in self.spans:
            raise ValueError("`spans`: forced tokens are no choice of the model and are never trained")
        return self


class Component(Section):
    """One term of the loss: ``coef * sum_t w_t l_t / denominator``."""

    kind: Literal["distill", "policy", "ce"]
    coef: Scheduled = 1.0
    select: Select = Select()
    denominator: Literal["token", "turn", "episode", "constant"] = "token"
    constant: float | None = Field(None, gt=0)  # the denominator when `denominator: constant`
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    beta: float = Field(0.5, gt=0, lt=1)  # of jsd
    ratio_clip: float | None = Field(None, gt=1)  # distill: weight by the detached, clipped importance ratio
    reward: Annotated[str, Field(pattern=PLUG_IN)] | None = None  # policy: instead of the environment's
    credit: Annotated[str, Field(pattern=PLUG_IN)] | None = None  # further weights of the actions
    normalise: Literal["std", "none"] = "std"  # policy: of the group's rewards
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)

    @model_validator(mode="after")
    def _constant_given(self) -> Component:
        if (self.denominator == "constant") != (self.constant is not None):
            raise ValueError("`constant` is needed with `denominator: constant`, and only there")
        if self.reward is not None and self.kind != "policy":
            raise ValueError("`reward` is of `policy` components; all kinds take weights from a `credit`")
        return self


class Loss(Section):
    components: dict[str, Component] = {}

    @model_validator(mode="after")
    def _one_divergence(self) -> Loss:
        distills = [c for c in self.components.values() if c.kind == "distill"]
        if len({(c.divergence, c.beta if c.divergence == "jsd" else None) for c in distills}) > 1:
            raise ValueError("`distill` components must share `divergence` and `beta`: a pass computes one")
        return self


class Correction(Section):
    """Earliest-error correction at the action level (after SCoRe, 2509.14257), verified by re-rollouts."""

    propose_below: float = Field(-2.3, lt=0)  # teacher's log-prob of the action (nats) that marks an error
    episodes_per_step: int = Field(8, gt=0)
    trials: int = Field(4, gt=0)  # fresh student re-rollouts per arm (after the repair; after the own action)
    min_gain: float = Field(0.5, gt=0, le=1)  # success rate gained by the repair for it to be accepted
    token_share: float = Field(0.18, gt=0, lt=1)  # of all generated tokens, spent on repairs and their proof


class TrainerSettings(Section):
    steps: int = Field(100, gt=0)
    flops: float | None = Field(None, gt=0)  # stop after the step that reaches this many FLOPs
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
    tensorboard: bool = True
    threads: int | None = Field(None, gt=0)  # of torch on the CPU; a tiny model is fastest with one


class EvaluationSettings(Section):
    suite: str
    split: str = "validation"
    limit: int | None = Field(None, gt=0)
    every: int = Field(25, gt=0)
    at_start: bool = True


class RunConfig(Section):
    """One run. A run with ``stages`` trains them in order, each from the last weights."""

    name: str
    output: str | None = None
    seed: int = Field(0, ge=0)
    imports: list[str] = []
    method: str | None = None
    student: Student
    teacher: Teacher | None = None
    sampler: Sampler = Sampler()
    chat: ChatSettings = ChatSettings()
    environments: list[EnvironmentSource] = []
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    correction: Correction | None = None
    trainer: TrainerSettings = TrainerSettings()
    evaluation: EvaluationSettings | None = None
    stages: dict[str, RunConfig] = {}

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.stages:
            if any(stage.stages for stage in self.stages.values()):
                raise ValueError("stages: a stage cannot have stages of its own")
            return self
        self._models_given()
        if not self.loss.components:
            raise ValueError("loss.components is empty: give some, or a `method` (`opd-agents methods`)")
        if all(component.coef == 0 for component in self.loss.components.values()):
            raise ValueError("every loss coefficient is zero: nothing would be learned")
        splits = [source.split for source in self.environments]
        if isinstance(self.rollout.source, Recorded):
            splits.append(self.rollout.source.split)
        if "test" in splits or (self.evaluation and self.evaluation.split == "test"):
            raise ValueError("split: `test` is for `opd-agents evaluate` alone; neither train nor tune on it")
        budget, most = self.chat.thinking_budget, self.rollout.max_tokens_per_turn
        if budget is not None and budget >= most:
            raise ValueError(
                f"chat.thinking_budget {budget} leaves no room for an action: rollout.max_tokens_per_turn is"
                f" {most}, thought included"
            )
        self._sources_fit()
        return self

    def _models_given(self) -> None:
        student, teacher = self.student, self.teacher
        if student.model is not None and student.build is not None:
            raise ValueError("student: give either `model` (a checkpoint) or `build` (a fresh model)")
        missing = [] if student.model or student.build else ["student.model"]
        if teacher and teacher.kind == "local" and teacher.model is None:
            missing.append("teacher.model")
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing: the folder, or the hub's id, of a checkpoint (a fresh "
                "student is made with student.build)"
            )

    def _sources_fit(self) -> None:
        kinds = {component.kind for component in self.loss.components.values()}
        actors = self.rollout.actors
        if self.teacher is None and ("distill" in kinds or self.correction or "teacher" in actors):
            raise ValueError("this loss, source or correction needs a `teacher: {model: PATH}`")
        if self.teacher and self.teacher.kind == "self" and self.student.lora is None:
            raise ValueError("teacher.kind: self is the student without its adapter; it needs `student.lora`")
        if actors and not self.environments:
            raise ValueError(
                "`environments` is empty: name one to act in, or take rollout.source: {dataset: PATH}"
            )
        if "policy" in kinds and self.rollout.group_size < 2:
            raise ValueError("a `policy` component compares episodes: rollout.group_size must be >= 2")
        if isinstance(self.rollout.source, Recorded):
            self._recordings_fit()
        if "policy" in kinds and actors != {"student"}:
            raise ValueError("a `policy` component needs rollout.source: student")

    def _recordings_fit(self) -> None:
        components = self.loss.components
        if any(component.kind == "policy" for component in components.values()):
            raise ValueError(
                "a `policy` component needs rollout.source: student; recordings have no log-probs"
            )
        if all(component.select.actor not in (None, Actor.CORPUS) for component in components.values()):
            raise ValueError(
                "no loss component learns from rollout.source.dataset: leave out its `select.actor`, or take"
                " `select: {actor: corpus}`"
            )
        if self.correction and not self.rollout.actors:
            raise ValueError(
                "`correction` repairs the student's episodes; rollout.source.student must be > 0"
            )
