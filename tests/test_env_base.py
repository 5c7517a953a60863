import json
import pickle
from typing import Any, ClassVar

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from toy_envs import Counter, ReplayedCounter

from opd_agents.envs import AnyText, BadAction, format_calls, parse_action
from opd_agents.errors import (
    EnvironmentContractError,
    NotForkable,
    ReplayDivergence,
    UnknownName,
    UserError,
)
from opd_agents.types import Message, Task, ToolCall

ADD_2 = '{"name":"add","arguments":{"number":2}}'
ROLL = '{"name":"roll","arguments":{}}'
STOP = '{"name":"stop","arguments":{}}'


def started(env: Counter | None = None, seed: int = 0, task_id: str = "1") -> Counter:
    env = env or Counter()
    env.reset(seed=seed, options={"split": "train", "task_id": task_id})
    return env


def test_gymnasium_accepts_it() -> None:
    check_env(Counter(), skip_render_check=True)
    check_env(ReplayedCounter(), skip_render_check=True)


def test_reset_info_holds_what_a_prompt_is_made_of() -> None:
    env = Counter()
    prompt, info = env.reset(seed=0, options={"split": "test", "task_id": "4"})
    assert prompt == "Reach 1007."
    assert info["messages"] == [Message("user", prompt)]
    assert (info["task_id"], info["split"], info["system"]) == ("4", "test", "Reach the target.")
    assert [tool.name for tool in info["tools"]] == ["add", "roll", "stop"]
    assert env.task == Task("4", "test")


def test_a_solved_episode() -> None:
    env = started()
    observation, reward, terminated, truncated, info = env.step(ADD_2)
    assert (observation, reward, terminated, truncated) == ('{"value":2}', 0.0, False, False)
    assert info["messages"] == [Message("tool", '{"value":2}', tool_call_id="call_0_0")]
    assert info["calls"] == (ToolCall("add", {"number": 2}),)
    assert (info["parse_error"], info["tool_error"], "success" in info) == (None, None, False)
    env.step(ADD_2)
    observation, reward, terminated, truncated, info = env.step(STOP)
    assert (observation, reward, terminated, truncated, info["success"]) == (
        "stopped",
        1.0,
        True,
        False,
        True,
    )


def test_list_of_calls_runs_in_order_in_one_turn_until_the_end() -> None:
    env = started()
    bad = '{"name":"add","arguments":{"number":-1}}'
    observation, reward, terminated, _, info = env.step(f"[{ADD_2}, {bad}, {ADD_2}, {STOP}, {ADD_2}]")
    assert observation.split("\n") == [
        '{"value":2}',
        '{"error":"number must not be negative"}',
        '{"value":4}',
        "stopped",
    ]
    assert env.turn == 1 and terminated and reward == 1.0 and env.value == 4
    assert info["tool_error"] == "number must not be negative"
    assert [m.tool_call_id for m in info["messages"]] == ["call_0_0", "call_0_1", "call_0_2", "call_0_3"]
    assert len(info["calls"]) == 5


@pytest.mark.parametrize(
    ("action", "key", "explained"),
    [
        ('{"name":"add","argum', "parse_error", "invalid JSON: Unterminated string"),
        ("[" * 100_000, "parse_error", "invalid JSON"),
        ("  ", "parse_error", "empty action"),
        ("[]", "parse_error", "empty list of calls"),
        ('Wait. <tool_call>{"name":"add"', "parse_error", "malformed tool call"),
        ('{"tool":"add"}', "parse_error", "a call must be a JSON object"),
        ('{"name":"add","arguments":[2]}', "parse_error", "\"arguments\" of 'add' must be a JSON object"),
        ('{"name":"ad","arguments":{}}', "tool_error", "unknown tool 'ad', did you mean 'add'?"),
        (
            '{"name":"add","arguments":{"number":"2"}}',
            "tool_error",
            "number: Input should be a valid integer",
        ),
        ('{"name":"add"}', "tool_error", "number: Field required"),
    ],
)
def test_bad_actions_are_answered_and_change_nothing(action: str, key: str, explained: str) -> None:
    env = started()
    digest = env.state_digest()
    observation, reward, terminated, truncated, info = env.step(action)
    assert explained in info[key] and json.loads(observation) == {"error": info[key]}
    assert (reward, terminated, truncated, env.turn) == (0.0, False, False, 1)
    assert info["messages"][0].role == ("user" if key == "parse_error" else "tool")
    assert env.state_digest() == digest


