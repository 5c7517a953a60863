"""Environments in processes of their own: the same episodes, and no crash that reaches another."""

import os
import pickle
import subprocess
import sys
import time

import pytest
from rolling import Scripted

from opd_agents import envs
from opd_agents.envs import ProcessEnv, launch
from opd_agents.errors import OpdError, UserError
from opd_agents.policies import ExpertPolicy
from opd_agents.rollout import Episode, Limits, rollout
from opd_agents.types import Actor, Outcome, Task

ID = "toys/ProcessCounter-v0"
ADD, ROLL = '{"name":"add","arguments":{"number":1}}', '{"name":"roll","arguments":{}}'
DIE, HANG = '{"name":"die","arguments":{}}', '{"name":"hang","arguments":{}}'


@pytest.fixture(scope="module", autouse=True)
def registered():
    envs.register(ID, "toy_envs:ProcessCounter")


def episode(uid, task="0", seed=0):
    return Episode(uid=uid, env_id=ID, seed=seed, task=Task(task, "train"), stream=(0, 0, 0))


def play(episodes, policy, **limits):
    return rollout(episodes, policy, make=launch, chat=None, limits=Limits(**limits), temperature=1.0)


def test_answers_are_those_of_the_environment_itself():
    here, there = envs.make(ID), launch(ID)
    assert isinstance(there, ProcessEnv) and there.tools == here.tools
    options = {"split": "test", "task_id": "4"}
    assert there.reset(seed=5, options=options) == here.reset(seed=5, options=options)
    for action in (ADD, ROLL, "{", ROLL):
        assert there.step(action) == here.step(action)
        assert there.state_digest() == here.state_digest()
    assert (there.turn, there.over, there.task) == (here.turn, here.over, here.task)
    saved = pickle.loads(pickle.dumps(there.snapshot()))
    twin = there.fork()
    assert twin.step(ROLL) == here.fork().step(ROLL)
    here.restore(saved, reseed=3)
    there.restore(saved, reseed=3)
    assert there.step(ROLL) == here.step(ROLL)
    for env in (there, twin, there):  # closing twice is closing once
        env.close()


def test_what_is_raised_there_is_raised_here():
    env = launch(ID)
    with pytest.raises(UserError, match="'0' to '39'"):
        env.reset(options={"task_id": "99"})
    env.reset(seed=0)
    with pytest.raises(OpdError, match="Unpicklable"):
        env.step("raise")
    assert env.step(ADD)[0] == '{"value":1}'
    env.close()
    with pytest.raises(UserError, match="takes no argument 'ofset'"):
        launch(ID, ofset=1).reset(seed=0)


def test_a_process_is_kept_for_the_next_environment():
    pids = []
    for _ in range(2):
        env = launch(ID)
        env.reset(seed=0)
        pids.append(env._process._popen.pid)
        env.close()
    assert pids[0] == pids[1]


def test_a_crash_ends_its_own_episode_alone():
    actions = {"a": None, "b": DIE, "c": None}

    def act(history):
        return actions[history.uid] or history.env.expert_action()

    a, b, c = play([episode(uid) for uid in actions], Scripted(act, Actor.EXPERT))
    assert (a.outcome, b.outcome, c.outcome) == (Outcome.SUCCESS, Outcome.ERROR, Outcome.SUCCESS)
    assert (
        b.error == "EnvironmentCrashed: the environment's process ended (exit status 9) when asked for step"
    )


def test_what_hangs_is_killed():
    env = launch(ID)
    env.reset(seed=0)
    pid = env._process._popen.pid
    started = time.monotonic()
    (one,) = rollout(
        [episode("a")], Scripted(lambda history: HANG), make=lambda id: env, chat=None,
        limits=Limits(step_timeout=1.0), temperature=1.0,
    )  # fmt: skip
    assert one.error == "TimeoutError: no answer within 1.0 s" and time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_expert_whose_environment_died_ends_that_episode():
    def make(id):
        env = launch(id)
        reset = env.reset

        def dying(**kwargs):
            answer = reset(**kwargs)
            env._process.kill()
            return answer

        env.reset = dying
        return env

    (one,) = rollout([episode("a")], ExpertPolicy(), make=make, chat=None, limits=Limits(), temperature=1.0)
    assert one.outcome is Outcome.ERROR and "the scripted expert failed: EnvironmentCrashed" in one.error


def test_a_killed_program_leaves_no_process():
    code = f"""
import time
from opd_agents import envs
envs.register("{ID}", "toy_envs:ProcessCounter")
env = envs.launch("{ID}")
env.reset(seed=0)
print(env._process._popen.pid, flush=True)
env.step('{HANG}')
"""
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    pid = int(program.stdout.readline())
    os.kill(pid, 0)
    program.kill()
    program.wait()
    program.stdout.close()
    give_up = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < give_up:
            os.kill(pid, 0)
            time.sleep(0.05)


def test_a_class_of_the_main_module_is_refused():
    code = """
from opd_agents import envs
from toy_envs import ProcessCounter
class Mine(ProcessCounter): pass
envs.register("me/Mine-v0", "__main__:Mine")
try:
    envs.launch("me/Mine-v0")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert "put Mine into a file of its own" in done.stdout
