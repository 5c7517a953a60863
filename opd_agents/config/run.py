"""A run's config as a whole, and what its sections must agree on: each check raises ValueError with the keys
and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, model_validator

from opd_agents.config.base import Section, always_zero
from opd_agents.config.judge import Judge
from opd_agents.config.loss import Component, Distill, Loss, Policy, Preference, RewardPart
from opd_agents.config.needs import reference_needs, selects_of, weights_of
from opd_agents.config.sections import (
    ChatSettings,
    Correction,
    EnvironmentSource,
    EvaluationSettings,
    Recorded,
    Rollout,
    Student,
    TrainerSettings,
    Trajectories,
)
from opd_agents.config.serving import Sampler, TransformersSampling, VllmSampling
from opd_agents.config.teachers import Cached, Local, Teacher, Vllm, conditioning_of, sections_in
from opd_agents.config.weights import GroupFailed, PassRate, Perplexity, VerbalScore, VerdictWeight
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
    sampler: Sampler = TransformersSampling()
    chat: ChatSettings = ChatSettings()
    environments: list[EnvironmentSource] = []
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    correction: Correction | None = None
    judge: Judge | None = None
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
    _servers_fit(config)
    _caches_fit(config)
    _judge_fits(config)


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
    missing += [f"{n}.model" for n, t in _teachers(config) if isinstance(t, Local) and t.model is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: the folder, or the hub's id, of a checkpoint (a fresh "
            "student is made with student.build)"
        )


def _teachers(config: RunConfig) -> Iterator[tuple[str, Teacher]]:
    """Every section of a teacher, also inside another, with its place."""
    for name, teacher in config.references.items():
        yield from sections_in(f"references.{name}", teacher)
    if config.teacher is not None:
        yield from sections_in("teacher", config.teacher)


def _is_teacher(place: str) -> bool:
    """Of the teacher or a part of it."""
    return place.partition(".")[0] == "teacher"


def _references_given(config: RunConfig) -> None:
    if reserved := {"teacher", "student"} & config.references.keys():
        raise ValueError(f"references.{min(reserved)}: the name is taken; call it otherwise")
    wanted = reference_needs(config.loss.components).keys()
    proposes = config.correction is not None and config.correction.propose.by == "teacher"
    judge = config.judge.by if config.judge else None
    if config.teacher is None and (
        "teacher" in {*wanted, judge} or proposes or _teacher_acts(config) or config.rollout.teacher_share
    ):
        raise ValueError("this loss, source, correction or judge needs a `teacher: {model: PATH}`")
    if judge is not None and judge not in {"teacher", *config.references}:
        known = ", ".join(["teacher", *config.references])
        raise ValueError(f"judge.by is `{judge}`, but there is only {known}: add it to `references`")
    if unknown := wanted - {"teacher"} - config.references.keys():
        known = ", ".join(["teacher", *config.references])
        raise ValueError(f"the loss compares with `{min(unknown)}`, but `references` has no such: {known}")
    if idle := config.references.keys() - wanted - {judge}:
        raise ValueError(f"references.{min(idle)}: nothing in the loss compares with it, and it is no judge")
    conditioned = conditioning_of(config.teacher) is not None
    alone = config.rollout.source == "student" and not (conditioned or config.correction)
    if config.rollout.teacher_share and not alone:
        raise ValueError(
            "rollout.teacher_share mixes the teacher into the student's every token: it needs `source:"
            " student`, a teacher without conditioning, and no `correction`, which the student proves alone"
        )


def _teacher_acts(config: RunConfig) -> bool:
    rollout = config.rollout
    others = [other.actor for other in (rollout.demonstrations, rollout.alternatives) if other is not None]
    return "teacher" in [*rollout.actors, *others]


def _sources_fit(config: RunConfig) -> None:
    rollout, components = config.rollout, config.loss.components
    actors = rollout.writers
    if rollout.actors and not config.environments:
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
    if isinstance(rollout.source, Trajectories):
        _trajectories_fit(config)


def _selects_fit(config: RunConfig) -> None:
    """Whoever is selected acts somewhere."""
    rollout, extra = config.rollout, config.rollout.demonstrations
    actors, sources = {str(actor) for actor in rollout.writers}, {"rollout"}
    if isinstance(rollout.source, Recorded):
        actors.add("corpus")
    if extra is not None:
        actors.add(extra.actor)
        sources.add("demonstration")
    if rollout.alternatives is not None:
        actors.add(rollout.alternatives.actor)
        sources.add("alternative")
    if config.correction is not None:
        actors |= {"student", "teacher"}
        sources.add("correction")
    for name, component in config.loss.components.items():
        for select in selects_of(component):
            for key, chosen, known in (("actor", select.actor, actors), ("source", select.source, sources)):
                if chosen is not None and chosen not in known:
                    raise ValueError(
                        f"loss.components.{name}: {key} `{chosen}` would select nothing: this run has"
                        f" {', '.join(sorted(known))} (rollout.source, rollout.demonstrations,"
                        " rollout.alternatives, correction)"
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


def _trajectories_fit(config: RunConfig) -> None:
    rollout = config.rollout
    if config.correction or rollout.demonstrations:
        raise ValueError(
            "rollout.source.trajectories: episodes that are over are neither corrected nor given"
            " demonstrations"
        )
    if rollout.group_size > 1:
        raise ValueError("rollout.source.trajectories: the episodes are of no group; group_size must be 1")


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
    paired = any(isinstance(c, Preference) and c.pairs == "episodes" for c in components)
    if rollout.group_size < 2 and extra is None and paired:
        raise ValueError("a `preference` compares episodes of a group: rollout.group_size must be >= 2")
    if rollout.alternatives is not None and "student" not in rollout.actors:
        raise ValueError("rollout.alternatives are of the student's states: let the student act")
    if extra and extra.when != "always" and "student" not in rollout.actors:
        raise ValueError(f"rollout.demonstrations.when: {extra.when} looks at the student's episodes")
    if any(isinstance(c, Distill) and c.ratio_clip and rollout.source == "expert" for c in components):
        raise ValueError("`ratio_clip` clips ratios to sampling log-probs: the expert's actions have none")


def _conditioning_fits(config: RunConfig) -> None:
    for place, teacher in _teachers(config):
        conditioning = conditioning_of(teacher)
        sources = set(conditioning.sources if conditioning else ())
        if "peer" in sources and config.rollout.group_size < 2:
            raise ValueError("conditioning.sources: peer is of a group: rollout.group_size must be >= 2")
        acts = _is_teacher(place) and _teacher_acts(config)
        if acts and sources and not sources & {"text", "expert"}:
            raise ValueError(
                "a teacher that acts knows neither peers nor feedback of an episode to come: its"
                " conditioning.sources need `text` or `expert`"
            )


def _judge_fits(config: RunConfig) -> None:
    """What is made of judgements is asked for."""
    judge, rollout, correction = config.judge, config.rollout, config.correction
    proposes = correction is not None and correction.propose.by == "judge"
    uses = dict(_uses_of_judgements(config))
    if judge is None:
        if uses or proposes:
            raise ValueError(
                f"{next(iter(uses), 'correction.propose')} needs a judge: give a section `judge`"
            )
        return
    if "student" not in rollout.actors:
        raise ValueError("`judge` judges the student's episodes: let the student act (rollout.source)")
    if not judge.ask and not proposes:
        raise ValueError("judge.ask is empty: ask for score, verdict, or both, or let a correction propose")
    if len(set(judge.ask)) < len(judge.ask):
        raise ValueError("judge.ask names something twice")
    for place, answer in uses.items():
        if answer not in judge.ask:
            raise ValueError(f"{place} needs the judge's {answer}: add it to judge.ask")
    for name, part in _reward_parts(config):
        if part.verbal == "action" and judge.per != "action":
            raise ValueError(f"{name}.verbal: action needs `judge.per: action`")
        if part.verbal is not None and rollout.redraws:
            raise ValueError(
                f"{name}.verbal: rollout.redraws looks at rewards before the judge is asked; drop one of them"
            )


def _uses_of_judgements(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The place of each use in the config, and what must be asked for it."""
    extra = config.rollout.demonstrations
    if extra is not None and extra.when == "rejected":
        yield "rollout.demonstrations.when: rejected", "score"
    for name, part in _reward_parts(config):
        if part.verbal is not None:
            yield f"{name}.verbal", "score"
    for name, component in config.loss.components.items():
        for weight in weights_of(component):
            if isinstance(weight, VerbalScore | VerdictWeight):
                answer = "score" if isinstance(weight, VerbalScore) else "verdict"
                yield f"loss.components.{name}: a weight {weight.kind}", answer


