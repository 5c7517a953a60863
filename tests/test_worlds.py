"""ScienceWorld, TextWorld, BabyAI and gymnasium's own environments, played in words."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import opd_agents as opd
from opd_agents.envs import AgentEnv
from opd_agents.envs.adapters.babyai import BabyAI
from opd_agents.envs.adapters.gym_text import GymText
from opd_agents.envs.adapters.scienceworld import ScienceWorld
from opd_agents.envs.adapters.scienceworld_tasks import VARIATIONS, variations
from opd_agents.envs.adapters.textworld import TextWorld
from opd_agents.errors import UnknownName, UserError
from opd_agents.fuzzing import fuzz
from opd_agents.testing import check_agent_env
from opd_agents.tools import ToolError

SURE = {"gym_id": "FrozenLake-v1", "splits": "seeds", "env_options": {"is_slippery": False}}


def do(command: str) -> str:
    return json.dumps({"name": "do", "arguments": {"command": command}})


def call(name: str) -> str:
    return json.dumps({"name": name, "arguments": {}})


def expert_solves(env: AgentEnv) -> bool:
    reward = env.success() if env.over else 0.0
    while not env.over:
        _, reward, *_ = env.step(env.expert_action())
    return reward == 1


# ---- gymnasium ----


def test_gym_text_keeps_the_contract() -> None:
    check_agent_env("opd_agents/GymText-v0")
    check_agent_env("opd_agents/GymText-v0", n_tasks=2, gym_id="CartPole-v1", goal="survive", max_turns=8)


def test_numbers_of_an_observation_have_names() -> None:
    env = opd.make("opd_agents/GymText-v0")
    observation, info = env.reset(seed=0)
    assert set(json.loads(observation)) == {"your_sum", "dealer_shows", "usable_ace"}
    assert [tool.name for tool in info["tools"]] == ["stick", "hit"]


def test_a_text_rendering_is_the_observation() -> None:
    env = opd.make("opd_agents/GymText-v0", **SURE)
    assert env.reset(seed=0)[0] == "[red:S]FFF\nFHFH\nFFFH\nHFFG"
    assert env.step(call("down"))[0].endswith("SFFF\n[red:F]HFH\nFFFH\nHFFG")
    observation, *_ = env.step("Which way?")
    assert observation == "Call a tool: left, down, right, up."
    for word in ("down", "right", "right", "down", "right"):
        _, reward, terminated, *_ = env.step(call(word))
    assert terminated and reward == 1


def test_falling_into_a_hole_is_no_success() -> None:
    env = opd.make("opd_agents/GymText-v0", **SURE)
    env.reset(seed=0)
    env.step(call("down"))
    assert env.step(call("right"))[1:4] == (0.0, True, False)


def test_the_seed_is_the_noise_of_the_world_and_the_task_its_beginning() -> None:
    env = opd.make("opd_agents/GymText-v0", gym_id="FrozenLake-v1", splits="seeds")
    walks = set()
    for seed in range(6):
        env.reset(seed=seed, options={"task_id": "3"})
        walks.add(tuple(env.step(call("down"))[0] for _ in range(2) if not env.over))
    assert len(walks) > 1
    env.reset(seed=0)
    saved = env.snapshot()
    seen = set()
    for reseed in range(6):
        env.restore(saved, reseed=reseed)
        seen.add(env.step(call("down"))[0])
    assert len(seen) > 1


def test_a_world_that_always_begins_alike_has_no_disjoint_splits() -> None:
    def reset_all() -> None:
        for split in ("train", "validation", "test"):
            opd.make("opd_agents/GymText-v0", gym_id="FrozenLake-v1").reset(options={"split": split})

    with pytest.raises(UserError, match='splits="seeds"'):
        reset_all()


@pytest.mark.parametrize(
    "options",
    [
        {"gym_id": "Nothing-v0"},
        {"gym_id": "Pendulum-v1"},  # its actions are numbers
        {"actions": ("hit", "hit")},
        {"actions": ("go on",)},
        {"goal": "win"},
        {"max_turns": 0},
    ],
)
def test_bad_options_of_gym_text(options: dict) -> None:
    with pytest.raises(UserError, match="GymText"):
        GymText(**options)


# ---- BabyAI ----


@pytest.mark.real("minigrid")
@pytest.mark.parametrize("level", ["GoToLocal", "PutNextLocal", "MiniGrid-DoorKey-5x5-v0"])
def test_babyai_keeps_the_contract(level: str) -> None:
    check_agent_env("opd_agents/BabyAI-v0", level=level, n_tasks=3)


@pytest.mark.real("minigrid")
def test_what_is_said_to_be_in_view_is_there() -> None:
    env = BabyAI("PickupLoc")
    for task in range(20):
        prompt, _ = env.reset(seed=0, options={"task_id": str(task)})
        world = env.world
        said = prompt.split("you see ")[1].split("; ")[0].split(", ")
        assert len(said) >= 1
        for words in map(str.split, said):
            ways = dict(zip(words[-1:0:-2], map(int, words[-2:0:-2]), strict=False))
            ahead = ways.get("forward", 0) * world.dir_vec
            aside = (ways.get("right", 0) - ways.get("left", 0)) * world.right_vec
            thing = world.grid.get(*(world.agent_pos + ahead + aside))
            assert thing.type in words and (thing.type == "wall" or thing.color == words[0])


@pytest.mark.real("minigrid")
def test_the_bot_takes_over_from_anyone() -> None:
    env, rng = BabyAI("PickupLoc", max_turns=100), random.Random(0)
    solved = []
    for task in range(20):
        env.reset(seed=0, options={"task_id": str(task)})
        for _ in range(6):
            if not env.over:  # it asks the expert too, so that the bot must follow what another does
                env.expert_action()
                env.step(call(rng.choice(("left", "right", "forward", "drop"))))
        twin = env.fork()
        solved.append(expert_solves(twin))
        twin.close()
    assert sum(solved) >= 18


@pytest.mark.real("minigrid")
def test_levels_without_a_reliable_bot_have_no_expert() -> None:
    assert not BabyAI("KeyInBox").has_expert and BabyAI("BossLevel").has_expert
    with pytest.raises(UnknownName, match="GoToLocal"):
        BabyAI("GoToLocl")


@pytest.mark.real("minigrid")
def test_a_big_level_is_solved() -> None:
    env = BabyAI("MiniBossLevel", max_turns=300)
    for task in range(5):
        env.reset(seed=0, options={"split": "test", "task_id": str(task)})
        assert expert_solves(env)


# ---- ScienceWorld ----


@pytest.fixture(scope="module")
def science() -> Iterator[ScienceWorld]:
    env = ScienceWorld()
    yield env
    env.close()


class FewVariations(ScienceWorld):
    def __init__(self) -> None:
        super().__init__("identify-life-stages-2", max_turns=20)
        self.split_sizes = {"train": 1, "test": 1}


@pytest.mark.real("java", "scienceworld")
def test_scienceworld_keeps_the_contract() -> None:
    env = FewVariations()
    check_agent_env(env, n_tasks=1)
    env.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.real("java", "scienceworld")
@pytest.mark.parametrize("task", VARIATIONS)
def test_the_gold_path_of_every_task_succeeds(task: str) -> None:
    env = ScienceWorld(task, max_turns=300)
    env.reset(seed=0, options={"split": "test", "task_id": "0"})
    assert expert_solves(env)
    env.close()


@pytest.mark.real("java", "scienceworld")
def test_the_splits_are_the_packages(science: ScienceWorld) -> None:
    assert science.split_sizes == {"train": 3592, "validation": 1796, "test": 1819}
    for task_id in ("7", "22"):
        science.reset(options={"split": "test", "task_id": task_id})
        name, variation = science._variation
        for split, method in (("train", "Train"), ("validation", "Dev"), ("test", "Test")):
            official = list(science._simulator.ask(f"getVariations{method}"))
            assert [number for _, number in variations((name,), split)] == official
        assert variation == official[0]


@pytest.mark.real("java", "scienceworld")
def test_the_gold_path_is_followed_from_where_it_was_left(science: ScienceWorld) -> None:
    science.reset(seed=0, options={"task_id": "9"})  # freeze
    science.step(do("open door to kitchen"))
    science.step(do("look around"))
    digest = science.state_digest()
    first = science.expert_action()  # looks for the gold path, and is back where it was
    assert science.state_digest() == digest
    observation = science.step(first)[0]
    assert "error" not in observation
    science.reset(seed=0, options={"split": "test", "task_id": "25"})  # power-component
    assert expert_solves(science)


@pytest.mark.real("java", "scienceworld")
def test_bad_commands_and_a_wrong_focus(science: ScienceWorld) -> None:
    science.reset(seed=0, options={"task_id": "5"})
    for command, answer in (("fly", "No known action"), ("reset task", "cannot be reset"), ("é", "plain")):
        observation, *_, info = science.step(do(command))
        assert answer in observation and info["tool_error"]
    assert science.step(do("focus on air"))[1:3] == (0.0, True)


@pytest.mark.real("java", "scienceworld")
def test_the_death_of_a_simulator_is_an_observation_and_the_next_episode_has_another(
    science: ScienceWorld,
) -> None:
    science.reset(seed=0, options={"task_id": "5"})
    science.step(do("look around"))
    process = science._simulator.process
    process.kill()
    for _ in range(2):
        observation, reward, terminated, *_ = science.step(do("look around"))
        assert "stopped answering" in observation and not terminated and reward == 0
    assert process.poll() is not None
    science.state_digest()
    assert "Your task is" in science.reset(seed=0)[0]
    assert science._simulator.process is not process


@pytest.mark.real("java", "scienceworld")
def test_a_simulator_that_hangs_is_ended(science: ScienceWorld) -> None:
    science.reset(seed=0, options={"task_id": "5"})
    simulator = science._simulator
    simulator.process.send_signal(signal.SIGSTOP)
    os.waitpid(simulator.process.pid, os.WUNTRACED)  # it has stopped
    with pytest.raises(ToolError, match="stopped answering"):
        simulator.ask("step", "look around", timeout=0.5)
    assert not simulator.alive
    assert "stopped answering" in science.step(do("look around"))[0]


@pytest.mark.real("java", "scienceworld")
def test_no_machine_outlives_its_program() -> None:
    code = (
        "from opd_agents.envs.adapters.scienceworld import ScienceWorld\n"
        "env = ScienceWorld('melt'); env.reset(seed=0); print(env._simulator.process.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    until = time.monotonic() + 10
    while (there := stat.exists() and stat.read_text().split()[2] != "Z") and time.monotonic() < until:
        time.sleep(0.1)
    assert not there, "the Java machine is still there 10 s after its program was killed"


# ---- TextWorld ----


class FewGames(TextWorld):
    split_sizes = {"train": 2, "validation": 1, "test": 1}  # noqa: RUF012


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("games"))


@pytest.fixture(scope="module")
def adventure(cache: str) -> Iterator[TextWorld]:
    env = TextWorld(rooms=2, objects=4, quest_length=3, cache=cache, show_commands=True)
    yield env
    env.close()


@pytest.mark.real("textworld")
def test_textworld_keeps_the_contract(cache: str) -> None:
    check_agent_env(FewGames(rooms=2, objects=4, quest_length=3, cache=cache), n_tasks=2)
    assert len(list(Path(cache).glob("*.z8"))) == 4 and not list(Path(cache).glob("tmp*"))


@pytest.mark.real("textworld")
def test_what_can_be_done_is_shown_and_can_be_done(adventure: TextWorld) -> None:
    prompt, _ = adventure.reset(seed=0, options={"task_id": "0"})
    assert "TextWorld" in prompt and "$$" not in prompt
    for command in prompt.rpartition("commands: ")[2].split(", "):
        adventure.reset(seed=0, options={"task_id": "0"})
        observation, *_, info = adventure.step(do(command))
        assert info["tool_error"] is None and "can't" not in observation, command


@pytest.mark.real("textworld")
@pytest.mark.parametrize(
    "command", ["save", "restart", "look. save", "look then save", "", "tw-print x", "é"]
)
def test_the_interpreters_own_commands_are_refused(adventure: TextWorld, command: str) -> None:
    adventure.reset(seed=0, options={"task_id": "0"})
    before = adventure.state_digest()
    *_, info = adventure.step(do(command))
    assert info["tool_error"] and adventure.state_digest() == before


@pytest.mark.real("textworld")
def test_the_games_policy_leads_back_to_the_quest(adventure: TextWorld) -> None:
    rng = random.Random(0)
    adventure.reset(seed=0, options={"task_id": "1"})
    for _ in range(6):
        if not adventure.over:
            admissible = adventure._state["admissible_commands"]
            adventure.step(do(rng.choice([c for c in admissible if not c.startswith("eat")])))
    assert expert_solves(adventure)


# ---- all ----


def test_gym_text_answers_everything() -> None:
    assert fuzz(GymText("MountainCar-v0", goal="end"), 500)["fine"] > 50


@pytest.mark.real("minigrid")
def test_babyai_answers_everything() -> None:
    assert fuzz(BabyAI("PutNextLocal"), 500)["fine"] > 50


@pytest.mark.real("java", "scienceworld")
def test_scienceworld_answers_everything(science: ScienceWorld) -> None:
    assert fuzz(science, 80)["episodes"] >= 2


@pytest.mark.real("textworld")
def test_textworld_answers_everything(cache: str) -> None:
    env = FewGames(rooms=2, objects=4, quest_length=3, cache=cache)
    assert fuzz(env, 200)["tool_error"] > 50
    env.close()


def test_the_worlds_are_listed_without_their_packages() -> None:
    ids = [f"opd_agents/{name}-v0" for name in ("BabyAI", "GymText", "ScienceWorld", "TextWorld")]
    code = (
        "import sys\n"
        "from opd_agents.envs import registry\n"
        f"classes = [registry.env_class(id) for id in {ids}]\n"
        "assert all(c.family == 'worlds' and c.licence for c in classes)\n"
        "assert not {'minigrid', 'py4j', 'scienceworld', 'textworld', 'jericho'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
