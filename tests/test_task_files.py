"""Tasks from a file of the user's: for every environment, in epochs, and refused with file, row and field."""

import json
import pickle
from collections import Counter as Count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
from rolling import Scripted, rolled
from toy_envs import Counter
from typer.testing import CliRunner

import opd_agents as opd
from opd_agents.cli import app
from opd_agents.config import load_config
from opd_agents.envs import TaskRow, describe, load_tasks
from opd_agents.envs.prompt_task import exact, number
from opd_agents.episode import Episode
from opd_agents.errors import DataError, EnvironmentContractError, UserError
from opd_agents.policies import Action, ExpertPolicy
from opd_agents.recordings import student_groups
from opd_agents.schedules import dealt
from opd_agents.tasks import draw_episodes, split_sizes
from opd_agents.testing import check_agent_env
from opd_agents.types import Actor, Outcome, SpanKind, StopReason, Task

PROMPTS = "opd_agents/PromptTask-v0"
DESK = "opd_agents/OrderDesk-v0"


def sums(n: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + 2?", "answer": str(i + 2), **fields} for i in range(n)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [row | {"id": f"sum-{i}"} for i, row in enumerate(sums(9))]
    rows[2]["split"] = rows[5]["split"] = "test"
    return write(tmp_path / "sums.jsonl", rows)


@pytest.fixture
def curated(tmp_path: Path) -> str:
    """A re-split list of OrderDesk tasks."""
    rows = [{"metadata": {"task_id": 7 * i, "split": "train"}} for i in range(6)]
    rows[0]["split"] = rows[3]["split"] = "validation"
    return write(tmp_path / "desk.jsonl", rows)


class Numbered(Counter):
    """Each task's content is made from its number."""

    def begin(self, task: Task) -> str:
        super().begin(task)
        return f"Task {self.task_number(task)}."


def test_a_file_that_selects_tasks_changes_none(tmp_path: Path) -> None:
    plain, chosen = Numbered(), Numbered()
    rows = [{"metadata": {"task_id": 3, "split": split}, "split": split} for split in ("test", "train")]
    chosen.use_tasks(load_tasks(write(tmp_path / "rows.jsonl", rows)))
    for split in ("test", "train"):
        whole = plain.reset(options={"split": split, "task_id": "3"})[0]
        assert chosen.reset(options={"split": split, "task_id": "0"})[0] == whole
    assert chosen.spawn().reset(options={"split": "test", "task_id": "0"})[0] == "Task 43."


class Adding(Counter):
    """A world that is built from the row, by tools."""

    row_fields: ClassVar = ("prompt", "metadata")

    def begin(self, task: Task) -> str:
        self.value, self.target = 0, self.row.metadata["target"]
        return str(self.row.prompt)


class ReplayedAdding(Adding):
    fork_mode: ClassVar = "replay"

    def digest_text(self) -> str:
        return f"{self.value}/{self.target}"


opd.register("tests/Adding-v0", "test_task_files:Adding")
opd.register("tests/ReplayedAdding-v0", "test_task_files:ReplayedAdding")


# ---- environments with a task file keep the contract ----


@pytest.mark.parametrize(
    "options", [{}, {"verifier": "number"}, {"verifier": "operator:ne", "system": "Add."}]
)
def test_prompt_tasks_keep_the_contract(prompts: str, options: dict[str, str]) -> None:
    check_agent_env(PROMPTS, tasks=prompts, **options)


@pytest.mark.parametrize("id", ["tests/Adding-v0", "tests/ReplayedAdding-v0"])
def test_worlds_of_rows_keep_the_contract(id: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Reach {i}.", "metadata": {"target": i}, "split": "ab"[i % 2]} for i in range(6)]
    check_agent_env(id, tasks=write(tmp_path / "adding.jsonl", rows))


def test_own_tasks_that_rows_select_keep_the_contract(curated: str) -> None:
    check_agent_env(DESK, tasks=curated)


def test_a_row_selects_a_task_of_the_environment(curated: str) -> None:
    env = opd.make(DESK, tasks=curated)
    assert env.split_sizes == {"train": 4, "validation": 2}
    prompt, info = env.reset(seed=0, options={"split": "validation", "task_id": "1"})
    assert (info["split"], info["task_id"], env.task) == ("validation", "1", Task("21", "train"))
    assert prompt == opd.make(DESK).reset(seed=0, options={"split": "train", "task_id": "21"})[0]
    saved = pickle.loads(pickle.dumps(env.snapshot()))
    assert len(pickle.dumps(saved)) < len(pickle.dumps(env.get_state())) + 2000  # the rows are not in it
    env.reset(seed=0, options={"split": "train", "task_id": "0"})
    env.restore(saved)
    assert env.task == Task("21", "train") == env.fork().task


def test_a_row_by_its_name(prompts: str) -> None:
    env = opd.make(PROMPTS, tasks=prompts)
    prompt, info = env.reset(options={"split": "test", "task_id": "sum-5"})
    assert (prompt, info["task_id"]) == ("What is 5 + 2?", "1")
    assert env.row == TaskRow("sum-5", "test", "What is 5 + 2?", "7", {})
    with pytest.raises(UserError, match="No task 'sum-4' in split 'test': its tasks are '0' to '1'"):
        env.reset(options={"split": "test", "task_id": "sum-4"})
    with pytest.raises(DataError, match=r"no task in split 'validation', only in 'train' \(7 .*'test' \(2"):
        env.reset(options={"split": "validation"})


@pytest.mark.parametrize("splits", [False, True])
def test_a_dataset_is_read_as_jsonl_is(splits: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "answer": 1, "metadata": {"x": None, "y": 2}}, {"prompt": "b"}, {"prompt": "c"}]
    if splits:
        parts = {"train": datasets.Dataset.from_list(rows[:2]), "test": datasets.Dataset.from_list(rows[2:])}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "data"))
    else:
        named = [row | {"split": split} for row, split in zip(rows, ("train", "train", "test"), strict=True)]
        datasets.Dataset.from_list(named).save_to_disk(str(tmp_path / "data"))
    tasks = load_tasks(tmp_path / "data")
    assert tasks.split_sizes == {"train": 2, "test": 1}
    assert tasks.row(Task("0", "train")) == TaskRow("0", "train", "a", 1, {"y": 2})
    assert tasks.row(Task("0", "test")).prompt == "c"


