import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wild_actions import actions, assert_answered

from opd_agents.envs.lockchain import JAM_SIGNS, KEY_OF, KEYS, LOCK_SIGNS, LockChain, draw_chain
from opd_agents.errors import UserError
from opd_agents.evaluation.suites import load_suite
from opd_agents.testing import check_agent_env

ID = "opd_agents/LockChain-v0"


def started(task_id: int = 0, split: str = "train", **kwargs: Any) -> LockChain:
    env = LockChain(**kwargs)
    env.reset(seed=0, options={"split": split, "task_id": str(task_id)})
    return env


def turn(env: LockChain, key: str) -> str:
    return env.step(json.dumps({"name": "turn_key", "arguments": {"key": key}}))[0]


def right_key(env: LockChain) -> str:
    return json.loads(env.expert_action())["arguments"]["key"]


def wrong_key(env: LockChain) -> str:
    return next(key for key in KEYS if key != right_key(env))


def finish(env: LockChain) -> list[tuple[str, float]]:
    """Let the expert go on to the end: its observations and rewards."""
    seen = []
    while not env.over:
        observation, reward, *_ = env.step(env.expert_action())
        seen.append((observation, reward))
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"horizon": 2, "recovery": 0, "spare": 0}, {"irreversible": True}, {"horizon": 64, "recovery": 4}],
)
def test_keeps_the_environment_contract(options: dict[str, Any]) -> None:
    check_agent_env(ID, n_tasks=3, **options)


def test_texts_are_these() -> None:
    env = started(0, horizon=2, recovery=1)
    first, second = env.chain.locks
    assert env.reset(options={"task_id": "0"})[0] == f"lock {first}"
    jam = env.chain.jams[0][0]
    assert [turn(env, wrong_key(env)), turn(env, wrong_key(env))] == [f"jam {jam}"] * 2
    assert turn(env, KEY_OF[jam]) == f"lock {first}"
    assert [turn(env, KEY_OF[first]), turn(env, KEY_OF[second])] == [f"lock {second}", "open"]
    assert all(f"{sign}" in env.system_prompt for sign in KEY_OF)


def test_every_key_fits_two_locks_and_two_jams() -> None:
    for signs in (LOCK_SIGNS, JAM_SIGNS):
        assert sorted(KEY_OF[sign] for sign in signs) == sorted(KEYS * 2)
    assert not set(LOCK_SIGNS) & set(JAM_SIGNS)


def test_the_expert_opens_every_chain_without_a_jam() -> None:
    for i in range(100):
        env = started(i, horizon=12, spare=0)
        seen = finish(env)
        assert len(seen) == 12 and seen[-1] == ("open", 1.0)
        assert not any(text.startswith("jam") for text, _ in seen)


@pytest.mark.parametrize(("recovery", "place"), list(itertools.product(range(5), (0, 3, 7))))
def test_one_mistake_costs_the_recovery_and_its_own_turn(recovery: int, place: int) -> None:
    env = started(1, horizon=8, recovery=recovery)
    for _ in range(place):
        env.step(env.expert_action())
    before = env.turns_to_go
    turn(env, wrong_key(env))
    assert env.turns_to_go == before + recovery
    assert finish(env)[-1] == ("open", 1.0) and env.turn == 8 + recovery + 1


@pytest.mark.parametrize("recovery", [0, 1, 3])
def test_no_policy_is_faster_than_the_closed_form(recovery: int) -> None:
    """Every key is tried in every state that can be reached."""
    env = started(2, horizon=3, recovery=recovery, spare=1000)
    frontier, edges, to_go = [env.snapshot()], [], {}
    while frontier:
        saved = frontier.pop()
        env.restore(saved)
        origin = env.state_digest()
        if origin in to_go:
            continue
        to_go[origin] = env.turns_to_go
        for key in KEYS:
            env.restore(saved)
            turn(env, key)
            edges.append((origin, "end" if env.over else env.state_digest()))
            if not env.over:
                frontier.append(env.snapshot())
    shortest = {"end": 0}
    for _ in to_go:  # Bellman-Ford, every edge of length one
        for origin, target in edges:
            if target in shortest:
                shortest[origin] = min(shortest.get(origin, 10**6), shortest[target] + 1)
    assert len(to_go) == 3 * (1 + recovery)
    assert all(shortest[digest] == turns for digest, turns in to_go.items())


