"""Teachers, judges and servers within a run: each check raises ValueError with the keys and the remedy."""

from __future__ import annotations

from collections.abc import Iterator

from opd_agents.config.needs import reference_needs, reward_parts, weights_of
from opd_agents.config.serving import VllmSampling
from opd_agents.config.stage import Stage
from opd_agents.config.teachers import (
    Cached,
    Local,
    Teacher,
    Vllm,
    conditioning_of,
    is_aligned,
    sections_in,
)
from opd_agents.config.weights import VerbalScore, VerdictWeight


def check_teachers(config: Stage) -> None:
    """Who teaches, judges and samples: what the sections say of them must agree with the rest."""
    _models_given(config)
    _references_given(config)
    _conditioning_fits(config)
    _alignment_fits(config)
    _judge_fits(config)
    _discriminator_fits(config)
    _caches_fit(config)
    _servers_fit(config)


def _models_given(config: Stage) -> None:
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


def _references_given(config: Stage) -> None:
    if reserved := {"teacher", "student"} & config.references.keys():
        raise ValueError(f"references.{min(reserved)}: the name is taken; call it otherwise")
    wanted = reference_needs(config.loss.components).keys()
    propose = config.correction.propose if config.correction else None
    proposes = propose is not None and (propose.by == "teacher" or propose.scored)
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


def _conditioning_fits(config: Stage) -> None:
    for place, teacher in _teachers(config):
        conditioning = conditioning_of(teacher)
        sources = set(conditioning.sources if conditioning else ())
        if "peer" in sources and config.rollout.group_size < 2:
            raise ValueError("conditioning.sources: peer is of a group: rollout.group_size must be >= 2")
        acts = _is_teacher(place) and _teacher_acts(config)
        if acts and sources and not sources & {"text", "expert"}:
            raise ValueError(
                "a teacher that acts knows neither peers, feedback nor hindsight of an episode to come: its"
                " conditioning.sources need `text` or `expert`"
            )


def _alignment_fits(config: Stage) -> None:
    """What a teacher with another tokenizer can be compared in."""
    for place, teacher in _teachers(config):
        if not is_aligned(teacher):
            continue
        if conditioning_of(teacher) is not None:
            raise ValueError(f"{place}.align: it sees the student's conversation alone; drop `conditioning`")
        if config.chat.history == "template":
            raise ValueError(
                f"{place}.align: where each template renders past turns anew, the two see different"
                " histories: take chat.history: append"
            )
        if config.rollout.temperature != 1:
            raise ValueError(
                f"{place}.align: a span is other tokens to the teacher, and distributions of different tokens"
                " compare at temperature 1 alone: take rollout.temperature: 1"
            )


def _judge_fits(config: Stage) -> None:
    """What is made of judgements is asked for."""
    judge, rollout, correction = config.judge, config.rollout, config.correction
    proposes = correction is not None and correction.propose.by == "judge"
    compares = correction is not None and correction.key_by == "judge"
    prefers = rollout.alternatives is not None and rollout.alternatives.preferred_by == "judge"
    uses = dict(_uses_of_judgements(config))
    if judge is None:
        others = ["correction.propose"] * proposes + ["correction.key_by: judge"] * compares
        others += ["rollout.alternatives.preferred_by"] * prefers
        if needing := [*uses, *others]:
            raise ValueError(f"{needing[0]} needs a judge: give a section `judge`")
        return
    if "student" not in rollout.actors:
        raise ValueError("`judge` judges the student's episodes: let the student act (rollout.source)")
    if not judge.ask and not (proposes or compares or prefers):
        raise ValueError(
            "judge.ask is empty: ask for score, verdict, or both, or let it propose or tell key steps"
            " (`correction`) or prefer (`rollout.alternatives`)"
        )
    if "hint" in judge.ask and judge.per != "episode":
        raise ValueError("judge.ask: a hint is of an episode as a whole; take judge.per: episode")
    if "hint" in judge.ask and "hint" not in uses.values():
        raise ValueError(
            "judge.ask: nobody is told the hint; give a teacher `conditioning: {sources: [hindsight]}`"
        )
    if len(set(judge.ask)) < len(judge.ask):
        raise ValueError("judge.ask names something twice")
    for place, answer in uses.items():
        if answer not in judge.ask:
            raise ValueError(f"{place} needs the judge's {answer}: add it to judge.ask")
    for name, part in reward_parts(config.loss.components):
        if part.verbal == "action" and judge.per != "action":
            raise ValueError(f"{name}.verbal: action needs `judge.per: action`")
        if part.verbal is not None and rollout.redraws:
            raise ValueError(
                f"{name}.verbal: rollout.redraws looks at rewards before the judge is asked; drop one of them"
            )


