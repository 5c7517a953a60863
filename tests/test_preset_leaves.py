"""Nothing in a shipped method is decoration: whatever one changes in its YAML changes what a run does.

The leaves are found in the files, other values in the config's own types. A tiny run is played and scored,
the loss and its gradient taken a third of the way and near its end; a leaf counts if it changes a trajectory,
a loss or a gradient, or if no other value is accepted beside the rest of the preset.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import yaml
from engine import engine
from judging import Answers

from opd_agents import envs
from opd_agents.config import (
    Component,
    RunConfig,
    Schedule,
    Section,
    Weight,
    list_methods,
    load_config,
    merge,
    method_text,
    reference_needs,
)
from opd_agents.correction import Repair
from opd_agents.errors import ConfigError
from opd_agents.experience import Experience, score, with_likeness
from opd_agents.judging import (
    Compared,
    Judged,
    Practised,
    judge_corrections,
    judge_episodes,
    judge_key_steps,
)
from opd_agents.playing import play_step
from opd_agents.repairing import with_repairs
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.teaching import settings_of
from opd_agents.trainer import source_play
from opd_agents.types import Actor, Trajectory

Place = tuple[str | int, ...]

SMALL: dict[Place, Any] = {  # numbers of the presets that a run of two short turns never comes near
    ("rollout", "episodes_per_step"): 24,
    ("rollout", "group_size"): 3,
    ("rollout", "max_action_tokens", "start"): 4,
    ("rollout", "max_action_tokens", "end"): 12,
    ("rollout", "max_turns", "end"): 2.6,
    ("rollout", "alternatives", "states"): 16,
    ("rollout", "beginning", "left", "end"): 2.6,
    ("correction", "practice"): 3,
    ("correction", "token_share"): 0.8,
    ("teacher", "every"): 1,
    ("teacher", "debate", "max_tokens"): 4,
}
# Keys to which the rest of a preset may leave no other value: that is refused, and not without effect.
BOUND = {
    *("source", "actor", "kind", "weights", "sources", "reference", "trrd_reference", "both_kl_legs"),
    *("divergence", "tail", "ratio", "mismatch", "clip_low", "clip_high", "denominator", "form", "when"),
    *("discriminator", "audit", "per", "by", "where", "resumes", "rollouts", "baseline", "normalise"),
}
# What only a task with two errors in an episode, a second step, more tokens than are repaired here, a student
# that sometimes does what the repair does, or a judge that is a model would show: tried in test_practice.py,
# test_correction.py, test_kept.py, test_judge_runs.py and, as a preset that is another's twin,
# test_presets_corrections.py.
ELSEWHERE: set[Place] = {("correction", key) for key in ("repairs", "prefix_weight", "token_share", "kept")}
ELSEWHERE |= {("loss", "components", "rl", "rewards", "key_step", "normalise"), ("judge", "by")}
TWIN = "student_retry"
LONGER = ("turn_divergence", "belief_revision")  # weights to which two turns are like any other two
EASILY = {"verify": {"rollouts": [2], "rivals": ["own"], "accept": 0.6}, "audit": None}
STEPS = 10  # of which three are over: a third of the way, where a line and a cosine are apart
WORD = "yes"  # one token of the student's


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*place, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*place, index))
    else:
        yield place, value


def shipped(method: str) -> dict[str, Any]:
    """A preset's own config, its numbers those of a tiny run."""
    own: dict[str, Any] = yaml.safe_load(method_text(method))["config"]
    for place, _ in [*leaves(own)]:
        if place in SMALL and own["rollout"].get("group_size") != 1:
            own = changed(own, place, SMALL[place])
    return own


