"""The presets for agents of many turns, from their YAML to loss and gradient, against the formulas of their
papers, written out in float64; what each becomes at its ends; and whose horizon grows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine import T, assert_same, component, config_of, engine, log_probs, preset
from rewarded import Rewarded, Seen, mean, surrogate, turns_of_both
from rolling import LIMITS, Scripted, desk_episodes, rolled, sampler
from torch import Tensor

from opd_agents import envs
from opd_agents.config import load_config
from opd_agents.episode import Episode
from opd_agents.playing import play_behind
from opd_agents.policies import ExpertPolicy, Policy
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder
from opd_agents.schedules import Clock, value_at
from opd_agents.starting import load_session
from opd_agents.trainer import train
from opd_agents.types import Actor, Branch, Outcome, Trajectory

CLOSE = '{"name":"close_ticket","arguments":{}}'
Parts = Callable[[Rewarded, Seen], Tensor]


def by_turn(s: Seen, weights: Callable[[list[Tensor]], Sequence[Tensor | float]], values: Tensor) -> Tensor:
    """[N]: of each episode what ``weights`` makes of the values of its turns, one number a turn."""
    result = torch.zeros(len(s.packed.target), dtype=torch.float64)
    for episode in range(len(s.trajectories)):
        turns = [number for number, (own, _) in enumerate(s.packed.turns) if own == episode]
        given = weights([values[s.packed.turn == number] for number in turns])
        for number, weight in zip(turns, given, strict=True):
            result[s.packed.turn == number] = float(weight)
    return result


def published(d: list[Tensor]) -> list[float]:
    """w_1 = 1, w_k = min(prod_(u < k) D_u / D_(u+1), 1.2)."""
    gaps = [float(one.abs().mean()) for one in d]
    products = [math.prod(gaps[u] / gaps[u + 1] for u in range(k)) for k in range(len(gaps))]
    return [1.0, *(min(product, 1.2) for product in products[1:])]


def sod(rewarded: Rewarded, s: Seen) -> Tensor:
    weight = by_turn(s, published, s.d)
    assert bool((weight == 1.2).any()) and bool((weight < 1).any())
    return s.verified + weight * s.d


def scaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


def atod(progress: float) -> Parts:
    def advantage(rewarded: Rewarded, s: Seen) -> Tensor:
        log_q = log_probs(rewarded.past, s.packed).detach()
        entropy = -(log_q.exp() * log_q).sum(-1)
        a, b = (
            scaled(by_turn(s, lambda turns: [one.mean() for one in turns], x)) for x in (s.d.abs(), entropy)
        )
        return (1 - progress) * (1 - (1 - a) * (1 - b)) * s.d + progress * s.verified

    return advantage


def agent_opsd(rewarded: Rewarded, s: Seen) -> Tensor:
    won = [[t.success for t in s.trajectories if t.group == one.group] for one in s.trajectories]
    signs = [float(s.verified[s.packed.episode == e][0].sign()) for e in range(len(s.trajectories))]
    following = iter(zip(won, signs, strict=True))

    def multipliers(d: list[Tensor]) -> list[float]:
        group, sign = next(following)
        start = min(max(sum(group) / len(group), 0.01), 0.99)
        beliefs, evidence = [start], 0.0
        for one in d:
            evidence = 0.95 * evidence + float(one.sum())
            beliefs.append(1 / (1 + (1 - start) / start * math.exp(-evidence)))
        revised = [sign * (after - before) for before, after in pairwise(beliefs)]
        spread = (sum((one - mean(revised)) ** 2 for one in revised) / len(revised)) ** 0.5
        z = [(one - mean(revised)) / spread if spread else 0.0 for one in revised]
        return [0.5 + 0.5 * min(max(1 + 0.2 * one, 0.8), 1.2) for one in z]

    multiplier = by_turn(s, multipliers, s.d)
    assert 0.9 <= float(multiplier.min()) < 1 < float(multiplier.max()) <= 1.1
    return s.verified * multiplier


# Preset, progress of the run, its advantage, its upper clip.
METHODS: list[tuple[str, float, Parts, float]] = [
    ("sod", 0.0, sod, 0.28),
    ("atod", 0.0, atod(0.0), 0.2),
    ("atod", 0.25, atod(0.25), 0.2),
    ("agent_opsd", 0.0, agent_opsd, 0.24),
]


@pytest.mark.parametrize(("method", "progress", "advantage", "high"), METHODS)
def test_a_preset_is_its_clipped_surrogate(
    method: str, progress: float, advantage: Parts, high: float, rewarded: Rewarded
) -> None:
    """Over the student's own episodes, whatever else is in the batch."""
    s = rewarded.seen(rewarded.episodes)
    expected = rewarded.plain(surrogate(s.r, advantage(rewarded, s), high=high).mean())
    batch = [*rewarded.episodes, rewarded.repaired, rewarded.shown]
    assert_same(rewarded.trained(preset(method), batch, progress=progress), expected, rtol=1e-5)