def test_a_file_is_read_once_until_it_changes(prompts: str) -> None:
    assert load_tasks(prompts) is load_tasks(Path(prompts))
    before = load_tasks(prompts)
    write(Path(prompts), sums(3))
    assert load_tasks(prompts) is not before and load_tasks(prompts).split_sizes == {"train": 3}


# ---- what cannot be used is refused ----


@pytest.mark.parametrize(
    ("id", "row", "message"),
    [
        (PROMPTS, {"answer": "3"}, r"line 3: the field `prompt` is missing, which PromptTask needs"),
        (PROMPTS, {"prompt": "", "answer": "3"}, r"line 3: the field `prompt` is missing"),
        (
            PROMPTS,
            {"prompt": "a"},
            r"line 3: the field `answer` must be a text or a number for verifier 'exact'",
        ),
        (PROMPTS, {"prompt": "a", "answer": ["b"]}, "line 3: the field `answer` must be"),
        (PROMPTS, {"prompt": [{"role": "user"}], "answer": "3"}, "line 3: `prompt` must be a text, not list"),
        (PROMPTS, {"prompt": "a", "answr": "3"}, "line 3: unknown field `answr`.*did you mean `answer`"),
        (
            PROMPTS,
            {"prompt": "a", "source": "x"},
            "unknown field `source`.*put what is your own into `metadata`",
        ),
        (PROMPTS, {"prompt": "a", "answer": "3", "metadata": "x"}, "line 3: `metadata` must be an object"),
        (PROMPTS, {"prompt": "a", "answer": "3", "split": 3}, "line 3: `split` is 3"),
        (
            PROMPTS,
            {"prompt": "a", "answer": "3", "id": [1]},
            r"line 3: `id` must be a text or a whole number",
        ),
        (
            PROMPTS,
            {"prompt": "a", "answer": "3", "id": "one"},
            "line 3: the `id` 'one' is that of .*line 1 too",
        ),
        (PROMPTS, "{", "line 3: not JSON.*one JSON object on every line"),
        (PROMPTS, '["prompt"]', "line 3: .*is no JSON object"),
        (DESK, {"prompt": "a"}, "line 1: OrderDesk makes its own tasks.*`task_id` is missing"),
    ],
)
def test_bad_rows_are_named(id: str, row: Any, message: str, tmp_path: Path) -> None:
    rows = [*sums(2), row]
    rows[0]["id"] = "one"
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        opd.make(id, tasks=path)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"metadata": {"task_id": 10**6, "split": "train"}}, "line 1: No task '1000000' in split 'train'"),
        ({"metadata": {"task_id": 0, "split": "tran"}}, "line 1: Unknown split.*'tran'.*'train'"),
        ({"metadata": {"task_id": 0, "split": "test"}}, "line 1: a task of OrderDesk's test split must stay"),
    ],
)
def test_rows_must_select_what_there_is_and_no_test_task_for_training(
    row: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        opd.make(DESK, tasks=write(tmp_path / "bad.jsonl", [row]))


def test_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"PromptTask has no task file.*options: \{tasks: PATH\}"):
        opd.make(PROMPTS).reset()
    with pytest.raises(DataError, match="there is no row in it"):
        opd.make(PROMPTS, tasks=write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="no such file"):
        opd.make(PROMPTS, tasks=str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="not a dataset that `datasets` reads"):
        opd.make(PROMPTS, tasks=str(tmp_path))
    with pytest.raises(EnvironmentContractError, match=r"split_sizes is empty.*tasks=PATH"):
        check_agent_env(PROMPTS)
    assert describe(PROMPTS)["splits"] == {}