@pytest.mark.parametrize(("recovery", "episodes"), [(1, 400), (2, 120)])
def test_a_guesser_needs_a_number_of_turns_exponential_in_the_recovery(recovery: int, episodes: int) -> None:
    rng, turns = random.Random(0), []
    for i in range(episodes):
        env = started(i, horizon=2, recovery=recovery, spare=100_000)
        turn(env, wrong_key(env))
        before = env.turn
        while (
            env.step(json.dumps({"name": "turn_key", "arguments": {"key": rng.choice(KEYS)}}))[0][:3] == "jam"
        ):
            pass
        turns.append(env.turn - before)
    expected = 8 * (8**recovery - 1) / 7  # of a run of successes with probability 1/8 each
    assert 0.8 * expected < sum(turns) / episodes < 1.2 * expected


def lost(env: LockChain, place: int, knows_the_way_back: bool) -> float:
    """Turns lost by one mistake at a place, where it can be mended or, for a guesser, hardly ever."""
    rng, reward = random.Random(place), 0.0
    while not env.over:
        if env.turn == place:
            key = wrong_key(env)
        elif env.turns_to_go > env.horizon - env.turn and not knows_the_way_back and env.turn > place:
            key = rng.choice(KEYS)
        else:
            key = right_key(env)
        reward = env.step(json.dumps({"name": "turn_key", "arguments": {"key": key}}))[1]
    return env.horizon * (1 - reward)


def test_what_a_mistake_costs_grows_with_the_horizon_only_for_who_cannot_return() -> None:
    """The reason for exposure bias: the first-order term of the cost is the chance of a mistake, which grows
    with the horizon, times this."""
    guessing, returning = [], []
    for horizon in (8, 16, 32):
        places = range(horizon)
        options = {"horizon": horizon, "recovery": 4, "spare": 0}
        guessing.append(sum(lost(started(3, **options), p, False) for p in places) / horizon)
        returning.append(sum(lost(started(3, **options), p, True) for p in places) / horizon)
    assert all(
        cost == pytest.approx((horizon + 1) / 2) for cost, horizon in zip(guessing, (8, 16, 32), strict=True)
    )
    assert max(returning) <= 5 and returning[2] < 1.25 * returning[1]


def test_irreversible_chains_break_and_pay_what_was_opened() -> None:
    env = started(0, horizon=8, irreversible=True)
    for _ in range(6):
        env.step(env.expert_action())
    observation, reward, terminated, truncated, info = env.step(
        json.dumps({"name": "turn_key", "arguments": {"key": wrong_key(env)}})
    )
    assert (observation, reward, terminated, truncated) == ("broken", 0.75, True, False) and not info[
        "success"
    ]


def test_a_bad_action_is_no_wrong_key() -> None:
    env = started(0, irreversible=True)
    digest = env.state_digest()
    assert "error" in turn(env, "z") and env.step("a")[0] == "Use turn_key."
    assert env.state_digest() == digest and not env.over


def test_the_locks_do_not_depend_on_what_a_mistake_costs() -> None:
    chains = [draw_chain(16, recovery, "test", "5") for recovery in (0, 2, 4)]
    assert len({chain.locks for chain in chains}) == 1
    assert [len(chain.jams[0]) for chain in chains] == [0, 2, 4]
    assert " ".join(draw_chain(6, 2, "test", "17").locks) == "lynx elk owl goat goat ibex"


@pytest.mark.parametrize("horizon", [2, 3, 16])
def test_splits_are_disjoint_by_content(horizon: int) -> None:
    drawn = [
        {draw_chain(horizon, 2, split, str(i)).locks for i in range(100)}
        for split in ("train", "validation", "test")
    ]
    assert not (drawn[0] & drawn[1] or drawn[0] & drawn[2] or drawn[1] & drawn[2])


@pytest.mark.parametrize(
    "options",
    [{"horizon": 1}, {"horizon": 10**9}, {"horizon": "8"}, {"recovery": -1}, {"recovery": 65}, {"spare": -1}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"LockChain: {next(iter(options))} must be"):
        LockChain(**options)


def test_the_suite_measures_several_horizons() -> None:
    suite = load_suite("lockchain")
    horizons = [source.options["horizon"] for source in suite.environments]
    assert horizons == sorted(set(horizons)) and len(horizons) >= 4


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_action_is_answered(data: st.DataObject) -> None:
    env = started(0, horizon=4, irreversible=data.draw(st.booleans()))
    assert_answered(env, data.draw(st.lists(actions(env.tools, list(KEYS)), max_size=6)))
