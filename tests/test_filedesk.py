import collections
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wild_actions import actions, assert_answered

from opd_agents.envs.filedesk import FileDesk
from opd_agents.envs.filedesk.world import LEVELS, draw_office
from opd_agents.errors import UnknownName, UserError
from opd_agents.testing import check_agent_env
from opd_agents.tools import random_call

ID = "opd_agents/FileDesk-v0"


def started(task_id: int = 0, level: str = "easy", split: str = "train", **kwargs: Any) -> FileDesk:
    env = FileDesk(level, **kwargs)
    env.reset(seed=0, options={"split": split, "task_id": str(task_id)})
    return env


def first_task(level: str, words: str) -> int:
    return next(i for i in range(400) if words in draw_office(level, "train", str(i)).prompt)


def do(env: FileDesk, name: str, /, **arguments: Any) -> str:
    return env.step(json.dumps({"name": name, "arguments": arguments}))[0]


def finish(env: FileDesk) -> bool:
    info: dict[str, Any] = {"success": False}
    while not env.over:
        info = env.step(env.expert_action())[4]
    return bool(info["success"])


@pytest.mark.parametrize("level", LEVELS)
def test_keeps_the_environment_contract(level: str) -> None:
    check_agent_env(ID, level=level, n_tasks=3)


@pytest.mark.parametrize(("level", "low", "high"), [("easy", 3, 3), ("medium", 8, 11), ("hard", 14, 22)])
def test_the_expert_solves_every_task_in_the_expected_length(level: str, low: float, high: float) -> None:
    turns = []
    for i in range(60):
        env = started(i, level, ("train", "validation", "test")[i % 3])
        assert finish(env), env.task
        turns.append(env.turn)
    assert low <= sum(turns) / 60 <= high and max(turns) <= env.max_turns / 2


def bills(env: FileDesk) -> dict[str, dict[str, str]]:
    """The bills as the files tell them, read without the environment's own code."""
    found = {}
    for path, text in env.files.items():
        if re.fullmatch(r"\w+/\d\d\.txt", path):
            found[path] = dict(re.findall(r"(\w+): (\w+)", text))
    return found


def test_goals_are_what_the_words_say() -> None:
    """Verifier and expert against a reading of prompt and files of its own."""
    seen: collections.Counter[str] = collections.Counter()
    for i in range(150):
        env = started(i, "medium")
        before, prompt = bills(env), env.office.prompt
        assert finish(env)
        after = bills(env)
        for client in re.findall(r"total of the open bills of (\w+)", prompt):
            due = sum(
                int(b["amount"]) for b in before.values() if (b["client"], b["state"]) == (client, "open")
            )
            assert f"{client} {due}" in env.notes
            seen["note"] += 1
        for client in re.findall(r"move the paid bills of (\w+) to archive", prompt):
            own = {path: bill for path, bill in before.items() if bill["client"] == client}
            for path, bill in own.items():
                where = path.replace("bills", "archive") if bill["state"] == "paid" else path
                assert after[where] == bill and (path in after) == (bill["state"] == "open")
            seen["archive"] += 1
        for item, client, amount in re.findall(r"the (\w+) of (\w+) costs (\d+)", prompt):
            (path,) = (p for p, b in before.items() if (b["client"], b["item"]) == (client, item))
            assert after[path] == before[path] | {"amount": amount}
            seen["correct"] += 1
        for client in re.findall(r"delete the paid bills of (\w+)", prompt):
            left = [b["state"] for b in after.values() if b["client"] == client]
            assert set(left) <= {"open"}
            seen["delete"] += 1
        for client in re.findall(r"copy the open bills of (\w+) to reminders", prompt):
            copies = {p[-6:] for p in after if p.startswith("reminders/") and after[p]["client"] == client}
            assert copies == {
                p[-6:] for p, b in before.items() if (b["client"], b["state"]) == (client, "open")
            }
            seen["remind"] += 1
        for client in re.findall(r"write the numbers of the open bills of (\w+)", prompt):
            due = sorted(p[-6:-4] for p, b in before.items() if (b["client"], b["state"]) == (client, "open"))
            assert env.files[f"lists/{client}.txt"].split() == due
            seen["list"] += 1
    assert len(seen) == 6 and min(seen.values()) >= 20


def test_easy_texts_are_these() -> None:
    """Pinned: a change here changes every task, so it needs a new version of the environment."""
    env = started(17, "easy", "test")
    assert env.office.prompt == "The rug of evan costs 32: correct the bill."
    assert env.files == {
        "bills/34.txt": "eva cup 41 open",
        "bills/40.txt": "evan rug 26 open",
        "bills/79.txt": "jo chair 29 open",
        "bills/77.txt": "joel pan 25 paid",
    }
    assert do(env, "search_files", text="evan") == "bills/40.txt:1: evan rug 26 open"
    assert do(env, "edit_file", path="bills/40.txt", old="26", new="32") == "edited"
    assert do(env, "done") == "Thank you." and env.success()