# ---- PromptTask ----


def test_the_text_is_the_answer_whatever_it_looks_like(tmp_path: Path) -> None:
    rows = [{"prompt": "As JSON, please.", "answer": '{"a": [1]}'}]
    env = opd.make(PROMPTS, tasks=write(tmp_path / "json.jsonl", rows))
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(' {"a": [1]}\n')
    assert (reward, terminated, truncated, info["parse_error"]) == (1.0, True, False, None)
    env.reset(seed=0)
    assert env.step("")[1:3] == (0.0, True)


@pytest.mark.parametrize("answer", ['{"a": [1]}', '{"name": "x", "arguments": {}}', "[]", "<tool_call>{"])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_models_text_is_no_call_either(answer: str, sampled: bool, desk_chat: Any, tmp_path: Path) -> None:
    """Whether its ids were sampled, and are read, or are written for the expert."""
    source = {"tasks": write(tmp_path / "json.jsonl", [{"prompt": "As JSON, please.", "answer": answer}])}
    episode = Episode("e", PROMPTS, 0, Task("0", "train"), (0, 0, 0), source)
    ids = (*desk_chat.tokenizer.encode(answer), min(desk_chat.end_ids))

    class Says:
        def act(self, histories: Any) -> list[Action]:
            if not sampled:
                return ExpertPolicy().act(histories)
            return [Action(Actor.STUDENT, StopReason.END, ids, (0.0,) * len(ids))]

    (played,) = rolled([episode], Says(), desk_chat)
    (turn,) = played.turns
    assert (played.reward, turn.action, turn.parse_error, turn.action_ids) == (1.0, answer, None, ids)
    assert [span.kind for span in turn.spans] == [SpanKind.TEXT, SpanKind.SPECIAL]


def test_built_in_verifiers() -> None:
    row = TaskRow("0", "train", "?", "so 1,200 it is #### 1200")
    assert number(r"Of 7, \boxed{1200} remain, not 3.", row) and number("It is 1,200.0", row)
    assert not number("1200 and then 1", row) and not number("none", row)
    assert exact(" 12\n", TaskRow("0", "train", "?", 12)) and not exact("12.", TaskRow("0", "train", "?", 12))


def half(answer: str, row: TaskRow) -> float:
    return 0.5 if answer == row.metadata["want"] else 0.0


def seven(answer: str, row: TaskRow) -> Any:
    return 7


def words(answer: str, row: TaskRow) -> Any:
    return "yes"