def test_sdar_is_grpo_and_a_gate_on_the_likelihood(rewarded: Rewarded) -> None:
    """0.01 sigma(5 d) (log p - log q), the gate detached: of which log p is not in the loss."""
    s = rewarded.seen(rewarded.episodes)
    gate = 0.01 * (5 * s.d).sigmoid()
    loss = (surrogate(s.r, s.verified) + gate * (s.teacher - s.new)).mean()
    expected = rewarded.plain(loss)
    batch = [*rewarded.episodes, rewarded.repaired, rewarded.shown]
    value, gradient = rewarded.trained(preset("sdar"), batch)
    assert_same((value + float((gate * s.teacher).mean()), gradient), expected, rtol=1e-5)


# ---- ends ----

JOINT = "loss.components.joint"
ENDS = [
    ("sod", [f"{JOINT}.references.teacher.coef=0"], 0.0, "grpo", ["loss.components.grpo.clip_high=0.28"]),
    ("atod", [], 1.0, "grpo", []),
    ("atod", [f"{JOINT}.references.teacher.gates=[]"], 0.0, "fast_opd", []),
    ("sdar", ["loss.components.endorsed.coef=0"], 0.0, "grpo", []),
    ("agent_opsd", [f"{JOINT}.rewards.verifier.gates=[]", f"{JOINT}.clip_high=0.2"], 0.0, "grpo", []),
]


@pytest.mark.parametrize(("method", "changed", "progress", "parent", "as_parent"), ENDS)
def test_at_its_end_a_preset_is_its_parent(
    method: str, changed: list[str], progress: float, parent: str, as_parent: list[str], rewarded: Rewarded
) -> None:
    ours, theirs = (
        rewarded.trained(config_of(name, *overrides).loss.components, rewarded.episodes, progress=progress)
        for name, overrides in ((method, changed), (parent, as_parent))
    )
    assert_same(ours, theirs)


def test_in_episodes_of_one_turn_sod_is_kdrl_and_agent_opsd_is_grpo(rewarded: Rewarded) -> None:
    short = [dataclasses.replace(t, turns=t.turns[:1]) for t in rewarded.episodes]
    high = f"{JOINT}.clip_high=0.2"
    for method, parent, changed in (
        ("sod", "kdrl", [f"{JOINT}.references.teacher.coef=1.0"]),
        ("agent_opsd", "grpo", []),
    ):
        ours, theirs = (
            rewarded.trained(config_of(name, *overrides).loss.components, short)
            for name, overrides in ((method, [high]), (parent, changed))
        )
        assert_same(ours, theirs)


# ---- DAgger ----


def corrected(parent: Trajectory, number: int, ids: tuple[int, ...]) -> Trajectory:
    """What the teacher would have done at a turn of the student's."""
    before = tuple(dataclasses.replace(turn, weight=0.0) for turn in parent.turns[:number])
    other = dataclasses.replace(
        parent.turns[number], action_ids=ids, actor=Actor.TEACHER, logprobs=None, spans=()
    )
    return dataclasses.replace(
        parent, uid=f"{parent.uid}-other{number}", turns=(*before, other), outcome=Outcome.UNFINISHED,
        group="", branch=Branch(parent.uid, number, tried=False),
    )  # fmt: skip


def test_dagger_sums_the_likelihood_of_what_the_teacher_does_at_every_state(rewarded: Rewarded) -> None:
    """Of its own turns; of the student's where it does the same; else of its action instead."""
    played = turns_of_both(rewarded)
    states = [(t, number) for t in played for number in range(0, len(t.turns), 2)]
    agreement = {(t.uid, number): float(place % 3 == 0) for place, (t, number) in enumerate(states)}
    others = [
        corrected(t, number, (*t.turns[number].action_ids[::-1], 7))
        for t, number in states
        if not agreement[t.uid, number]
    ]
    batch = [*played, *others]
    s, labels = rewarded.seen(batch), 0
    total = torch.zeros((), dtype=torch.float64)
    for number, (episode, place) in enumerate(s.packed.turns):
        t = batch[episode]
        label = agreement.get((t.uid, place), 1.0) if t.branch is None else t.turns[place].weight
        total = total - label * s.new[s.packed.turn == number].sum()
        labels += int(label)
    assert labels == sum(len(t.turns) for t in played)  # one for every state
    experience = dataclasses.replace(rewarded.experience(batch), agreement=agreement)
    ours = engine(rewarded.model, experience, preset("dagger"))
    assert_same(ours, rewarded.plain(total / 16384))


def test_dagger_begins_as_sft_on_the_teachers_episodes(rewarded: Rewarded) -> None:
    theirs = [
        dataclasses.replace(t, turns=tuple(dataclasses.replace(one, actor=Actor.TEACHER) for one in t.turns))
        for t in rewarded.episodes
    ]
    share = len(rewarded.seen(theirs).new) / 16384
    value, gradient = rewarded.trained(preset("dagger"), theirs)
    assert_same((value / share, gradient / share), rewarded.trained(preset("sft"), theirs))
    source = config_of("dagger").rollout.source
    assert isinstance(source, dict)
    for progress in (0.0, 0.25, 1.0):
        shares = {name: value_at(one, Clock(progress, {})) for name, one in source.items()}
        assert shares == {"teacher": 1 - progress, "student": progress}


