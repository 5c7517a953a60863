"""A conformance test for authors of environments: ``opd.testing.check_agent_env("me/MyDesk-v0")``."""

from __future__ import annotations

import pickle
import random
import re
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env

from opd_agents.envs import AgentEnv, Snapshot, format_calls, make
from opd_agents.errors import EnvironmentContractError, NotForkable, UserError
from opd_agents.tools import random_call

CONTROLS = 6  # times that other random actions are drawn if none yet changed anything that shows
FORK_SEED = 3
NOT_AN_ACTION = '{"name":'
BAD_ACTIONS = (
    NOT_AN_ACTION,
    "[" * 5000,
    "[]",
    "{}",
    '<tool_call>{"name":',
    '{"name":1}',
    '{"name":"no_such_tool","arguments":{}}',
    '{"name":"no_such_tool","arguments":[]}',
    '{"name":"\\ud800","arguments":{"\\ud800":"\\ud800"}}',
)


@dataclass(frozen=True, slots=True)
class _Step:
    """One step as compared: everything that a policy or a trainer sees of it, and the state after it."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    digest: str


def check_agent_env(env: str | AgentEnv, *, n_tasks: int = 5, **kwargs: Any) -> None:
    """Try out whether an environment keeps the contract on ``n_tasks`` tasks of each split.

    ``env`` is a registered id, made with ``kwargs``, or an environment. Raises EnvironmentContractError
    that says what is broken.
    """
    subject = make(env, **kwargs) if isinstance(env, str) else env
    _check_declarations(subject)
    _check_gymnasium(subject)
    _check_tasks(subject, n_tasks)
    _check_bad_actions(subject)
    _check_truncation(subject)
    _check_determinism(subject, n_tasks)
    _check_forks(subject, n_tasks)
    _check_expert(subject, n_tasks)


def _check_declarations(env: AgentEnv) -> None:
    _require(env.fork_mode in ("snapshot", "replay", "none"), f"fork_mode is {env.fork_mode!r}")
    _require(
        bool(env.split_sizes), "split_sizes is empty; if the tasks come from a file, give it: tasks=PATH"
    )
    _require(env.runs_in in ("main", "thread", "process"), f"runs_in is {env.runs_in!r}")
    _require(env.max_live is None or env.max_live >= 1, f"max_live is {env.max_live}")
    for split, size in env.split_sizes.items():
        _require(size >= 1, f"split {split!r} has {size} tasks")
    _require(env.max_turns >= 1, f"max_turns is {env.max_turns}")
    try:
        env.spawn().step("x")
    except gymnasium.error.ResetNeeded:
        return
    raise EnvironmentContractError("step() before the first reset() must raise gymnasium's ResetNeeded")


def _check_gymnasium(env: AgentEnv) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about rendering
            check_env(env, skip_render_check=True)
    except Exception as error:
        raise EnvironmentContractError(f"gymnasium's check_env fails: {error}") from error


def _check_tasks(env: AgentEnv, n_tasks: int) -> None:
    """First and last task of each split can be reset, others not; no task is in two splits."""
    seen: dict[tuple[str, str], str] = {}
    for split, size in env.split_sizes.items():
        # a reset of a browser or a container is dear
        for task_id in _task_ids(size, max(n_tasks, 20) if env.runs_in == "main" else n_tasks):
            prompt, info = _reset(env, split, task_id)
            for key in ("task_id", "split", "messages", "system", "tools"):
                _require(key in info, f"the info of reset() lacks {key!r}")
            asked = (split, task_id)
            _require((info["split"], info["task_id"]) == asked, f"reset to task {asked} gave {info}")
            other = seen.setdefault((prompt, env.state_digest()), split)
            _require(other == split, f"task {asked} also occurs in split {other!r}: {prompt!r}")
        try:
            env.reset(seed=0, options={"split": split, "task_id": str(size)})
        except UserError:
            continue
        raise EnvironmentContractError(f"task {size} of split {split!r}, one past the last, must be refused")


def _check_bad_actions(env: AgentEnv) -> None:
    """A bad action costs a turn, explains itself and changes nothing, whatever it is. Where every action is
    a text, none is bad."""
    if env.text_only:
        return
    wrong = [format_calls([call]) for call in _wrong_arguments(env)]
    for action in (*BAD_ACTIONS, *wrong):
        _reset(env)
        before, turn = env.state_digest(), env.turn
        observation, _, terminated, _, info = _step(env, action)
        what = f"bad action {action[:80]!r}"
        _require(
            not terminated and env.turn == turn + 1, f"{what} must cost one turn and not end the episode"
        )
        error = info["parse_error"] or info["tool_error"]
        _require(bool(error and observation), f"{what} must be answered with what is wrong")
        same = env.state_digest() == before
        _require(same, f"{what} changed state_digest(), which must hold neither counters nor noise")


def _check_truncation(env: AgentEnv) -> None:
    _reset(env)
    for turn in range(1, env.max_turns + 1):
        _, reward, terminated, truncated, info = _step(env, NOT_AN_ACTION)
        if terminated and env.text_only:  # its last action was an answer
            break
        _require(not terminated, "running out of turns must truncate, not terminate")
        right = truncated == (turn == env.max_turns)
        _require(right, f"truncated is {truncated} after turn {turn} of {env.max_turns}")
        _require(truncated or reward == 0, "reward before the end of the episode must be 0")
    _require("success" in info, 'the info of the last step lacks "success"')
    try:
        env.step(NOT_AN_ACTION)
    except gymnasium.error.ResetNeeded:
        return
    raise EnvironmentContractError("step() after the end must raise gymnasium's ResetNeeded")


def _check_determinism(env: AgentEnv, n_tasks: int) -> None:
    for split, task_id, rng in _drawn_tasks(env, n_tasks):
        with closing(env.spawn()) as first, closing(env.spawn()) as second:
            one, other = (_reset(e, split, task_id, seed=7)[0] for e in (first, second))
            _require(one == other, f"two resets with equal seed and task gave {one!r} and {other!r}")
            actions, steps = _wander(first, rng, one)
            what = "two environments with equal seed, task and actions differ"
            _compare(steps, _run(second, actions), actions, what)


def _check_forks(env: AgentEnv, n_tasks: int) -> None:
    if env.fork_mode == "none":
        _reset(env)
        try:
            env.snapshot()
        except NotForkable:
            return
        raise EnvironmentContractError('fork_mode is "none", so snapshot() must raise NotForkable')
    repeated = differing = 0
    for attempt in range(CONTROLS):
        for split, task_id, rng in _drawn_tasks(env, n_tasks, attempt):
            prompt, _ = _reset(env, split, task_id, seed=FORK_SEED)
            before, steps = _wander(env, rng, prompt, limit=rng.randrange(4))
            if not env.over:
                text = " ".join([prompt, *(step.observation for step in steps)])
                saved = pickle.loads(pickle.dumps(env.snapshot()))
                differed = _check_one_fork(env, saved, rng, text)
                repeated += differed is not None
                differing += differed is True
                env.restore(saved)
                _check_another_course(env, (split, task_id), before, rng, text)
        if differing or not repeated:
            break
    _require(
        differing > 0 or repeated == 0,
        f"negative control: in {repeated} episodes the same actions, done twice without restoring, led to "
        "the same observations and states, so nothing shows that restoring works. Is digest_text() complete?",
    )


def _check_one_fork(env: AgentEnv, saved: Snapshot, rng: random.Random, text: str) -> bool | None:
    """Fork, restore and reseed at the present state, ``saved``. Returns whether going on without restoring
    shows, None if it cannot be tried."""
    digest = env.state_digest()
    half = max(1, (env.max_turns - env.turn) // 2)  # so that they can be done twice within the turn limit
    with closing(env.fork()) as twin:
        actions, steps = _wander(twin, rng, text, limit=min(half, 6))
    _require(env.state_digest() == digest, "stepping a fork changed the environment that it was forked from")
    _compare(steps, _run(env, actions), actions, "a fork and its origin differ after the same actions")
    again: list[_Step] | None = None if env.over else _run(env, actions)
    moved = env.state_digest() != digest
    env.restore(saved)
    _require(env.state_digest() == digest, "restore() does not lead back to the state of the snapshot")
    _compare(steps, _run(env, actions), actions, "after restore() the same actions lead elsewhere")
    env.restore(saved, reseed=11)
    with closing(env.fork(reseed=11)) as other:
        same = env.state_digest() == digest
        _require(same, "restore(reseed) must change the noise only, not state_digest()")
        env.restore(saved, reseed=11)
        _compare(_run(env, actions), _run(other, actions), actions, "two restores with one reseed differ")
    if moved:  # so that restore() has visibly led back
        return True
    if again is None:
        return None
    # Rewards and endings are left out: the turns used up show there, whatever the state.
    visible = [[(step.observation, step.digest) for step in run] for run in (steps, again)]
    return any(one != repeated for one, repeated in zip(*visible, strict=False))


def _check_another_course(
    env: AgentEnv, task: tuple[str, str], before: Sequence[str], rng: random.Random, text: str
) -> None:
    """``env`` has gone on and was restored to the state after the actions ``before``. What is done otherwise
    there must lead where it leads a new environment: of what was undone nothing may be left."""
    actions, steps = _wander(env, rng, text, limit=3)
    with closing(env.spawn()) as fresh:
        _reset(fresh, *task, seed=FORK_SEED)
        _run(fresh, before)
        what = "after restore() other actions lead elsewhere than in a new environment"
        _compare(steps, _run(fresh, actions), actions, what)


def _check_expert(env: AgentEnv, n_tasks: int) -> None:
    if not env.has_expert:
        return
    for split, size in env.split_sizes.items():
        for task_id in _task_ids(size, n_tasks):
            _reset(env, split, task_id)
            info: dict[str, Any] = {}
            while not env.over:
                info = _step(env, env.expert_action())[4]
            _require(info["success"], f"the expert fails task {task_id!r} of split {split!r}")


def _task_ids(size: int, count: int) -> list[str]:
    """``count`` ids spread evenly from the first to the last task."""
    count = min(size, count)
    return [str(i * (size - 1) // max(count - 1, 1)) for i in range(count)]


def _drawn_tasks(env: AgentEnv, n_tasks: int, attempt: int = 0) -> list[tuple[str, str, random.Random]]:
    return [
        (split, task_id, random.Random(f"{split}/{task_id}" + f"/{attempt}" * bool(attempt)))
        for split, size in env.split_sizes.items()
        for task_id in _task_ids(size, n_tasks)
    ]


def _wrong_arguments(env: AgentEnv) -> list[Any]:
    rng = random.Random(0)
    calls = [random_call([tool], rng) for tool in env.tools]
    return [type(call)(call.name, {**call.arguments, "no_such_argument": None}) for call in calls]


def _wander(env: AgentEnv, rng: random.Random, text: str, limit: int = 12) -> tuple[list[str], list[_Step]]:
    """Up to ``limit`` actions: the expert's, if there is one, mixed with random calls and nonsense."""
    actions: list[str] = []
    steps: list[_Step] = []
    while len(actions) < limit and not env.over:
        if env.has_expert and rng.random() < 0.7:
            action = env.expert_action()
        elif env.tools and rng.random() < 0.9:
            action = format_calls([random_call(env.tools, rng, re.findall(r"[\w.-]+", text))])
        else:
            action = NOT_AN_ACTION
        actions.append(action)
        steps += _run(env, [action])
        text += steps[-1].observation
    return actions, steps