def _uses_of_judgements(config: Stage) -> Iterator[tuple[str, str]]:
    """The place of each use in the config, and what must be asked for it."""
    extra = config.rollout.demonstrations
    if extra is not None and extra.when == "rejected":
        yield "rollout.demonstrations.when: rejected", "score"
    for name, part in reward_parts(config.loss.components):
        if part.verbal is not None:
            yield f"{name}.verbal", "score"
    for place, teacher in _teachers(config):
        conditioning = conditioning_of(teacher)
        if conditioning is not None and "hindsight" in conditioning.sources:
            yield f"{place}.conditioning.sources: hindsight", "hint"
    for name, component in config.loss.components.items():
        for weight in weights_of(component):
            if isinstance(weight, VerbalScore | VerdictWeight):
                answer = "score" if isinstance(weight, VerbalScore) else "verdict"
                yield f"loss.components.{name}: a weight {weight.kind}", answer


def _discriminator_fits(config: Stage) -> None:
    """It has something to learn from, and somebody wants its scores."""
    uses = [name for name, part in reward_parts(config.loss.components) if part.discriminator]
    if config.discriminator is None:
        if uses:
            raise ValueError(f"{uses[0]}.discriminator needs one: give a section `discriminator: {{}}`")
        return
    if not uses:
        raise ValueError(
            "discriminator: no reward asks for its scores; say `discriminator: true` in one of the `rewards`"
            " of a `policy` component"
        )
    if config.rollout.demonstrations is None:
        raise ValueError(
            "discriminator: there is nothing to compare the student's episodes with; let the teacher play the"
            " same tasks: `rollout.demonstrations: {actor: teacher}`"
        )
    if config.rollout.redraws:
        raise ValueError(
            f"{uses[0]}.discriminator: rollout.redraws looks at rewards before episodes are scored; drop one"
            " of them"
        )


def _caches_fit(config: Stage) -> None:
    for name, teacher in _teachers(config):
        if isinstance(teacher, Cached) and config.rollout.actors:
            raise ValueError(
                f"{name}.kind: cached holds what was said of episodes that do not change: take"
                " rollout.source: {trajectories: FILE} or {dataset: PATH}, or a live teacher"
            )


def _servers_fit(config: Stage) -> None:
    """What needs a model's every next token needs it in this process, and at hand."""
    sampled = isinstance(config.sampler, VllmSampling)
    if sampled and config.rollout.teacher_share:
        raise ValueError(
            "rollout.teacher_share reads every token's distribution as it is written: take sampler.kind:"
            " transformers"
        )
    acts = _teacher_acts(config) or config.correction is not None
    taught = acts and any(isinstance(t, Vllm) for place, t in _teachers(config) if _is_teacher(place))
    if config.rollout.teacher_share and isinstance(config.teacher, Local) and config.teacher.offload:
        raise ValueError(
            "teacher.offload: for rollout.teacher_share its layers would come to the GPU with every token;"
            " drop one of the two"
        )
    if config.chat.thinking_budget and (sampled or taught):
        raise ValueError(
            "chat.thinking_budget closes a thought as it is written, which vLLM cannot do token by token:"
            f" take {'sampler.kind: transformers' if sampled else 'teacher.kind: local'}, or leave it out"
        )


def _teachers(config: Stage) -> Iterator[tuple[str, Teacher]]:
    """Every section of a teacher, also inside another, with its place."""
    for name, teacher in config.references.items():
        yield from sections_in(f"references.{name}", teacher)
    if config.teacher is not None:
        yield from sections_in("teacher", config.teacher)


def _is_teacher(place: str) -> bool:
    """Of the teacher or a part of it."""
    return place.partition(".")[0] == "teacher"


def _teacher_acts(config: Stage) -> bool:
    rollout = config.rollout
    others = [other.actor for other in (rollout.demonstrations, rollout.alternatives) if other is not None]
    others += [config.correction.resumes] if config.correction else []
    return "teacher" in [*rollout.actors, *others]