# ---- TCOD ----


def test_tcod_stops_playing_where_a_prefix_of_turns_would_only_mask(
    rewarded: Rewarded, desk_chat: Any
) -> None:
    """On the same draws the loss of episodes of two turns is that of the first two turns of whole ones."""
    policy = sampler(rewarded.student, desk_chat, temperature=T)
    play = partial(rolled, desk_episodes(4, max_turns=4), policy, desk_chat, temperature=T)
    whole, cut = play(), play(limits=dataclasses.replace(LIMITS, max_turns=2))
    assert max(len(t.turns) for t in cut) == 2 < max(len(t.turns) for t in whole)
    assert all(t.outcome is Outcome.UNFINISHED for t in cut if t.exhausted == "turns")
    s = rewarded.seen(cut)
    ours = rewarded.trained(preset("tcod"), cut)
    assert_same(ours, rewarded.plain(surrogate(s.r, s.d).mean()), rtol=1e-5)
    masked = component(
        kind="policy", references={"teacher": {}}, weights=[{"kind": "prefix", "turns": 2}],
        denominator="selected",
    )  # fmt: skip
    assert_same(rewarded.trained({"distill": masked}, whole), ours, rtol=1e-5)


def test_tcods_horizon_grows(tmp_path: Path, tiny_teacher: Path) -> None:
    most = config_of("tcod").rollout.max_turns
    assert most is not None
    assert [value_at(most, Clock(at, {})) for at in (0.0, 0.25, 0.5, 1.0)] == [1, 15.5, 30, 30]
    raw = tiny.sft(tmp_path / "run", method="tcod", teacher={"model": str(tiny_teacher)})
    raw["student"] = {"build": tiny.BUILD | {"tokenizer": str(tiny_teacher)}}
    raw["rollout"] = {"episodes_per_step": 4, "max_turns": {"end": 2.6}} | tiny.LIMITS
    session = load_session(load_config(raw | {"trainer": {"steps": 8}}), RunFolder(tmp_path, {}, resume=True))
    seen = []
    for step in range(8):
        session.step = step
        trajectories = rollout(
            desk_like(session.step), session.behaviour, make=envs.make, chat=session.chat,
            limits=session.limits, temperature=1.0,
        )  # fmt: skip
        seen.append((session.limits.max_turns, max(len(t.turns) for t in trajectories)))
    assert seen == [(1, 1)] * 3 + [(2, 2)] * 5


def test_the_expert_plays_all_but_the_turns_that_are_left(desk_chat: Any) -> None:
    expert, student = ExpertPolicy(), Scripted(lambda history: CLOSE)
    episodes = desk_episodes(6, group_size=3, timeout_rate=0.0)

    def play(episodes: Sequence[Episode], policy: Policy) -> list[Trajectory]:
        return rolled(episodes, policy)

    alone = play(episodes, policy=expert)
    for left in (1, 2, 3):
        for one, whole in zip(
            play_behind(episodes, expert, student, left=left, play=play), alone, strict=True
        ):
            begun = len(whole.turns) - left
            assert [t.actor for t in one.turns] == [Actor.EXPERT] * begun + [Actor.STUDENT]
            assert [t.action for t in one.turns[:begun]] == [t.action for t in whole.turns[:begun]]
            assert (one.uid, one.group, one.success) == (whole.uid, whole.group, left == 1)  # it closes, too
    everything: list[Trajectory] = play_behind(episodes, expert, student, left=99, play=play)
    assert everything == play(episodes, policy=student)
    hopeless = Scripted(lambda history: CLOSE, Actor.TEACHER)
    assert (
        play_behind(episodes, hopeless, expert, left=1, play=play) == alone
    )  # who fails alone begins nothing


def test_behind_a_beginning_the_students_turns_alone_are_learned_from(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    raw = tiny.sft(tmp_path / "run", method="tcod_backward", teacher={"model": str(tiny_teacher)})
    raw["student"] = {"build": tiny.BUILD | {"tokenizer": str(tiny_teacher)}}
    raw["rollout"] = {"episodes_per_step": 4, "beginning": {"left": {"end": 1}}} | tiny.LIMITS
    config = load_config(raw | {"trainer": {"steps": 1}})
    assert config.loss.components["distill"].select.actor is Actor.STUDENT
    run = train(config, probes=False)
    for line in map(json.loads, (run / "trajectories" / "step-000001.jsonl").read_text().splitlines()):
        actors = [turn["actor"] for turn in line["trajectory"]["turns"]]
        assert actors[-1] == "student" and "expert" in actors[:-1]


def desk_like(step: int) -> list[Any]:
    """Two episodes of two turns."""
    return [
        dataclasses.replace(one, env_id="tiny/Parity-v0", env_kwargs={}, stream=(5, step, index))
        for index, one in enumerate(desk_episodes(2))
    ]
