"""With real server processes, one of the package mcp (slow to start) and one of its own protocol code."""

import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.envs import describe, make
from opd_agents.envs.mcp import McpEnv
from opd_agents.errors import NotForkable, UserError
from opd_agents.testing import check_agent_env
from opd_agents.tools import ToolError
from opd_agents.tools.mcp import McpServer, as_tool
from opd_agents.types import Task, ToolSpec

pytestmark = pytest.mark.real("mcp")
HERE = Path(__file__).parent
NOTES = f"{sys.executable} {HERE / 'notes_server.py'}"
PLAIN = f"{sys.executable} {HERE / 'plain_server.py'}"
WILD = f"{PLAIN} wild"
ID = "opd_agents/Mcp-v0"


class Notes(McpEnv):
    """Write down as many notes as the task asks for."""

    split_sizes: ClassVar = {"train": 3}
    max_turns = 4
    has_expert = True

    def __init__(self, server: str = PLAIN, reset: str | None = "forget") -> None:
        super().__init__(server, reset, timeout=20.0)

    def prompt(self, task: Task) -> str:
        return f"Write down {int(task.id) + 1} notes."

    def success(self) -> bool:
        return self.server.call("read_notes", {}).splitlines() == ["x"] * (int(self.task.id) + 1)

    def expert_action(self) -> str:
        if self.turn:
            return "Done."
        return call("add_note", text="x", times=int(self.task.id) + 1)


def call(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def processes(parent: int | None = None) -> set[str]:
    """The process ids of the test servers that ``parent``, or this process, has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(parent or os.getpid()), "-f", "(notes|plain)_server.py"], capture_output=True
    )
    return set(found.stdout.decode().split())


@pytest.fixture(scope="module")
def shared() -> Iterator[McpServer]:
    server = McpServer(NOTES, timeout=30)
    yield server
    server.close()


@pytest.fixture
def on_http() -> Iterator[tuple[str, subprocess.Popen]]:
    """The URL of a server and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, HERE / "notes_server.py", str(port)])
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if process.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp", process
    finally:
        process.kill()
        process.wait()


def test_tools_are_described_as_the_server_says(shared: McpServer) -> None:
    specs = {spec.name: spec for spec in shared.specs}
    assert list(specs) == ["add_note", "read_notes", "forget", "fail", "draw"]
    assert specs["add_note"].description == "Write a note down."
    assert specs["add_note"].parameters == {
        "type": "object",
        "properties": {"text": {"type": "string"}, "times": {"default": 1, "type": "integer"}},
        "required": ["text"],
    }


def test_answers_are_text(shared: McpServer) -> None:
    tools = {tool.spec.name: tool for tool in shared.tools}
    tools["forget"]({})
    assert tools["read_notes"]({}) == '{"result":[]}'
    assert tools["add_note"]({"text": "é\n日"}) == "1 notes"
    assert shared.call("read_notes", {}) == "é\n日"
    assert shared.call("draw", {}) == "[image]"
    assert (
        len(shared.call("add_note", {"text": "x" * 30_000}))
        < 20
        < len(shared.call("read_notes", {}))
        <= 20_000
    )


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("add_note", {}, "Field required"),
        ("add_note", {"text": 5}, "valid string"),
        ("fail", {}, "Error executing tool fail"),
        ("nope", {}, "Unknown tool: nope"),
    ],
)
def test_refused_calls_are_tool_errors(shared: McpServer, name: str, arguments: Any, problem: str) -> None:
    with pytest.raises(ToolError, match=problem):
        shared.call(name, arguments)


def test_an_argument_that_no_schema_names_is_refused(shared: McpServer) -> None:
    tool = next(tool for tool in shared.tools if tool.spec.name == "add_note")
    with pytest.raises(ToolError, match="bad arguments for add_note: there is no argument 'colour'"):
        tool({"text": "a", "colour": "red"})
    spec = ToolSpec("any", "", {"type": "object", "additionalProperties": {"type": "string"}})
    assert as_tool(spec, lambda name, arguments: f"{name} {arguments}")({"a": "b"}) == "any {'a': 'b'}"


def test_a_server_that_hangs_costs_one_time_out_and_is_stopped() -> None:
    before = processes()
    server = McpServer(WILD, timeout=2)
    start = time.perf_counter()
    with pytest.raises(ToolError, match="did not answer in time"):
        server.call("hang", {})
    assert 2 <= time.perf_counter() - start < 4
    server.close()
    server.close()
    assert processes() <= before


