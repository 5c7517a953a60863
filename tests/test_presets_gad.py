"""The preset `gad`, from its YAML to loss and gradient: its warm-up and what comes after, beside its parents
and beside the formula in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine import assert_same, config_of, engine, preset
from rewarded import Rewarded, deviation, mean, surrogate

from opd_agents.discriminator import compared, teacher_student_pairs
from opd_agents.experience import Experience

# What a discriminator says of the twelve episodes of the student.
SCORES = [0.3, -1.0, 2.5, 0.0, 4.0, 4.5, 3.0, 4.0, -2.0, 0.5, 0.75, 6.0]


def scored(rewarded: Rewarded, trajectories: Any, extra: float = 50.0) -> Experience:
    known = {t.uid: score for t, score in zip(rewarded.episodes, SCORES, strict=True)}
    likeness = torch.tensor([known.get(t.uid, extra) for t in trajectories])
    return dataclasses.replace(rewarded.experience(trajectories), likeness=likeness)


def gad(rewarded: Rewarded, trajectories: Any, progress: float, extra: float = 50.0) -> tuple[float, Any]:
    experience = scored(rewarded, trajectories, extra)
    return engine(rewarded.model, experience, preset("gad"), progress=progress)


@pytest.mark.parametrize("progress", [0.0, 0.33])
def test_the_warm_up_is_sft_on_the_teachers_episodes(progress: float, rewarded: Rewarded) -> None:
    """Whatever the discriminator says."""
    batch = [*rewarded.episodes, rewarded.shown]
    parent = rewarded.trained(preset("sft"), [rewarded.shown])
    assert_same(gad(rewarded, batch, progress), parent, rtol=1e-5)


@pytest.mark.parametrize(("progress", "of_the_teachers"), [(1 / 3, 50.0), (1.0, -3.0)])
def test_after_it_is_grpo_with_scores_in_the_place_of_rewards(
    progress: float, of_the_teachers: float, rewarded: Rewarded
) -> None:
    """The teacher's episodes are compared with nobody: whatever their score, it changes nothing."""
    s = rewarded.seen(rewarded.episodes)
    groups = [SCORES[start : start + 4] for start in (0, 4, 8)]
    advantages = [(r - mean(group)) / (deviation(group) + 1e-4) for group in groups for r in group]
    expected = rewarded.plain(surrogate(s.r, s.per_token(advantages)).mean())
    ours = gad(rewarded, [*rewarded.episodes, rewarded.shown], progress, of_the_teachers)
    assert_same(ours, expected, rtol=1e-5)
    renamed = [dataclasses.replace(t, reward=r) for t, r in zip(rewarded.episodes, SCORES, strict=True)]
    assert_same(ours, rewarded.trained(preset("grpo"), renamed), rtol=1e-5)


def test_the_preset_is_grpo_with_demonstrations_a_discriminator_and_a_warm_up() -> None:
    own, parent = config_of("gad").model_dump(), config_of("grpo").model_dump()
    assert own["rollout"].pop("demonstrations") | {"at_least": None} == {
        "actor": "teacher", "per_group": 1, "when": "always", "at_least": None,
    }  # fmt: skip
    assert parent["rollout"].pop("demonstrations") is None
    assert own.pop("discriminator") == {"model": None, "learning_rate": None}
    components, theirs = own["loss"].pop("components"), parent["loss"].pop("components")
    warm_up, policy, grpo = components["warm_up"], components["gad"], theirs["grpo"]
    assert warm_up["select"]["source"] == "demonstration" and warm_up["kind"] == "ce"
    for one, start, end in ((warm_up, 1.0, 0.0), (policy, 0.0, 1.0)):
        assert one.pop("coef") == {"kind": "switch", "start": start, "end": end, "at": 0.3333}
    (reward,), (verifier,) = policy.pop("rewards").values(), grpo.pop("rewards").values()
    assert reward == verifier | {"discriminator": True}
    assert policy | {"coef": 1.0} == grpo
    for key in ("method", "discriminator"):
        own.pop(key, None), parent.pop(key, None)
    assert own == parent


def test_every_episode_of_a_group_stands_against_the_one_of_the_teachers(rewarded: Rewarded) -> None:
    batch = [*rewarded.episodes, rewarded.shown, rewarded.repaired]
    pairs = teacher_student_pairs(batch, compared(batch))
    assert pairs == [(12, 4), (12, 5), (12, 6), (12, 7)]
