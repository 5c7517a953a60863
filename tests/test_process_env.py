"""Environments in processes of their own: the same episodes, and no crash that reaches another."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from rolling import Scripted

from opd_agents import envs
from opd_agents.envs import ProcessEnv, launch, workers
from opd_agents.episode import Episode, Limits
from opd_agents.errors import EnvironmentCrashed, OpdError, UserError
from opd_agents.policies import ExpertPolicy
from opd_agents.rollout import rollout
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
    for name in (
        "turn",
        "over",
        "task",
        "listed_task",
        "reset_seed",
        "has_expert",
        "max_turns",
        "split_sizes",
    ):
        assert getattr(there, name) == getattr(here, name)
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


def test_as_many_processes_are_kept_as_were_wanted_lately(monkeypatch):
    together = [launch(ID) for _ in range(4)]
    for env in together:
        env.reset(seed=0)
    processes = [env._process for env in together]
    for env in together:
        env.close()
    assert all(process._popen.poll() is None for process in processes)
    monkeypatch.setattr("opd_agents.envs.workers.KEPT", 0.0)
    again = launch(ID)
    again.reset(seed=0)
    assert again._process is processes[-1]
    again.close()
    assert all(process._popen.poll() is not None for process in processes[:-1])


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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_program_that_is_ended_leaves_no_process(how):
    code = f"""
import signal
from opd_agents import envs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
envs.register("{ID}", "toy_envs:ProcessCounter")
env = envs.launch("{ID}")
env.reset(seed=0)
print(env._process._popen.pid, flush=True)
env.step('{HANG}')
"""
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    pid = int(program.stdout.readline())
    os.kill(pid, 0)
    program.send_signal(how)
    program.wait(timeout=20)
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


@pytest.fixture
def no_spare(monkeypatch):
    """The next environment gets a process of its own."""
    monkeypatch.setattr(workers, "_idle", [])
    yield
    for worker in workers._idle:
        worker.kill()


def test_a_spare_process_that_died_is_not_handed_out():
    env = launch(ID)
    env.reset(seed=0)
    process = env._process._popen
    env.close()
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = launch(ID)
    assert again.reset(seed=0)[1]["task_id"] and again._process._popen is not process
    again.close()


def test_an_environment_that_cannot_be_made_is_answered_by_no_other():
    env = launch(ID)
    env.reset(seed=0)
    process = env._process
    env.close()
    wrong = launch(ID, ofset=1)
    for _ in range(2):
        with pytest.raises(UserError, match="takes no argument 'ofset'"):
            wrong.state_digest()
    wrong.close()
    again = launch(ID)
    again.reset(seed=0)
    assert again._process is process  # a mistake costs no process
    again.close()


def test_an_answer_that_was_not_waited_for_reaches_nobody(monkeypatch):
    env = launch(ID)
    env.reset(seed=0)
    process = env._process

    def interrupted(_):
        raise KeyboardInterrupt

    line = type("Line", (), {"send_bytes": process._connection.send_bytes, "poll": staticmethod(interrupted)})
    monkeypatch.setattr(process, "_connection", line)
    with pytest.raises(KeyboardInterrupt):
        env.step(ADD)
    env.close()
    assert not process.alive and process not in workers._idle


def test_a_fork_of_the_program_has_processes_of_its_own():
    env, spare = launch(ID), launch(ID)
    for one in (env, spare):
        one.reset(seed=0)
    process = spare._process
    spare.close()
    child = os.fork()
    if not child:
        own = launch(ID)
        own.reset(seed=0)
        mine = own._process not in (env._process, process)
        try:
            env.step(ADD)
            mine = False
        except Exception as error:
            mine = mine and type(error).__name__ == "EnvironmentCrashed"
        env.close()
        own._process.kill()
        os._exit(0 if mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert env.step(ADD)[0] == '{"value":1}'
    env.close()


def test_a_child_that_a_dead_process_leaves_does_not_keep_it_waiting():
    env = launch(ID)
    env.reset(seed=0)
    started = time.monotonic()
    with pytest.raises(EnvironmentCrashed, match="exit status 9"):
        env.step("leave a child")
    assert time.monotonic() - started < 20
    env.close()


def test_an_environment_that_exits_ends_its_own_episode_alone():
    actions = {"a": None, "b": "exit"}
    play_exit = Scripted(lambda history: actions[history.uid] or history.env.expert_action(), Actor.EXPERT)
    a, b = play([episode(uid) for uid in actions], play_exit)
    assert (a.outcome, b.outcome, b.error) == (Outcome.SUCCESS, Outcome.ERROR, "SystemExit: 3")


def test_an_expert_that_hangs_times_out():
    started = time.monotonic()
    slow = Episode(
        uid="b", env_id=ID, seed=0, task=Task("0", "train"), stream=(0, 0, 0), env_kwargs={"slow": 60.0}
    )
    a, b = play([episode("a"), slow], ExpertPolicy(), step_timeout=5.0)
    assert time.monotonic() - started < 40
    assert a.outcome is Outcome.SUCCESS
    assert b.error == "OpdError: the scripted expert failed: TimeoutError: no answer within 5.0 s"


def test_the_present_folder_is_the_programs(no_spare, tmp_path, monkeypatch):
    """Its files hide no module, and arguments name files in it, also for a process that was there before."""
    env = launch(ID)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.py").write_text("1 / 0")
    env.reset(seed=0)
    env.close()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    row = {"metadata": {"task_id": 4, "split": "train"}}
    (tmp_path / "below" / "rows.jsonl").write_text(json.dumps(row))
    there = launch(ID, tasks="rows.jsonl")
    assert there.reset(seed=0)[0] == "Reach 7."
    there.close()


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_an_id_that_is_registered_anew_is_made_anew():
    changing = "toys/ChangingCounter-v0"
    for offset in (3, 5):
        envs.register(changing, "toy_envs:ProcessCounter", offset=offset)
        env = launch(changing)
        assert env.reset(seed=0, options={"task_id": "0"})[0] == f"Reach {offset}."
        env.close()


def test_what_nobody_holds_any_more_is_ended():
    env = launch(ID)
    env.reset(seed=0)
    process = env._process
    del env
    assert not process.alive and process._popen.poll() is not None


def test_megabytes_pass():
    env = launch(ID)
    env.reset(seed=0)
    huge = json.dumps({"name": "x" * 5_000_000, "arguments": {}})
    assert len(env.step(huge)[0]) > 4_000_000
    env.close()
