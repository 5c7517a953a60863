"""What the sections of a run must agree on: each check raises ValueError with the keys and the remedy."""

from __future__ import annotations

from opd_agents.config.base import always_zero
from opd_agents.config.fits_teachers import check_teachers
from opd_agents.config.loss import Component, Distill, Policy, Preference
from opd_agents.config.needs import reward_parts, selects_of, weights_of
from opd_agents.config.sections import EVALUATION_METRICS, Recorded, Trajectories
from opd_agents.config.stage import Stage
from opd_agents.config.teachers import Api
from opd_agents.config.weights import ActionAgreement, GroupFailed, PassRate, Perplexity
from opd_agents.types import Actor


def check_stage(config: Stage) -> None:
    """What its sections must agree on."""
    check_teachers(config)
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
    _sources_fit(config)
    _selects_fit(config)
    _estimates_fit(config)
    _groups_fit(config)
    _alternatives_fit(config)
    _correction_fits(config)
    _curriculum_fits(config)
    _ends_are_measured(config)


def _always_zero(component: Component) -> bool:
    if isinstance(component, Policy) and not always_zero(component.coef):
        references = [part.coef for part in component.references.values()]
        return all(map(always_zero, references + [part.coef for part in component.rewards.values()]))
    return always_zero(component.coef)


def _sources_fit(config: Stage) -> None:
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
    if rollout.beginning and (rollout.source != "student" or rollout.teacher_share):
        raise ValueError(
            "rollout.beginning is somebody's before the student's turns: take rollout.source: student,"
            " without rollout.teacher_share"
        )
    if recorded:
        _recordings_fit(config)
    if isinstance(rollout.source, Trajectories):
        _trajectories_fit(config)


def _recordings_fit(config: Stage) -> None:
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


def _trajectories_fit(config: Stage) -> None:
    rollout = config.rollout
    if config.correction or rollout.demonstrations:
        raise ValueError(
            "rollout.source.trajectories: episodes that are over are neither corrected nor given"
            " demonstrations"
        )
    if rollout.group_size > 1:
        raise ValueError("rollout.source.trajectories: the episodes are of no group; group_size must be 1")


def _selects_fit(config: Stage) -> None:
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
        proposer = config.correction.propose.by
        actors |= {"student", "teacher" if proposer == "judge" else proposer, config.correction.resumes}
        sources |= {"correction", "practice"} if config.correction.practice else {"correction"}
    for name, component in config.loss.components.items():
        for select in selects_of(component):
            for key, chosen, known in (("actor", select.actor, actors), ("source", select.source, sources)):
                if chosen is not None and chosen not in known:
                    raise ValueError(
                        f"loss.components.{name}: {key} `{chosen}` would select nothing: this run has"
                        f" {', '.join(sorted(known))} (rollout.source, rollout.demonstrations,"
                        " rollout.alternatives, correction)"
                    )


def _estimates_fit(config: Stage) -> None:
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


def _groups_fit(config: Stage) -> None:
    rollout, components = config.rollout, config.loss.components.values()
    policies = [c for c in components if isinstance(c, Policy)]
    parts = [part for component in policies for part in component.rewards.values()]
    compared = any(part.baseline != "none" for part in parts)
    extra = rollout.demonstrations
    practises = config.correction is not None and config.correction.practice is not None
    if compared and rollout.group_size < 2 and not (practises or (extra and extra.when == "always")):
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
    if extra and extra.when != "always" and "student" not in rollout.actors:
        raise ValueError(f"rollout.demonstrations.when: {extra.when} looks at the student's episodes")
    if any(isinstance(c, Distill) and c.ratio_clip and rollout.source == "expert" for c in components):
        raise ValueError("`ratio_clip` clips ratios to sampling log-probs: the expert's actions have none")