def test_text_ends_the_episode_by_default() -> None:
    env = started()
    assert env.step("I give up.")[1:4] == (0.0, True, False)


def test_running_out_of_turns_truncates_and_the_verifier_still_speaks() -> None:
    env = started(task_id="9")  # target 12
    results = [env.step(ADD_2) for _ in range(6)]
    assert [r[3] for r in results] == [False] * 5 + [True]
    assert not any(r[2] for r in results)
    assert results[-1][1] == 1.0 and results[-1][4]["success"]


def test_order_is_enforced() -> None:
    env = Counter()
    for use in (lambda: env.step(ADD_2), env.snapshot, env.fork, lambda: env.task):
        with pytest.raises(gymnasium.error.ResetNeeded):
            use()
    started(env).step(STOP)
    with pytest.raises(gymnasium.error.ResetNeeded, match="after the end"):
        env.step(ADD_2)
    started(env).step(ADD_2)


def test_unknown_tasks_splits_and_options_are_refused() -> None:
    env = Counter()
    with pytest.raises(UnknownName, match="Did you mean 'test'"):
        env.reset(options={"split": "tset"})
    for task_id in ("40", "-1", "01", "x", 40):
        with pytest.raises(UserError, match="its tasks are '0' to '39'"):
            env.reset(options={"split": "train", "task_id": task_id})
    with pytest.raises(UserError, match="no option tsak"):
        env.reset(options={"tsak": "1"})


def test_without_options_the_seed_draws_a_task_of_the_first_split() -> None:
    env = Counter()
    drawn = {env.reset(seed=seed)[1]["task_id"] for seed in range(20)}
    assert len(drawn) > 5
    assert env.reset(seed=3)[1]["task_id"] == env.reset(seed=3)[1]["task_id"]
    assert env.task.split == "train"


@pytest.mark.parametrize("cls", [Counter, ReplayedCounter])
def test_restore_goes_back_and_keeps_the_noise(cls: type[Counter]) -> None:
    env = started(cls())
    env.step(ROLL)
    saved, digest = pickle.loads(pickle.dumps(env.snapshot())), env.state_digest()
    after = [env.step(ROLL)[0] for _ in range(3)]
    assert [env.step(ROLL)[0] for _ in range(2)] != after[:2]  # negative control: not restored
    assert env.over
    env.restore(saved)
    assert (env.state_digest(), env.turn, env.over) == (digest, 1, False)
    assert [env.step(ROLL)[0] for _ in range(3)] == after


@pytest.mark.parametrize("cls", [Counter, ReplayedCounter])
def test_reseed_changes_the_noise_only(cls: type[Counter]) -> None:
    env = started(cls())
    env.step(ROLL)
    saved, digest = env.snapshot(), env.state_digest()
    outcomes = []
    for reseed in (None, 1, 1, 2):
        env.restore(saved, reseed=reseed)
        assert env.state_digest() == digest
        outcomes.append(env.step(ROLL)[0])
    assert outcomes[1] == outcomes[2] and len(set(outcomes)) == 3


@pytest.mark.parametrize("cls", [Counter, ReplayedCounter])
def test_forks_are_independent_and_keep_the_arguments(cls: type[Counter]) -> None:
    env = started(cls(offset=5))
    env.step(ADD_2)
    twin = env.fork()
    assert (twin.offset, twin.target, twin.turn) == (5, 6, 1)
    rolled = twin.step(ROLL)[0]
    assert twin.value != 2 and env.value == 2
    assert twin.fork().value == twin.value
    assert env.step(ROLL)[0] == rolled


def test_snapshot_of_an_ended_episode_stays_ended() -> None:
    env = started()
    env.step(STOP)
    saved = env.snapshot()
    started(env)
    env.restore(saved)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(ADD_2)