def _reward_parts(config: RunConfig) -> Iterator[tuple[str, RewardPart]]:
    for name, component in config.loss.components.items():
        if isinstance(component, Policy):
            for part, settings in component.rewards.items():
                yield f"loss.components.{name}.rewards.{part}", settings


def _caches_fit(config: RunConfig) -> None:
    for name, teacher in _teachers(config):
        if isinstance(teacher, Cached) and config.rollout.actors:
            raise ValueError(
                f"{name}.kind: cached holds what was said of episodes that do not change: take"
                " rollout.source: {trajectories: FILE} or {dataset: PATH}, or a live teacher"
            )


def _servers_fit(config: RunConfig) -> None:
    """What needs a model's every next token in this process is not to be had from a server."""
    sampled = isinstance(config.sampler, VllmSampling)
    if sampled and config.rollout.teacher_share:
        raise ValueError(
            "rollout.teacher_share reads every token's distribution as it is written: take sampler.kind:"
            " transformers"
        )
    acts = _teacher_acts(config) or config.correction is not None
    taught = acts and any(isinstance(t, Vllm) for place, t in _teachers(config) if _is_teacher(place))
    if config.chat.thinking_budget and (sampled or taught):
        raise ValueError(
            "chat.thinking_budget closes a thought as it is written, which vLLM cannot do token by token:"
            f" take {'sampler.kind: transformers' if sampled else 'teacher.kind: local'}, or leave it out"
        )
