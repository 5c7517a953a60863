import contextlib
import gc
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wild_actions import actions, assert_answered

from opd_agents.envs import AgentEnv
from opd_agents.testing import check_agent_env
from opd_agents.tools import ToolError
from opd_agents.tools.files import FileTools, Quota, checked_path
from opd_agents.tools.workspace import Workspace
from opd_agents.types import Task

BAD_PATHS = (
    *("", ".", "/", "./", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//x", "\\x", "a\\..\\b"),
    *("a\x00b", "a\nb", "\ud800", "x" * 201, "ä" * 101, "a/" * 300 + "b", "a/" * 16 + "b", "\u202ex"),
)


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    made = Workspace()
    yield made
    made.close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.txt"
    file.write_text("secret")
    return file


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_paths_are_refused(path: str, workspace: Workspace) -> None:
    with pytest.raises(ToolError, match="bad path"):
        checked_path(path)
    for use in (workspace.__getitem__, workspace.__delitem__, lambda p: workspace.update({p: ""})):
        with pytest.raises(ToolError, match="bad path"):
            use(path)
    assert not list(workspace.root.iterdir())


@pytest.mark.parametrize(
    ("path", "kept"),
    [("a.txt", "a.txt"), ("./a//b/./c", "a/b/c"), ("a/", "a"), ("..a/b..", "..a/b.."), ("ä b", "ä b")],
)
def test_good_paths_are_kept_in_one_way(path: str, kept: str) -> None:
    assert checked_path(path) == kept == checked_path(kept)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "/", "\\", "~", "...", "\x00", " "]), max_size=8))
def test_no_path_leads_out(parts: list[str]) -> None:
    try:
        kept = checked_path("/".join(parts))
    except ToolError:
        return
    assert os.path.normpath(f"/root/{kept}").startswith("/root/") and "//" not in kept


def test_files_are_really_there_and_gone_after_close(workspace: Workspace) -> None:
    workspace["notes/today.txt"] = "grüße\r\n"
    assert (workspace.root / "notes" / "today.txt").read_bytes() == "grüße\r\n".encode()
    assert workspace.root.stat().st_mode & 0o077 == 0
    assert dict(workspace) == {"notes/today.txt": "grüße\r\n"}
    del workspace["notes/today.txt"]
    assert not list(workspace.root.iterdir())  # the folder went with its last file
    workspace.close()
    workspace.close()
    assert not workspace.root.exists()


def test_a_forgotten_workspace_is_deleted() -> None:
    root = Workspace().root
    gc.collect()
    assert not root.exists()


@pytest.mark.parametrize("absolute", [True, False])
def test_links_to_files_are_never_followed(workspace: Workspace, secret: Path, absolute: bool) -> None:
    target = str(secret) if absolute else os.path.relpath(secret, workspace.root)
    (workspace.root / "link.txt").symlink_to(target)
    tools = FileTools(workspace)
    assert list(workspace) == [] == tools.list_files() and tools.search_files("secret") == "not found"
    for use in (
        tools.read_file,
        tools.delete_file,
        lambda p: tools.append_file(p, "x"),
        lambda p: tools.move_file(p, "y"),
    ):
        with pytest.raises(ToolError):
            use("link.txt")
    tools.write_file("link.txt", "mine")  # takes the link's place
    assert workspace["link.txt"] == "mine" and not (workspace.root / "link.txt").is_symlink()
    assert secret.read_text() == "secret"


def test_links_to_folders_are_never_followed(workspace: Workspace, secret: Path) -> None:
    (workspace.root / "out").symlink_to(secret.parent)
    (workspace.root / "self").symlink_to(workspace.root)
    workspace["a.txt"] = "a"
    assert list(workspace) == ["a.txt"]
    for path in ("out/secret.txt", "out/new.txt", "self/a.txt", "out/deep/new.txt"):
        for use in (workspace.__getitem__, workspace.__delitem__, lambda p: workspace.update({p: "x"})):
            with pytest.raises((ToolError, KeyError)):
                use(path)
    assert [p.name for p in secret.parent.iterdir()] == ["secret.txt"] and secret.read_text() == "secret"


