"""The examples, that docs/tutorial.md shows them as they are, and the data of docs/your_data.md."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rolling import trajectory, turn
from test_layers import ROOT

import opd_agents as opd
from opd_agents.config import EnvironmentSource, load_config
from opd_agents.episode import Episode, Limits
from opd_agents.evaluation import load_suite
from opd_agents.plugins import load_credit, load_reward
from opd_agents.policies import ExpertPolicy, RandomPolicy
from opd_agents.policies.models import load_model, load_tokenizer
from opd_agents.recordings import read_conversations
from opd_agents.rollout import rollout
from opd_agents.rows import read_rows
from opd_agents.tasks import split_sizes
from opd_agents.teachers.plug_in import teacher_class
from opd_agents.types import Credit, Task

EXAMPLES = ROOT / "examples"
DRAWER = "examples/Drawer-v0"
TUTORIAL, DATA = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tutorial.md", "your_data.md")
)


def shown(language: str) -> list[str]:
    """The code blocks of a language in the tutorial."""
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, flags=re.DOTALL)


@pytest.fixture
def drawer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    opd.envs.import_plugins([str(EXAMPLES / "drawer.py")])


def test_the_drawer_keeps_the_contract(drawer: None) -> None:
    opd.testing.check_agent_env(DRAWER)


def test_the_drawers_splits_share_no_task(drawer: None) -> None:
    import drawer as module

    assert sum(module.Drawer.split_sizes.values()) <= len(module.CHAINS) == len(set(module.CHAINS))
    env = opd.make(DRAWER)
    states = []
    for split, size in module.Drawer.split_sizes.items():
        for i in range(size):
            env.reset(options={"split": split, "task_id": str(i)})
            states.append(env.digest_text())
    assert len(set(states)) == len(states) == 2000


def test_the_drawer_is_solved_by_its_expert_alone(drawer: None) -> None:
    tasks = [Task(str(i), "test") for i in range(50)]
    drawn = [Episode(task.id, DRAWER, i, task, (0, 0, i)) for i, task in enumerate(tasks)]
    for policy, solved in ((ExpertPolicy(), 50), (RandomPolicy(), 0)):
        played = rollout(drawn, policy, make=opd.make, chat=None, limits=Limits(), temperature=1.0)
        assert sum(trajectory.success for trajectory in played) == solved


def test_a_wrong_drawer_and_a_guess_lose(drawer: None) -> None:
    import drawer as module

    (first, second, _), thing = module.CHAINS[0]
    env = opd.make(DRAWER)
    for action in (
        {"name": "open_drawer", "arguments": {"colour": second}},
        {"name": "answer", "arguments": {"thing": thing}},
    ):
        assert f'"{first}"' in env.reset(options={"split": "train", "task_id": "0"})[0]
        _, reward, terminated, *_ = env.step(json.dumps(action))
        assert terminated and reward == 0


def test_the_tiny_models_are_ordinary_checkpoints(
    drawer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_models

    tiny_models.main(tmp_path, DRAWER)
    teacher, student = (load_model(str(tmp_path / name), "float32") for name in ("teacher", "student"))
    assert student.num_parameters() < teacher.num_parameters() < 500_000
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    assert {"red", "grey", "watch"} <= tokenizer.get_vocab().keys()  # a colour is one token


def test_the_tutorials_configs_load_and_are_shown_whole(drawer: None) -> None:
    assert shown("yaml") == [
        (EXAMPLES / name).read_text(encoding="utf-8") for name in ("teacher.yaml", "student.yaml")
    ]
    teacher, student = (load_config(EXAMPLES / name) for name in ("teacher.yaml", "student.yaml"))
    sources = [run.rollout.source for run in (teacher, student.stages["cold_start"])]
    assert [source.dataset for source in sources] == ["expert_messages.jsonl", "few_messages.jsonl"]
    assert student.stages["distill"].teacher.model == str(teacher.folder)


def test_the_tutorial_quotes_the_drawer(drawer: None) -> None:
    source = (EXAMPLES / "drawer.py").read_text(encoding="utf-8")
    quoted = [block for block in shown("python") if "def open_drawer" in block]
    assert quoted and all(line in source for block in quoted for line in block.splitlines())


# ---- docs/your_data.md ----


@pytest.fixture
def data(tmp_path: Path, drawer: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files that the page shows; those of Python are imported."""
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", DATA, flags=re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, text in re.findall(r"`(\S+\.jsonl)`:\n```json\n(.*?)```", DATA, flags=re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    opd.envs.import_plugins(["facts", "my_code"])
    runpy.run_path("make_sums.py")
    return tmp_path


def test_the_shown_tasks_are_played(data: Path) -> None:
    assert split_sizes([EnvironmentSource(id=DRAWER, options={"tasks": "few_tasks.jsonl"})]) == [2]
    opd.testing.check_agent_env("me/Facts-v0", tasks="facts.jsonl")
    sums = opd.evaluate(
        "opd_agents/PromptTask-v0", ["expert"], options={"tasks": "sums.jsonl", "verifier": "number"}
    )
    assert (sums["policies"][0]["episodes"], sums["policies"][0]["success"]) == (50, 1.0)
    assert load_suite("suite.yaml").environments[0].options["tasks"] == str(data / "sums.jsonl")


def test_the_shown_functions_are_taken(data: Path) -> None:
    config = load_config("plugged.yaml")
    assert teacher_class("teacher", config.teacher).__name__ == "Sharp"
    episode = trajectory([turn((5, 6), (7, 8))])
    brief, distill = config.loss.components["brief"], config.loss.components["distill"]
    reward = load_reward(brief.rewards["short"].reward, "reward")
    assert reward(episode) == -0.01 * episode.n_action_tokens < 0
    assert load_credit(distill.credit, "credit")(episode, [Credit(kl_mean=0.25)]) == [0.75]
    [environment] = load_config("prompts.yaml").environments
    assert opd.make(environment.id, **environment.options).split_size("train") == 150


def test_the_shown_conversations_are_read(data: Path) -> None:
    results = list(read_conversations(read_rows("messages.jsonl")))
    assert [conversation.actions() for conversation in results] == [[1, 3], [1], [1, 3]]
    assert [sum(conversation.trained) for conversation in results] == [2, 1, 1]
    assert load_config("sft.yaml").rollout.source.dataset == str(data / "messages.jsonl")
    assert load_config("mixture.yaml").rollout.source.student == 0.5


def test_an_installed_package_brings_its_environment(tmp_path: Path) -> None:
    """examples/timetable, installed beside opd-agents, is found by its entry point in a fresh process."""
    source = shutil.copytree(EXAMPLES / "timetable", tmp_path / "source")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, *install, tmp_path / "site", source], check=True, timeout=100)

    def run(*command: str) -> str:
        path = os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=100, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    (about,) = json.loads(run("-m", "opd_agents", "envs", "timetable/Timetable-v0", "--json"))
    assert about["tools"] == ["departures", "board"] and about["splits"]["test"] == 200
    command = "-m opd_agents evaluate timetable/Timetable-v0 --policy expert --limit 5 --json"
    assert json.loads(run(*command.split()))["policies"][0]["success"] == 1.0
    run("-c", "import opd_agents as opd; opd.testing.check_agent_env('timetable/Timetable-v0', changes=3)")
