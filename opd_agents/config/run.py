"""A run's config as a whole, and what its sections must agree on: each check raises ValueError with the keys
and the remedy."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from opd_agents.config.base import Section, always_zero
from opd_agents.config.loss import Component, Distill, Loss, Policy, Preference
from opd_agents.config.needs import reference_needs, selects_of, weights_of
from opd_agents.config.sections import (
    ChatSettings,
    Correction,
    EnvironmentSource,
    EvaluationSettings,
    Recorded,
    Rollout,
    Sampler,
    Student,
    TrainerSettings,
)
from opd_agents.config.teachers import Local, Teacher, conditioning_of
from opd_agents.config.weights import GroupFailed, PassRate, Perplexity
from opd_agents.types import Actor


class RunConfig(Section):
    """One run. A run with ``stages`` trains them in order, each from the last weights."""

    name: str
    output: str | None = None
    seed: int = Field(0, ge=0)
    imports: list[str] = []
    method: str | None = None
    student: Student
    teacher: Teacher | None = None
    references: dict[str, Teacher] = {}  # further models that the loss compares with, by name
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
        if not self.stages:
            _check_run(self)
        elif any(stage.stages for stage in self.stages.values()):
            raise ValueError("stages: a stage cannot have stages of its own")
        return self


def _check_run(config: RunConfig) -> None:
    """A run without stages."""
    _models_given(config)
    if not config.loss.components:
        raise ValueError("loss.components is empty: give some, or a `method` (`opd-agents methods`)")
    if all(_always_zero(component) for component in config.loss.components.values()):
        raise ValueError(
            "every loss coefficient is zero, all through the run, so that nothing would be learned: give a"
            " component, and in a `policy` one of its `references` or `rewards`, another `coef`"
        )
    splits = [source.split for source in config.environments]
    if isinstance(config.rollout.source, Recorded):
        splits.append(config.rollout.source.split)
    if "test" in splits or (config.evaluation and config.evaluation.split == "test"):
        raise ValueError("split: `test` is for `opd-agents evaluate` alone; neither train nor tune on it")
    budget, most = config.chat.thinking_budget, config.rollout.max_tokens_per_turn
    if budget is not None and budget >= most:
        raise ValueError(
            f"chat.thinking_budget {budget} leaves no room for an action: rollout.max_tokens_per_turn is"
            f" {most}, thought included"
        )
    _references_given(config)
    _sources_fit(config)
    _selects_fit(config)
    _estimates_fit(config)
    _groups_fit(config)
    _conditioning_fits(config)


def _always_zero(component: Component) -> bool:
    if isinstance(component, Policy) and not always_zero(component.coef):
        references = [part.coef for part in component.references.values()]
        return all(map(always_zero, references + [part.coef for part in component.rewards.values()]))
    return always_zero(component.coef)


def _models_given(config: RunConfig) -> None:
    student = config.student
    if student.model is not None and student.build is not None:
        raise ValueError("student: give either `model` (a checkpoint) or `build` (a fresh model)")
    missing = [] if student.model or student.build else ["student.model"]
    named = {"teacher": config.teacher} | {f"references.{n}": t for n, t in config.references.items()}
    missing += [f"{n}.model" for n, t in named.items() if isinstance(t, Local) and t.model is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: the folder, or the hub's id, of a checkpoint (a fresh "
            "student is made with student.build)"
        )


def _references_given(config: RunConfig) -> None:
    if reserved := {"teacher", "student"} & config.references.keys():
        raise ValueError(f"references.{min(reserved)}: the name is taken; call it otherwise")
    wanted = reference_needs(config.loss.components).keys()
    if config.teacher is None and (
        "teacher" in wanted or config.correction or _teacher_acts(config) or config.rollout.teacher_share
    ):
        raise ValueError("this loss, source or correction needs a `teacher: {model: PATH}`")
    if unknown := wanted - {"teacher"} - config.references.keys():
        known = ", ".join(["teacher", *config.references])
        raise ValueError(f"the loss compares with `{min(unknown)}`, but `references` has no such: {known}")
    if idle := config.references.keys() - wanted:
        raise ValueError(f"references.{min(idle)}: nothing in the loss compares with it")
    conditioned = conditioning_of(config.teacher) is not None
    alone = config.rollout.source == "student" and not (conditioned or config.correction)
    if config.rollout.teacher_share and not alone:
        raise ValueError(
            "rollout.teacher_share mixes the teacher into the student's every token: it needs `source:"
            " student`, a teacher without conditioning, and no `correction`, which the student proves alone"
        )


def _teacher_acts(config: RunConfig) -> bool:
    extra = config.rollout.demonstrations
    return "teacher" in config.rollout.actors or bool(extra and extra.actor == "teacher")


def _sources_fit(config: RunConfig) -> None:
    rollout, components = config.rollout, config.loss.components
    actors = rollout.actors
    if actors and not config.environments:
        raise ValueError(
            "`environments` is empty: name one to act in, or take rollout.source: {dataset: PATH}"
        )
    policies = [component for component in components.values() if isinstance(component, Policy)]
    recorded = isinstance(rollout.source, Recorded)
    others = recorded or actors != {"student"} or rollout.demonstrations is not None
    for component in policies if others else ():
        on_policy = component.ratio not in ("shaped", "none")
        if "student" not in actors or (on_policy and component.select.actor is not Actor.STUDENT):
            raise ValueError(
                "a `policy` component needs rollout.source: student (recordings have no log-probs); where"
                " others act too it needs `select: {actor: student}`, or `ratio: shaped` for their tokens"
            )
    if recorded:
        _recordings_fit(config)


def _selects_fit(config: RunConfig) -> None:
    """Whoever is selected acts somewhere."""
    rollout, extra = config.rollout, config.rollout.demonstrations
    actors, sources = {str(actor) for actor in rollout.actors}, {"rollout"}
    if isinstance(rollout.source, Recorded):
        actors.add("corpus")
    if extra is not None:
        actors.add(extra.actor)
        sources.add("demonstration")
    if config.correction is not None:
        actors |= {"student", "teacher"}
        sources.add("correction")
    for name, component in config.loss.components.items():
        for select in selects_of(component):
            for key, chosen, known in (("actor", select.actor, actors), ("source", select.source, sources)):
                if chosen is not None and chosen not in known:
                    raise ValueError(
                        f"loss.components.{name}: {key} `{chosen}` would select nothing: this run has"
                        f" {', '.join(sorted(known))} (rollout.source, rollout.demonstrations, correction)"
                    )


def _recordings_fit(config: RunConfig) -> None:
    components = config.loss.components
    if all(component.select.actor not in (None, Actor.CORPUS) for component in components.values()):
        raise ValueError(
            "no loss component learns from rollout.source.dataset: leave out its `select.actor`, or take"
            " `select: {actor: corpus}`"
        )
    if config.correction and not config.rollout.actors:
        raise ValueError("`correction` repairs the student's episodes; rollout.source.student must be > 0")
    if config.rollout.demonstrations:
        raise ValueError("rollout.demonstrations are added to groups that the student rolls out, not to data")
    if not config.rollout.actors and any(isinstance(c, Preference) for c in components.values()):
        raise ValueError(
            "a `preference` compares episodes of a group, and recordings are of none; let the student roll"
            " out groups (rollout.source.student > 0)"
        )


def _estimates_fit(config: RunConfig) -> None:
    rollout, extra = config.rollout, config.rollout.demonstrations
    recorded = isinstance(rollout.source, Recorded)
    scripted = "expert" in rollout.actors or (extra is not None and extra.actor == "expert")
    unsampled = [Actor.CORPUS] * recorded + [Actor.EXPERT] * scripted
    for name, component in config.loss.components.items():
        estimates = isinstance(component, Distill) and "sampled" in (component.signal, component.tail)
        if estimates and unsampled and component.select.actor in (None, *unsampled):
            raise ValueError(
                f"loss.components.{name}: `sampled` estimates a divergence from tokens that a model drew, and"
                f" those of the {unsampled[0]} were not: take another signal or tail, or"
                " `select: {actor: student}`"
            )


def _groups_fit(config: RunConfig) -> None:
    rollout, components = config.rollout, config.loss.components.values()
    policies = [c for c in components if isinstance(c, Policy)]
    parts = [part for component in policies for part in component.rewards.values()]
    compared = any(part.baseline != "none" for part in parts)
    extra = rollout.demonstrations
    if compared and rollout.group_size < 2 and not (extra and extra.when == "always"):
        raise ValueError("a `policy` component compares episodes: rollout.group_size must be >= 2")
    grouped = (GroupFailed, PassRate, Perplexity)
    alone = rollout.group_size < 2 or not rollout.actors
    for name, component in config.loss.components.items():
        if alone and any(isinstance(weight, grouped) for weight in weights_of(component)):
            raise ValueError(
                f"loss.components.{name}: a weight by the group's episodes needs rollout.group_size >= 2, and"
                " somebody who acts: recordings are of no group"
            )
    if rollout.redraws and not (parts and rollout.group_size > 1):
        raise ValueError(
            "rollout.redraws replaces groups whose rewards are equal: it needs `rewards` in a `policy`"
            " component and rollout.group_size >= 2"
        )
    if rollout.group_size < 2 and extra is None and any(isinstance(c, Preference) for c in components):
        raise ValueError("a `preference` compares episodes of a group: rollout.group_size must be >= 2")
    if extra and extra.when == "group_failed" and "student" not in rollout.actors:
        raise ValueError("rollout.demonstrations.when: group_failed looks at the student's episodes")
    if any(isinstance(c, Distill) and c.ratio_clip and rollout.source == "expert" for c in components):
        raise ValueError("`ratio_clip` clips ratios to sampling log-probs: the expert's actions have none")


def _conditioning_fits(config: RunConfig) -> None:
    for teacher in (config.teacher, *config.references.values()):
        conditioning = conditioning_of(teacher)
        sources = set(conditioning.sources if conditioning else ())
        if "peer" in sources and config.rollout.group_size < 2:
            raise ValueError("conditioning.sources: peer is of a group: rollout.group_size must be >= 2")
        acts = teacher is config.teacher and _teacher_acts(config)
        if acts and sources and not sources & {"text", "expert"}:
            raise ValueError(
                "a teacher that acts knows neither peers nor feedback of an episode to come: its"
                " conditioning.sources need `text` or `expert`"
            )