def test_a_verifier_of_the_users(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Say x.", "metadata": {"want": "x"}}])
    env = opd.make(PROMPTS, tasks=path, verifier="test_task_files:half")
    env.reset(seed=0)
    assert env.step("x")[1] == 0.5 and env.has_expert is False
    for name, shown in (("seven", "7"), ("words", "'yes'")):
        env = opd.make(PROMPTS, tasks=path, verifier=f"test_task_files:{name}")
        env.reset(seed=0)
        with pytest.raises(
            EnvironmentContractError, match=f"verifier test_task_files:{name} gave {shown} for row"
        ):
            env.step("x")
    with pytest.raises(UserError, match=r"verifier.*exact, number.*'exakt' is no 'module:name'"):
        opd.make(PROMPTS, tasks=path, verifier="exakt")


def test_commands_take_options(prompts: str) -> None:
    done = CliRunner().invoke(
        app, ["evaluate", PROMPTS, "--option", f"tasks={prompts}", "--policy", "expert", "--json"]
    )
    result = json.loads(done.stdout)
    assert result["policies"][0]["success"] == 1.0 and result["policies"][0]["episodes"] == 2
    arguments = ["rollout", PROMPTS, "--option", f"tasks={prompts}", "--option", "system=Add.", "--watch"]
    shown = CliRunner().invoke(app, [*arguments, "--policy", "expert", "--episodes", "2"]).stdout
    assert "system: Add." in shown and "1 expert: 3" in shown and shown.count("success") == 2
    for words in (
        ["orderdesk", "--policy", "expert", "--option", f"tasks={prompts}"],
        [PROMPTS, "--policy", "expert"],
    ):
        assert CliRunner().invoke(app, ["evaluate", *words]).exit_code == 2


# ---- epochs ----


def config(tmp_path: Path, *sources: dict[str, Any], **rollout_: Any) -> Any:
    raw = tiny.sft(tmp_path / "run") | {"environments": list(sources)}
    raw["rollout"] = {"source": "expert", "episodes_per_step": 4, **rollout_}
    return load_config(raw)


def prompt_source(tmp_path: Path, n: int, name: str = "epoch", **fields: Any) -> dict[str, Any]:
    return {"id": PROMPTS, "options": {"tasks": write(tmp_path / f"{name}.jsonl", sums(n))}, **fields}


def test_an_epoch_visits_every_task_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    made = config(tmp_path, prompt_source(tmp_path, 10))
    sizes = split_sizes(made.environments)
    drawn = [episode for step in range(5) for episode in draw_episodes(made, step, sizes)]
    first, second = ([e.task.id for e in drawn[i : i + 10]] for i in (0, 10))
    assert (
        sorted(first, key=int) == sorted(second, key=int) == [str(i) for i in range(10)] and first != second
    )
    assert len({e.seed for e in drawn}) == 20  # each visit has its own noise
    assert draw_episodes(made, 3, sizes) == drawn[12:16]  # whatever was drawn before: a resume goes on
    other = made.model_copy(update={"seed": 1})
    assert [e.task.id for e in draw_episodes(other, 0, sizes)] != first[:4]


def test_every_environment_has_its_own_epochs_by_weight(tmp_path: Path) -> None:
    sources = [prompt_source(tmp_path, 9, "a", weight=3), prompt_source(tmp_path, 5, "b", weight=1.3)]
    desk = {"id": DESK, "limit": 4, "weight": 1}
    made = config(tmp_path, *sources, desk, group_size=2, episodes_per_step=10)
    sizes = split_sizes(made.environments)
    assert sizes == [9, 5, 4]
    drawn = [draw_episodes(made, step, sizes) for step in range(40)]
    groups = [e for step in drawn for e in step[::2]]
    assert all(
        a.task == b.task and a.seed != b.seed
        for step in drawn
        for a, b in zip(step[::2], step[1::2], strict=True)
    )
    for source, size, weight in zip(made.environments, sizes, (3, 1.3, 1), strict=True):
        visits = [e.task.id for e in groups if (e.env_id, e.env_kwargs) == (source.id, source.options)]
        assert abs(len(visits) - 200 * weight / 5.3) <= 2
        for start in range(0, len(visits) - size + 1, size):
            assert sorted(visits[start : start + size], key=int) == [str(i) for i in range(size)]
    assert len({tuple(e.env_id for e in step) for step in drawn}) > 3  # in no fixed order within a step


def test_epochs_stay_whole_beside_recordings(tmp_path: Path) -> None:
    recorded = {"source": {"dataset": "unread.jsonl", "student": 0.4}, "episodes_per_step": 6}
    raw = tiny.sft(tmp_path / "run") | {"environments": [prompt_source(tmp_path, 7)], "rollout": recorded}
    made = load_config(raw)
    visits = [e.task.id for step in range(35) for e in draw_episodes(made, step, [7])]
    assert len(visits) == 84 == sum(int(student_groups(made, step).sum()) for step in range(35))
    assert Count(visits) == {str(i): 12 for i in range(7)}


def test_dealing_by_weight_is_exact_and_never_takes_back() -> None:
    before = [0, 0, 0]
    for count in range(500):
        now = dealt(count, [0.1, 0.2, 0.7])
        assert sum(now) == count and all(0 <= b - a <= 1 for a, b in zip(before, now, strict=True))
        before = now
    assert dealt(1000, [0.1, 0.2, 0.7]) == [100, 200, 700] and dealt(5, [0.0, 1.0]) == [0, 5]


def test_paths_in_a_config_count_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sums.jsonl", sums(3))
    text = "name: x\nmethod: sft\nstudent: {model: m}\n"
    text += f"environments: [{{id: {PROMPTS}, options: {{tasks: sums.jsonl}}}}]\n"
    (tmp_path / "x.yaml").write_text(text)
    suite = f"environments: [{{id: {PROMPTS}, tasks: 2, options: {{tasks: sums.jsonl}}}}]\n"
    (tmp_path / "suite.yaml").write_text(suite)
    monkeypatch.chdir("/")
    (source,) = load_config(tmp_path / "x.yaml").environments
    assert split_sizes([source]) == [3]
    result = opd.evaluate(str(tmp_path / "suite.yaml"), ["expert"], split="train")
    assert result["policies"][0]["success"] == 1.0


def test_an_episode_whose_verifier_fails_is_data(tmp_path: Path) -> None:
    source = prompt_source(tmp_path, 4)
    source["options"]["verifier"] = "test_task_files:seven"
    made = config(tmp_path, source)
    played = rolled(draw_episodes(made, 0, [4]), Scripted(lambda history: "3"))
    assert {t.outcome for t in played} == {Outcome.ERROR} and "gave 7" in str(played[0].error)