def test_a_second_name_of_a_file_outside_is_no_file(workspace: Workspace, secret: Path) -> None:
    os.link(secret, workspace.root / "hard.txt")
    with pytest.raises(ToolError, match="several names"):
        workspace["hard.txt"]
    workspace["hard.txt"] = "mine"
    assert secret.read_text() == "secret" and workspace["hard.txt"] == "mine"


def test_pipes_sockets_and_folders_are_no_files_and_no_hang(workspace: Workspace) -> None:
    os.mkfifo(workspace.root / "pipe")
    (workspace.root / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(workspace.root / "socket"))
        for name in ("pipe", "folder", "socket"):
            with pytest.raises(KeyError):
                workspace[name]
        with pytest.raises(ToolError):
            workspace["folder"] = "x"
        with pytest.raises(KeyError):
            del workspace["folder"]
        assert list(workspace) == []


def test_what_another_program_leaves_is_survived(workspace: Workspace) -> None:
    (workspace.root / "binary").write_bytes(b"\xff\xfe\x00")
    (workspace.root / "large").write_bytes(b"x" * 1_000_001)
    Path(os.fsdecode(os.fsencode(workspace.root) + b"/\xff.txt")).write_text("name of bytes")
    (workspace.root / "two\nlines").write_text("x")
    deep = workspace.root
    for _ in range(40):
        deep = deep / "d"
        deep.mkdir()
    (deep / "deep.txt").write_text("x")
    tools = FileTools(workspace)
    assert list(workspace) == ["binary", "large"] == tools.list_files()
    for path, problem in (("binary", "no text"), ("large", "too large")):
        with pytest.raises(ToolError, match=problem):
            tools.read_file(path)
    assert tools.search_files("x") == "not found" and tools.write_file("a", "x") == "written"


def test_nothing_stays_open(workspace: Workspace) -> None:
    workspace["a/b/c.txt"] = "x"
    os.mkfifo(workspace.root / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path in ("a/b/c.txt", "a", "pipe", "a/x", "none/x", "a/b/c.txt/d"):
        for use in (workspace.get, lambda p: workspace.update({p: "y"}), workspace.__delitem__):
            with contextlib.suppress(ToolError, KeyError):
                use(path)
        list(workspace)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- the tools, the same in memory and in a real folder ----

PATHS = st.sampled_from(["a", "b.txt", "a/b", "a/b/c", "d/e.txt", "./d//e.txt", "../x", ""])
TEXTS = st.sampled_from(["", "x", "x\ny", "y" * 30, "ä\r\n", "x" * 200])
CALLS = st.one_of(
    st.tuples(st.just("write_file"), PATHS, TEXTS), st.tuples(st.just("append_file"), PATHS, TEXTS),
    st.tuples(st.just("edit_file"), PATHS, TEXTS, TEXTS), st.tuples(st.just("move_file"), PATHS, PATHS),
    st.tuples(st.just("copy_file"), PATHS, PATHS), st.tuples(st.just("delete_file"), PATHS),
    st.tuples(st.just("read_file"), PATHS), st.tuples(st.just("list_files"), PATHS),
    st.tuples(st.just("find_files"), st.sampled_from(["*", "a*", "*.txt", "[", "d/?.txt"])),
    st.tuples(st.just("search_files"), TEXTS),
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(CALLS, max_size=14))
def test_memory_and_folder_agree_step_by_step(calls: list[tuple[str, ...]]) -> None:
    def answer(tools: FileTools, call: tuple[str, ...]) -> Any:
        try:
            return getattr(tools, call[0])(*call[1:])
        except ToolError as error:
            return str(error)

    quota = Quota(files=4, file_size=150, total_size=200)
    real = Workspace()
    one, other = FileTools({}, quota), FileTools(real, quota)
    for call in calls:
        assert answer(one, call) == answer(other, call)
        assert dict(sorted(one.files.items())) == dict(real)
        assert len(real) <= 4 and sum(map(len, real.values())) <= 200
    real.close()


def test_reading_goes_on_where_it_was_cut() -> None:
    lines = [f"line {i} " + "x" * (i % 50) for i in range(400)]
    tools, found, start = FileTools({"a": "\n".join(lines)}), [], 1
    while True:
        *shown, last = tools.read_file("a", start).split("\n")
        found += shown
        if not last.startswith("... cut"):
            break
        start = int(last.rpartition("=")[2])
    assert [*found, last] == lines


def test_a_line_that_is_too_long_is_cut() -> None:
    tools = FileTools({"a": "x" * 5000, "b": "x" * 5000 + "\nend"})
    assert tools.read_file("a") == "x" * 4000 + "\n... cut"
    assert tools.read_file("b").endswith("... cut: go on with start=2") and tools.read_file("b", 2) == "end"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("read_file", "x"), "no file 'x'"),
        (("read_file", "a", 3), "a has 2 lines"),
        (("read_file", "a", 0), "a has 2 lines"),
        (("list_files", "x"), "no folder 'x'"),
        (("edit_file", "a", "n", "m"), "3 times"),
        (("edit_file", "a", "", "m"), "0 times"),
        (("edit_file", "a", "zzz", "m"), "0 times"),
        (("move_file", "a", "d/b"), "already there"),
        (("move_file", "a", "a/b"), "a is a file"),
        (("write_file", "d", ""), "d is a folder"),
        (("write_file", "d/b/c", ""), "d/b is a file"),
        (("write_file", "e", "x" * 20_001), "too large"),
        (("write_file", "e", "\ud800"), "no valid Unicode"),
        (("search_files", ""), "no text"),
        (("find_files", "*" * 501), "too long"),
    ],
)
def test_mistakes_are_explained_and_change_nothing(call: tuple[Any, ...], error: str) -> None:
    files = {"a": "one\nnine", "d/b": ""}
    with pytest.raises(ToolError, match=error):
        getattr(FileTools(files), call[0])(*call[1:])
    assert files == {"a": "one\nnine", "d/b": ""}