@pytest.mark.parametrize("level", LEVELS)
def test_the_expert_mends_whatever_another_agent_has_done(level: str) -> None:
    """Everything can be undone: after random calls of right names and paths it still succeeds."""
    for i in range(25):
        env, rng = started(i, level, max_turns=200), random.Random(i)
        goal, _ = env.office.goal()
        words = [*env.files, *goal, "bills", "archive", "archive/1", "lists", "ana 10", "x"]
        tools = [tool for tool in env.tools if tool.name != "done"]
        for _ in range(25):
            call = random_call(tools, rng, words)
            do(env, call.name, **call.arguments)
        assert finish(env), (level, i)


def test_the_expert_mends_files_put_where_folders_must_be() -> None:
    env = started(first_task("easy", "to archive"), max_turns=50)
    (path,) = (bill.path for bill in env.office.meant(env.office.requests[0]))
    assert do(env, "move_file", path=path, target="archive") == "moved"
    assert "is a file" in do(env, "write_file", path="archive/1.txt", text="")
    assert finish(env)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add_note", {"text": "x"}),
        ("write_file", {"path": "new.txt", "text": ""}),
        ("append_file", {"path": "PATH", "text": " "}),
        ("delete_file", {"path": "PATH"}),
    ],
)
def test_superfluous_changes_fail(name: str, arguments: dict[str, str]) -> None:
    env = started(4)
    asked = env.office.requests[0].client
    other = next(bill.path for bill in env.office.bills if bill.client != asked)
    while "done" not in env.expert_action():
        env.step(env.expert_action())
    assert env.success()
    do(env, name, **{key: value.replace("PATH", other) for key, value in arguments.items()})
    do(env, "done")
    assert env.over and not env.success()


def test_nothing_done_fails() -> None:
    for level in LEVELS:
        env = started(2, level)
        do(env, "done")
        assert env.over and not env.success()


def test_a_search_for_one_name_also_finds_another() -> None:
    trapped = 0
    for i in range(50):
        env = started(i)
        client = env.office.requests[0].client
        trapped += len(do(env, "search_files", text=client).splitlines()) == 2
    assert 10 < trapped < 40


def test_rules_are_needed_at_the_hard_level_only() -> None:
    hard = started(first_task("hard", "to the archive"), "hard")
    folder = hard.office.archive
    assert folder not in hard.office.prompt and f"archive: {folder}\n" in do(
        hard, "read_file", path="rules.txt"
    )
    assert "rules.txt" not in started(0, "medium").files


def test_every_tool_is_there_and_texts_only_remind_of_done() -> None:
    env = started()
    assert len(env.tools) == 14
    digest = env.state_digest()
    assert "done" in say(env, "I am finished.") and env.state_digest() == digest


def say(env: FileDesk, text: str) -> str:
    return env.step(text)[0]


def test_notes_have_numbers_and_limits() -> None:
    env = started(max_turns=100)
    do(env, "add_note", text="a"), do(env, "add_note", text="b")
    assert do(env, "delete_note", number=1) == "deleted" and do(env, "read_notes") == '["b"]'
    assert "there are 1 notes" in do(env, "delete_note", number=2)
    assert "at most" in do(env, "add_note", text="x" * 501)
    answers = [do(env, "add_note", text="c") for _ in range(60)]
    assert answers.count("noted") == 49 and "at most 50" in answers[-1]


def test_a_fork_has_files_of_its_own() -> None:
    env = started(1)
    twin = env.fork()
    do(twin, "write_file", path="new.txt", text="x")
    assert "new.txt" in twin.files and "new.txt" not in env.files
    assert do(env, "list_files") == '["bills/"]'


def test_splits_are_disjoint_by_content() -> None:
    for level in LEVELS:
        drawn = []
        for split in ("train", "validation", "test"):
            offices = (draw_office(level, split, str(i)) for i in range(60))
            drawn.append({office.prompt + str(sorted(office.files().items())) for office in offices})
        assert not (drawn[0] & drawn[1] or drawn[0] & drawn[2] or drawn[1] & drawn[2])
        assert all(len(texts) > 58 for texts in drawn)


def test_bad_options_are_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'easy'"):
        FileDesk("eazy")
    with pytest.raises(UserError, match="max_turns"):
        FileDesk(max_turns=0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_action_is_answered(data: st.DataObject) -> None:
    env = started(0, data.draw(st.sampled_from(list(LEVELS))))
    words = [*env.files, "../x", "/etc/passwd", "bills", "\x00", "*" * 400, "[" * 400, "bills/../../x"]
    assert_answered(env, data.draw(st.lists(actions(env.tools, words), max_size=6)))
