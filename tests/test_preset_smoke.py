"""Every shipped method learns on the OrderDesk: one step of four updates does what the method is for, on the
episodes that were played and measured apart from its loss."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from opd_agents import envs
from opd_agents.composition import selected
from opd_agents.config import (
    EXPERIMENTS,
    CrossEntropy,
    Policy,
    Preference,
    list_methods,
    load_config,
    method_text,
    reference_needs,
)
from opd_agents.experience import Assigned, Experience, credit, score, with_likeness
from opd_agents.frozen import FrozenTerms, frozen_terms
from opd_agents.playing import play_step
from opd_agents.repairing import with_repairs
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import load_session
from opd_agents.step_metrics import step_metrics
from opd_agents.trainer import source_play
from opd_agents.updates import update

METHODS = [row["name"] for row in list_methods()]
STUDENT, TEACHER = (str(EXPERIMENTS.joinpath(f"orderdesk_{name}")) for name in ("student", "teacher"))


def started(method: str, folder: Path, **correction: Any) -> Session:
    """A run of this method, small in all that is not the method's."""
    own = yaml.safe_load(method_text(method))["config"]
    raw: dict[str, Any] = {
        "name": method,
        "method": method,
        "student": {"model": STUDENT},
        "environments": [{"id": "opd_agents/OrderDesk-v0", "options": {"level": "easy"}}],
        "rollout": {
            "episodes_per_step": 24,
            "group_size": min(own["rollout"].get("group_size", 1), 6),
            "max_tokens_per_turn": 16,
            "max_context_tokens": 480,
        },
        "trainer": {"updates_per_step": 4, "optimizer": "muon", "learning_rate": 1e-3},
    }
    if "max_turns" in own["rollout"]:  # of a first turn this student has little to learn
        raw["rollout"]["max_turns"] = {"start": 4}
    if "beginning" in own["rollout"]:
        raw["rollout"]["beginning"] = {"left": {"start": 4}}
    if own.get("judge", {}).get("by") == "judge":  # who is not asked here
        endpoint = {"base_url": "http://127.0.0.1:9/v1", "key": None}
        raw["references"] = {"judge": {"kind": "api", "model": "none", "endpoint": endpoint}}
    raw["teacher"] = {"model": TEACHER}
    if "correction" in own:  # by whom a white-box teacher can do without an endpoint, and few of them
        alone = {"propose": {"by": "teacher", "where": "disagreed"}, "key_by": "execution"}
        by = alone if "judge" in own else {}
        raw["correction"] = {"episodes_per_step": 4, "token_share": 0.9, **by, **correction}
        raw |= {"judge": None} if by else {}
    if "teacher" in own:
        raw["teacher"] = tiny.members(own, TEACHER, STUDENT, max_tokens=8)
    return load_session(load_config(raw), RunFolder(folder, {}, resume=False))


def played(session: Session) -> Experience:
    play = partial(rollout, make=envs.make, chat=session.chat, limits=session.limits, temperature=1.0)
    episodes = play_step(
        session.config, session.step, session.task_counts, source_play(session, play),
        partial(play, policy=session.demonstrator),
    )  # fmt: skip
    return with_likeness(session, with_repairs(session, score(session, episodes.trajectories)))


def told(session: Session, experience: Experience) -> FrozenTerms:
    """What the student, as it is now, and the references say of what was played."""
    terms = frozen_terms(session.model, experience.packed, experience.signals, 1.0, 16384)
    return terms.where_taught(experience.taught)


def gain(session: Session, experience: Experience, assigned: Assigned, before: FrozenTerms) -> float:
    """What the method is for, in nats a token, above 0 if the updates did it. With rewards: that actions of
    episodes better than their group's became likelier, and of others less; else, with a reference: that the
    student came nearer to it; else that what was shown became likelier, and what it is preferred to less."""
    after, components = told(session, experience), session.config.loss.components
    rewarded = [
        assigned.composed[name].rewards[part]
        for name, component in components.items()
        if isinstance(component, Policy) and session.at(component.coef) and assigned.counted[name].any()
        for part, own in component.rewards.items()
        if session.at(own.coef)
    ]
    if not rewarded and "teacher" in reference_needs(components):
        old, new = before.references["teacher"].kl, after.references["teacher"].kl
        assert old is not None and new is not None
        return float((old - new).mean())
    better = rewarded[0][experience.packed.episode] if rewarded else torch.ones(())
    for component in components.values():
        if isinstance(component, CrossEntropy) and session.at(component.coef) and not rewarded:
            better = selected(experience.packed, experience.trajectories, component.select)
        if isinstance(component, Preference):
            chosen, rejected = (
                selected(experience.packed, experience.trajectories, select)
                for select in (component.chosen, component.rejected)
            )
            better = chosen - rejected
    gained = (after.logprob - before.logprob) * better
    return float(gained.sum() / gained.count_nonzero())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_does_what_the_method_is_for(method: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    session = started(method, tmp_path / "run")
    experience = played(session)
    before, assigned = told(session, experience), credit(session, experience)
    losses = update(session, experience, assigned)
    row = step_metrics(session, experience, assigned, losses, dict(session.totals), 1.0)
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    assert session.updates == 4 and row["loss"] != 0
    assert gain(session, experience, assigned, before) > 0.005