def test_searches_are_cut_short() -> None:
    tools = FileTools({f"f{i:03}": "needle " + "x" * 500 for i in range(50)})
    hits = tools.search_files("needle").split("\n")
    assert len(hits) == 21 and hits[-1] == "... and 30 more" and max(map(len, hits)) < 140
    assert len(tools.find_files("f*")) == 21 and tools.find_files("f00[1-3]") == ["f001", "f002", "f003"]
    assert tools.find_files("*a" * 240) == []  # many stars are no endless search


class Desk(AgentEnv):
    """Write the task's number into a file of a real folder."""

    split_sizes: ClassVar = {"train": 8}
    max_turns = 6

    def __init__(self) -> None:
        self.files = Workspace()
        tools = FileTools(self.files)
        super().__init__([tools.list_files, tools.read_file, tools.write_file, tools.delete_file])

    def begin(self, task: Task) -> str:
        self.set_state({f"in/{task.id}.txt": "x"})
        return f"Write {task.id} to out.txt."

    def success(self) -> bool:
        return self.files.get("out.txt") == self.task.id

    def get_state(self) -> dict[str, str]:
        return dict(self.files)

    def set_state(self, state: dict[str, str]) -> None:
        self.files.clear()
        self.files.update(state)

    def close(self) -> None:
        self.files.close()


def test_an_environment_over_a_real_folder_forks() -> None:
    check_agent_env(Desk(), n_tasks=3)
    env = Desk()
    env.reset(seed=0, options={"task_id": "3"})
    twin = env.fork()
    step = twin.step(json.dumps({"name": "write_file", "arguments": {"path": "out.txt", "text": "3"}}))
    assert step[0] == "written" and twin.success() and not env.success()
    assert env.files.root != twin.files.root


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_action_is_answered(data: st.DataObject) -> None:
    env = Desk()
    env.reset(seed=0, options={"task_id": "0"})
    words = ["in/0.txt", "out.txt", "../x", "/etc/passwd", "in", "~", "x\x00"]
    assert_answered(env, data.draw(st.lists(actions(env.tools, words), max_size=6)))
    assert all(path.is_relative_to(env.files.root) for path in env.files.root.rglob("*"))
    env.close()