def changed(own: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(own)
    parent: Any = result
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return result


LEAVES = [
    (row["name"], place)
    for row in list_methods()
    if row["name"] != TWIN
    for place, _ in leaves(shipped(row["name"]))
    if place not in ELSEWHERE
]


# ---- other values ----


def variants(own: dict[str, Any], config: RunConfig, place: Place) -> Iterator[dict[str, Any]]:
    """The preset with another value in this place. Another kind takes with it what it does not know."""
    section: Any = config
    given: Any = own
    for key in place[:-1]:
        section = vars(section)[str(key)] if isinstance(section, Section) else section[key]
        given = given[key]
    if kinds := [kinds for kinds in KINDS if type(section) in kinds.values() and place[-1] == "kind"]:
        for kind, other in kinds[0].items():
            if kind != given["kind"]:
                known = {key: value for key, value in given.items() if key in other.model_fields}
                yield changed(own, place[:-1], known | {"kind": kind})
        return
    name = str(place[-1])
    annotation = type(section).model_fields[name].annotation if isinstance(section, Section) else None
    models = [*settings_of(config), "student"]
    for value in others(given[place[-1]], choices(annotation), models):
        yield changed(own, place, value)


def kinds_of(union: Any) -> dict[str, type[Section]]:
    """The sections of a union by their kinds."""
    sections = typing.get_args(typing.get_args(union)[0])
    return {kind: one for one in sections for kind in choices(one.model_fields["kind"].annotation)}


def others(value: Any, words: list[str], models: list[str]) -> list[Any]:
    """Values to take instead: ``words`` are those that the key allows, ``models`` the run's by name."""
    match value:
        case bool():
            return [not value]
        case int():
            return [number for number in (1, 2, 3) if number != value]
        case float():
            return [value / 2, value * 2] if value else [0.5]
        case None:
            return [0.5]
        case dict():  # an empty section
            return [{"coef": 0.5}]
        case list():
            known = [word for word in words if word not in value] or [WORD]
            return [value[:-1]] * (len(value) > 1) + [[item] for item in known] + [[known[0], *value]]
        case str():
            return [word for word in words or [*models, f"{WORD} {value}"] if word != value]
    raise AssertionError(f"no other value for {value!r}")


def choices(annotation: Any) -> list[Any]:
    """The words that a type allows."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [word for part in typing.get_args(annotation) for word in choices(part)]


KINDS = [kinds_of(union) for union in (Component, Weight, Schedule)]


# ---- a tiny run ----


class Seen(NamedTuple):
    """What a run has played, and on it the loss and the gradient at two places of the run."""

    actions: list[tuple[Actor, tuple[int, ...]]]
    losses: list[float]
    gradients: list[torch.Tensor]


class Run:
    """Three updates by noise, so that teachers that follow the student are behind it; then one step."""

    def __init__(self, teacher: Path, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder
        self.scored: Callable[[str], tuple[Session, Experience]] = lru_cache(maxsize=1)(self._scored)

    def load(self, own: dict[str, Any]) -> RunConfig:
        raw: dict[str, Any] = tiny.sft(self.folder, method=None, **own)
        episodes = 120 if isinstance(own["rollout"]["source"], dict) else 24  # shares show in many turns
        raw["rollout"] = {"episodes_per_step": episodes, **tiny.LIMITS} | own["rollout"]
        if any(kind in json.dumps(own["loss"]) for kind in LONGER):
            raw["environments"] = [{"id": "tiny/Parity-v0", "options": {"wanted": 3}}]
        raw["student"] = {"build": tiny.BUILD | {"tokenizer": str(self.teacher)}}
        raw["trainer"] |= {"steps": STEPS, "learning_rate": 0.1, "optimizer": "adamw"}
        if "correction" in own:
            raw["correction"] = EASILY | own["correction"]
        if own.get("judge", {}).get("by") == "judge":
            endpoint = {"base_url": "http://127.0.0.1:9/v1", "key": None}
            raw["references"] = {"judge": {"kind": "api", "model": "none", "endpoint": endpoint}}
        if "teacher" in own:
            raw["teacher"] = merge(own["teacher"], tiny.members(own, *[str(self.teacher)] * 2))
        return load_config({"teacher": {"model": str(self.teacher)}} | raw)

    def _scored(self, own: str) -> tuple[Session, Experience]:
        config = self.load(json.loads(own))
        session = load_session(config, RunFolder(self.folder, {}, resume=True))
        random = torch.Generator().manual_seed(4)  # some groups fail
        for _ in range(3):
            for parameter in session.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random)
            session.optimizer_step()
            session.advance(0, 0)
        play = partial(rollout, make=envs.make, chat=session.chat, limits=session.limits, temperature=1.0)
        played = play_step(
            config, session.step, session.task_counts, source_play(session, play),
            partial(play, policy=session.demonstrator), judge=partial(judged, config),
        )  # fmt: skip
        if session.discriminator is not None:  # one that has an opinion
            torch.nn.init.normal_(session.discriminator.reader.direction, generator=random)
        otherwise = session.alternatives(played.trajectories)
        agreement = {place: n % 3 / 2 for n, place in enumerate(otherwise.agreement)}  # noise agrees nowhere
        trajectories = [*played.trajectories, *otherwise.trajectories]
        scored = score(session, trajectories, played.judged.feedback, agreement)
        session.judge_errors = partial(mended, config)  # type: ignore[method-assign]
        session.judge_key_steps = partial(keyed, config)  # type: ignore[method-assign]
        experience = with_likeness(session, with_repairs(session, scored))
        packed = experience.packed  # recorded log-probs as of a sampler that rounds, and of weights long past
        noise = torch.randn(len(packed.behaviour), generator=random)
        packed = dataclasses.replace(packed, behaviour=(packed.behaviour + noise).clamp(max=0.0))
        return session, dataclasses.replace(experience, packed=packed)

    def seen(self, own: dict[str, Any], shipped: dict[str, Any]) -> Seen:
        """What is played as ``shipped`` need not be played again where only the loss is another."""
        components = self.load(own).loss.components
        needed = [reference_needs(one.loss.components).keys() for one in (self.load(own), self.load(shipped))]
        again = without_loss(own) != without_loss(shipped) or needed[0] > needed[1]
        session, experience = self.scored(json.dumps(own if again else shipped))
        at = [
            engine(
                session.model, experience, components, chat=session.chat, progress=progress, temperature=1.0
            )
            for progress in (session.progress, 0.9)
        ]
        actions = [(turn.actor, turn.action_ids) for t in experience.trajectories for turn in t.turns]
        return Seen(actions, [loss for loss, _ in at], [gradient for _, gradient in at])


def judged(config: RunConfig, trajectories: Sequence[Trajectory]) -> Judged:
    """By a judge who counts letters."""
    if (settings := config.judge) is None:
        return Judged()

    def answer(episode: dict[str, Any]) -> Any:
        def said(text: str) -> dict[str, Any]:
            size = len(text) + len(settings.ask)  # who is asked for more may answer otherwise
            given = {"score": size % 10, "verdict": ("skip", "weak", "strong")[size % 3]}
            given["hint"] = " ".join([WORD] * (size % 3))
            return {"reason": ""} | {key: given[key] for key in settings.ask}

        items = [{"number": one["number"]} | said(one["action"]) for one in episode["actions"]]
        return said(str(episode)) | {"actions": items}

    return judge_episodes(Answers(answer), settings, trajectories, lambda one: (), (0, 3))


def mended(config: RunConfig, failed: Sequence[Trajectory]) -> Judged:
    """By a judge who finds the first answer wrong, and knows a better one by the letters of all."""
    assert config.judge is not None

    def answer(episode: dict[str, Any]) -> Any:
        size = len(str(episode)) + len(config.judge.ask if config.judge else ())
        return {"number": 1, "reason": "", "replacement": ("Say.", "Say", "Say.Say.")[size % 3]}

    return judge_corrections(Answers(answer), config.judge, failed, lambda one: ())


def keyed(config: RunConfig, repairs: Sequence[Repair]) -> Compared:
    """By a judge who tells actions apart by their letters."""
    assert config.judge is not None

    def answer(asked: dict[str, Any]) -> Any:
        return {"reason": "", "amounts_to": ("first", "second", "neither")[len(asked["taken"]) % 3]}

    cases = [Practised(one.parent, one.turn, one.teacher_action, one.practised) for one in repairs]
    return judge_key_steps(Answers(answer), config.judge, cases, lambda one: ())


def without_loss(own: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if key != "loss"}


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tiny_teacher, tmp_path_factory.mktemp("leaves"))


@pytest.fixture(scope="module")
def as_shipped(run: Run) -> Callable[[str], Seen]:
    return lru_cache(lambda method: run.seen(shipped(method), shipped(method)))


@pytest.mark.parametrize(
    ("method", "place"), [pytest.param(*leaf, id=".".join(map(str, (leaf[0], *leaf[1])))) for leaf in LEAVES]
)
def test_every_leaf_of_a_preset_has_an_effect(
    method: str, place: Place, run: Run, as_shipped: Callable[[str], Seen]
) -> None:
    own, accepted = shipped(method), 0
    for other in variants(own, run.load(own), place):
        try:
            run.load(other)
        except ConfigError:
            continue
        accepted += 1
        if differ(as_shipped(method), run.seen(other, own)):
            return

    assert not accepted, f"none of {accepted} other values does anything else"
    assert place[-1] in BOUND, "no other value is accepted"


def differ(one: Seen, other: Seen) -> bool:
    """Beyond rounding."""
    if one.actions != other.actions:
        return True
    assert any(float(gradient.norm()) > 1e-6 for gradient in one.gradients)
    return one.losses != pytest.approx(other.losses, rel=1e-5, abs=1e-9) or any(
        float((before - after).norm()) > 1e-5 * float(before.norm())
        for before, after in zip(one.gradients, other.gradients, strict=True)
    )