def test_a_server_that_dies_is_an_observation_and_started_again_at_reset() -> None:
    env = Notes(WILD, reset=None)
    env.reset(options={"task_id": "0"})
    assert env.step(call("die"))[0] == '{"error":"the server failed: Connection closed"}'
    assert env.step(call("read_notes"))[0] == '{"error":"the server failed: Connection closed"}'
    env.reset(options={"task_id": "0"})
    assert env.step(call("add_note", text="x"))[0] == "1 notes"
    env.close()


def test_nonsense_is_passed_over_and_floods_are_cut() -> None:
    server = McpServer(WILD, timeout=10)
    assert server.call("babble", {}) == server.call("flood", {}) == "x" * 20_000
    assert server.is_alive()
    server.close()


def test_streamable_http(on_http: tuple[str, subprocess.Popen]) -> None:
    address, process = on_http
    server = McpServer(address, timeout=10)
    assert [spec.name for spec in server.specs][:2] == ["add_note", "read_notes"]
    server.call("forget", {})
    assert server.call("add_note", {"text": "a"}) == "1 notes"
    with pytest.raises(ToolError, match="Unknown tool"):
        server.call("nope", {})
    process.kill()
    process.wait()
    with pytest.raises(ToolError, match="the server"):
        server.call("read_notes", {})
    assert not server.is_alive()
    server.close()


@pytest.mark.parametrize(
    ("server", "problem"),
    [
        ("/no/such/program", "No such file"),
        ("false", "Connection closed"),
        ("sleep 100", "no answer in time"),
        ("python 'x", "No closing quotation"),
        ("http://127.0.0.1:9/mcp", "connection"),
        (" ", "no server"),
    ],
)
def test_what_is_no_server_is_the_users_mistake(server: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"(?i){problem}"):
        McpServer(server, timeout=1)


def test_keeps_the_contract_and_forks_where_the_server_can_reset() -> None:
    before = processes()
    env = Notes()
    check_agent_env(env, n_tasks=2)
    assert env.fork_mode == "replay" and "forget" not in [tool.name for tool in env.tools]
    env.reset(options={"task_id": "1"})
    env.step(call("add_note", text="x"))
    twin = env.fork()
    assert twin.step(call("add_note", text="x"))[0] == env.step(call("add_note", text="x"))[0] == "2 notes"
    twin.close()
    env.close()
    gc.collect()  # the environments that the check has made and dropped
    for _ in range(50):
        if processes() <= before:
            break
        time.sleep(0.1)
    assert processes() <= before


def test_a_fresh_process_is_a_reset_too() -> None:
    env = Notes(reset="restart")
    for _ in range(2):
        env.reset(options={"task_id": "0"})
        assert env.step(call("add_note", text="x"))[0] == "1 notes"
    assert env.step("Done.")[1] == 1.0
    env.close()


def test_without_a_reset_nothing_can_be_forked() -> None:
    env = Notes(reset=None)
    env.reset(options={"task_id": "0"})
    with pytest.raises(NotForkable):
        env.snapshot()
    env.close()
    with pytest.raises(UserError, match="reset must be 'restart' or a tool of the server"):
        Notes(reset="nope")


def test_tasks_from_a_file_over_any_server(tmp_path: Path) -> None:
    rows = [{"prompt": "How many notes?", "answer": 0}, {"prompt": "And of nothing?", "answer": "no notes"}]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = make(ID, server=PLAIN, reset="restart", tasks=path)
    assert env.reset(options={"task_id": "1"})[0] == "And of nothing?"
    assert env.step(call("read_notes"))[0] == "none"
    saved = env.snapshot()
    assert env.step(" no notes ")[1] == 1.0
    env.restore(saved)
    assert env.step("some")[1] == 0.0
    env.close()


def test_the_registered_id_is_described_without_a_server() -> None:
    described = describe(ID)
    assert (described["extra"], described["licence"], described["tools"]) == ("mcp", "MIT", [])


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "server.call('hang', {})"])
def test_no_server_outlives_its_parent(end: str) -> None:
    code = f"""
import os
from opd_agents.tools.mcp import McpServer
server = McpServer({WILD!r}, timeout=4)
os.system(f"pgrep -P {{os.getpid()}} -f plain_server.py")
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent)
    pids = done.stdout.split()
    assert pids
    for pid in pids:
        for _ in range(50):
            if not is_server(pid):
                break
            time.sleep(0.1)
        assert not is_server(pid)


def is_server(pid: str) -> bool:
    try:
        return b"plain_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


NAMES = st.sampled_from(["text", "times", "self", "name", "é"])


@given(st.dictionaries(NAMES, st.integers(max_value=9) | st.text(), max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_arguments_are_answered(shared: McpServer, arguments: dict[str, Any]) -> None:
    tool = next(tool for tool in shared.tools if tool.spec.name == "add_note")
    try:
        assert tool(arguments)
    except ToolError as error:
        assert str(error)
    assert shared.is_alive()