def test_snapshot_holds_no_live_object() -> None:
    class Listing(Counter):
        def begin(self, task: Task) -> str:
            self.values: list[int] = []
            return super().begin(task)

        def add(self, number: int) -> int:
            self.values.append(number)
            return len(self.values)

        def get_state(self) -> Any:
            return self.values

        def set_state(self, state: Any) -> None:
            self.values = state

    env = started(Listing())
    saved = env.snapshot()
    env.step(ADD_2)
    env.restore(saved)
    assert env.step(ADD_2)[0] == "1"


def test_replay_that_leads_elsewhere_is_noticed() -> None:
    class Drifting(ReplayedCounter):
        drift: ClassVar[int] = 0

        def add(self, number: int) -> dict[str, int]:
            return super().add(number + Drifting.drift)

    env = started(Drifting())
    env.step(ADD_2)
    env.step(ADD_2)
    saved = env.snapshot()
    env.restore(saved)
    Drifting.drift = 1
    with pytest.raises(ReplayDivergence, match="after 1 actions"):
        env.restore(saved)


def test_recorded_actions_replay_with_verification() -> None:
    env = started()
    digests = []
    for action in (ROLL, ADD_2):
        env.step(action)
        digests.append(env.state_digest())
    again = started()
    again.replay((ROLL, ADD_2), digests)
    assert again.value == env.value
    other = started(seed=1)
    with pytest.raises(ReplayDivergence):
        other.replay((ROLL, ADD_2), digests)


def test_a_fork_that_fails_leaves_no_environment() -> None:
    closed = []

    class Stubborn(Counter):
        def set_state(self, state: Any) -> None:
            raise OSError("no container")

        def close(self) -> None:
            closed.append(self)

    env = started(Stubborn())
    with pytest.raises(OSError, match="no container"):
        env.fork()
    assert len(closed) == 1 and closed[0] is not env


def test_environments_that_cannot_fork_say_so() -> None:
    class Fixed(Counter):
        fork_mode: ClassVar = "none"

    env = started(Fixed())
    for use in (env.snapshot, env.fork):
        with pytest.raises(NotForkable, match="fork_mode is 'none'"):
            use()


def test_a_state_that_is_no_json_asks_for_a_digest() -> None:
    class Odd(Counter):
        def get_state(self) -> Any:
            return {1, 2}

    with pytest.raises(EnvironmentContractError, match="define digest_text"):
        started(Odd()).state_digest()


def test_an_empty_answer_is_an_observation_too() -> None:
    class Silent(Counter):
        def add(self, number: int) -> str:
            return ""

    observation, *_, info = started(Silent()).step(ADD_2)
    assert observation == info["messages"][0].content == "(empty)"


def test_unforeseen_exceptions_of_a_tool_reach_the_caller() -> None:
    class Broken(Counter):
        def add(self, number: int) -> dict[str, int]:
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        started(Broken()).step(ADD_2)


def test_scores_outside_the_unit_interval_are_refused() -> None:
    class Generous(Counter):
        def success(self) -> float:
            return 3.0

    with pytest.raises(EnvironmentContractError, match="not in"):
        started(Generous()).step(STOP)


def test_no_expert_is_said_plainly() -> None:
    with pytest.raises(EnvironmentContractError, match="Counter has no scripted expert"):
        started().expert_action()


def test_actions_are_written_and_read_back() -> None:
    call, other = ToolCall("a", {"x": "é", "y": [1]}), ToolCall("b", {})
    assert format_calls([call]) == '{"name":"a","arguments":{"x":"é","y":[1]}}'
    assert parse_action(format_calls([call])) == (call,)
    assert parse_action(format_calls([call, other])) == (call, other)
    assert parse_action('{"name":"b"}') == (other,)
    assert parse_action("hello") == ()
    marked = ToolCall("a", {"x": "</tool_call>"})
    assert parse_action(format_calls([marked])) == (marked,)  # a marker inside an argument is only text
    with pytest.raises(BadAction):
        parse_action("{hello")


def test_the_text_space_holds_any_text_and_samples_short_ones() -> None:
    space = AnyText(100, seed=0)
    assert "a b\n日本" in space and "" in space and "x" * 101 not in space and 5 not in space
    assert all(len(space.sample()) <= 64 and space.sample() in space for _ in range(20))
    assert len(pickle.dumps(space)) < 10_000
    assert space == AnyText(100) != AnyText(99)
