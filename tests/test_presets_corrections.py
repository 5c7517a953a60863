"""Presets that repair single actions: what they share, what tells them apart, and whom their reward pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_preset_smoke import played, started

from opd_agents.composition import source_of
from opd_agents.config import method_text
from opd_agents.correction.practice import published_reward
from opd_agents.experience import credit
from opd_agents.schedules import Clock
from opd_agents.session import Session


def preset(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(method_text(name))["config"]
    return found


def test_the_control_has_no_teacher_and_is_else_the_same() -> None:
    ours, control = preset("score_verified"), preset("student_retry")
    assert ours["correction"].pop("propose") == {"by": "teacher", "where": "disagreed"}
    assert control["correction"].pop("propose") == {"by": "student", "where": "dropped"}
    assert ours == control


@pytest.fixture
def at_its_end(tmp_path: Path, request: pytest.FixtureRequest) -> Session:
    torch.set_num_threads(1)
    easily = {"rollouts": [2], "rivals": ["own"], "accept": 0.7}
    proof = {"verify": easily} if request.param == "score_verified" else {}
    session = started(request.param, tmp_path / "run", **{"episodes_per_step": 12, "practice": 6} | proof)
    session.step = session.config.trainer.steps - 1
    assert session.clock == Clock(session.progress, session.adapted)
    return session


@pytest.mark.parametrize("at_its_end", ["score"], indirect=True)
def test_scores_second_half_is_grpo_on_its_reward(at_its_end: Session) -> None:
    """By hand: the reward of every episode by the table, less the mean of its group, by its deviation."""
    experience = played(at_its_end)
    assigned = credit(at_its_end, experience)
    assert assigned.coefs == {"mended": 0.0, "solved": 0.0, "rl": 1.0}
    practice = [source_of(one) == "practice" for one in experience.trajectories]
    assert len({r.turn for r in experience.repairs}) > 1 and any(practice)
    rewards: dict[str, dict[int, float]] = {}
    for number, one in enumerate(experience.trajectories):
        if one.group:
            rewards.setdefault(one.group, {})[number] = published_reward(one)
    assert {0.0, 1.0} < {value for group in rewards.values() for value in group.values()}
    expected = torch.zeros(len(experience.trajectories))
    for group in rewards.values():
        values = torch.tensor(list(group.values()))
        expected[list(group)] = (values - values.mean()) / (values.std() + 1e-4)
    advantage = assigned.composed["rl"].advantage
    torch.testing.assert_close(advantage, expected[experience.packed.episode])
    trained = assigned.counted["rl"] & (advantage != 0)
    practised = torch.tensor(practice)
    assert bool(practised[experience.packed.episode][trained].any())  # and those from the beginning
    assert not bool(practised[experience.packed.episode][trained].all())


@pytest.mark.parametrize("at_its_end", ["score_verified"], indirect=True)
def test_the_key_step_is_paid_beside_the_outcome(at_its_end: Session) -> None:
    experience = played(at_its_end)
    assigned = credit(at_its_end, experience)
    parts, packed = assigned.composed["rl"].parts, experience.packed
    keyed: dict[tuple[int, int], float] = {}
    places = {one.uid: number for number, one in enumerate(experience.trajectories)}
    for repair in experience.repairs:
        paid = [0.5 * (one.branch.key == "repair") for one in repair.practised if one.branch]
        for one, reward in zip(repair.practised, paid, strict=True):
            keyed[places[one.uid], repair.turn] = reward - sum(paid) / len(paid)
    expected = torch.tensor([keyed.get(place, 0.0) for place in packed.turns])
    assert any(keyed.values()) and any(repair.accepted for repair in experience.repairs)
    torch.testing.assert_close(parts["key_step"], expected[packed.turn])
    both = parts["key_step"] + parts["outcome"]
    torch.testing.assert_close(assigned.composed["rl"].advantage, both)
    learned = {packed.turns[n][0] for n in packed.turn[assigned.counted["solved"]].tolist()}
    assert learned == {places[one.uid] for one in experience.trajectories if one.success == 1}
    assert learned & {places[r.branch.uid] for r in experience.repairs if r.branch is not None}
    rewarded = {packed.turns[n][0] for n in packed.turn[assigned.counted["rl"]].tolist()}
    assert rewarded == {places[one.uid] for repair in experience.repairs for one in repair.practised}