def _run(env: AgentEnv, actions: Sequence[str]) -> list[_Step]:
    """Take ``actions`` until the episode ends."""
    steps = []
    for action in actions:
        if env.over:
            break
        observation, reward, terminated, truncated, _ = _step(env, action)
        steps.append(_Step(observation, reward, terminated, truncated, env.state_digest()))
    return steps


def _compare(expected: Sequence[_Step], found: Sequence[_Step], actions: Sequence[str], what: str) -> None:
    for turn, (action, one, other) in enumerate(zip(actions, expected, found, strict=False)):
        _require(one == other, f"{what}: turn {turn}, action {action!r}: {one} and {other}")
    lengths = len(expected), len(found)
    _require(
        lengths[0] == lengths[1], f"{what}: the episodes end after {lengths[0]} and {lengths[1]} actions"
    )


def _reset(
    env: AgentEnv, split: str | None = None, task_id: str = "0", seed: int = 0
) -> tuple[str, dict[str, Any]]:
    options = {"split": split or next(iter(env.split_sizes)), "task_id": task_id}
    try:
        return env.reset(seed=seed, options=options)
    except Exception as error:
        raise EnvironmentContractError(f"reset({options}) raised {type(error).__name__}: {error}") from error


def _step(env: AgentEnv, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
    try:
        return env.step(action)
    except Exception as error:
        raise EnvironmentContractError(
            f"step({action[:80]!r}) raised {type(error).__name__}: {error}; what an agent can do wrong must "
            "be a ToolError, which is answered"
        ) from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EnvironmentContractError(message)