def _alternatives_fit(config: Stage) -> None:
    extra, components = config.rollout.alternatives, config.loss.components
    for name, component in components.items():
        if extra is None and any(isinstance(weight, ActionAgreement) for weight in weights_of(component)):
            raise ValueError(
                f"loss.components.{name}: a weight agreement compares with `rollout.alternatives`; give some"
            )
    if extra is None:
        return
    if "student" not in config.rollout.actors:
        raise ValueError("rollout.alternatives are of the student's states: let the student act")
    cold = isinstance(config.teacher, Api) and config.teacher.temperature == 0
    if extra.actor == "teacher" and extra.samples > 1 and cold:
        raise ValueError(
            "rollout.alternatives.samples: at teacher.temperature 0 a state has one answer; give it another"
        )
    paired = any(isinstance(one, Preference) and one.pairs == "actions" for one in components.values())
    if paired and extra.actor == "student" and extra.preferred_by == "actor":
        raise ValueError(
            "rollout.alternatives: what the student does once more is no better than what it did: say"
            " `preferred_by: judge`, or leave out the `preference` with `pairs: actions`"
        )
    if extra.preferred_by == "judge":
        if not paired:
            raise ValueError(
                "rollout.alternatives.preferred_by: judge orders pairs, which only a `preference` with"
                " `pairs: actions` looks at: add one, or leave it out"
            )
        if seen := [name for name, one in components.items() if one.select.source == "alternative"]:
            raise ValueError(
                f"loss.components.{seen[0]}: source `alternative` has actions that the judge finds worse,"
                " too: leave it to a `preference`, or leave out rollout.alternatives.preferred_by"
            )


def _correction_fits(config: Stage) -> None:
    correction, components = config.correction, config.loss.components
    practises = correction is not None and correction.practice is not None
    for name, part in reward_parts(components):
        if part.key_step and not practises:
            raise ValueError(
                f"{name}.key_step is of the rollouts from states before accepted repairs: say how many, such"
                " as `correction: {practice: 8}`"
            )
        if part.key_step == "value" and correction and correction.resumes == "teacher":
            raise ValueError(
                f"{name}.key_step: value is the student's success after the repair, but correction.resumes:"
                " teacher; take `match`, or let the student resume"
            )
    paid = any(part.key_step for _, part in reward_parts(components))
    if correction is not None and correction.key_by == "judge" and not paid:
        raise ValueError(
            "correction.key_by: judge pays for what no reward looks at: give a `policy` a reward with"
            " `key_step`, or leave it out"
        )
    if correction is not None and correction.kept:
        for name, component in components.items():
            if isinstance(component, Policy) and component.mismatch:
                raise ValueError(
                    f"loss.components.{name}.mismatch compares the sampler with the trainer at the weights"
                    " that sampled, which correction.kept has outlived; leave one of the two out"
                )
    sources = {select.source for one in components.values() for select in selects_of(one)}
    if practises and not sources & {None, "practice"}:
        raise ValueError(
            "correction.practice: no loss component learns from these rollouts; select `source: practice`, or"
            " leave out `select.source`"
        )


def _curriculum_fits(config: Stage) -> None:
    rollout, settings = config.rollout, config.rollout.curriculum
    if settings is None:
        return
    if rollout.actors != {"student"} or rollout.teacher_share:
        raise ValueError(
            "rollout.curriculum goes by what the student can do alone: it needs rollout.source: student, and"
            " neither rollout.teacher_share nor rollout.beginning"
        )
    if settings.next_level is not None and len(config.environments) < 2:
        raise ValueError(
            "rollout.curriculum.next_level: the `environments` are the levels, from the easiest on, and there"
            " is only one; give more, such as the same id with other `options`"
        )


def _ends_are_measured(config: Stage) -> None:
    for one in config.trainer.until:
        if one.metric.startswith("eval/") and (
            config.evaluation is None or one.metric not in EVALUATION_METRICS
        ):
            raise ValueError(
                f"trainer.until: {one.metric} is never measured: a section `evaluation` gives"
                f" {', '.join(EVALUATION_METRICS)}"
            )
