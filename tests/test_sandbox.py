"""Sandboxes: a folder of plain data and commands in it, alike in every kind; how containers live and end."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layers import loaded_after
from typer.testing import CliRunner

from opd_agents.cli import app
from opd_agents.errors import MissingPart, UserError
from opd_agents.tools import Tool, ToolError
from opd_agents.tools.python import SNIPPET, run_python, shortened
from opd_agents.tools.sandbox import Kind, Limits, Result, Sandbox, open_sandbox, owners
from opd_agents.tools.sandbox.base import check_files

ROOT = Path(__file__).parent.parent
REAL = [
    pytest.param("docker", marks=pytest.mark.real("docker")),
    pytest.param("bubblewrap", marks=pytest.mark.real("bwrap")),
]


@pytest.fixture(scope="module", params=[*REAL, "unsafe"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(request.param) as opened:
        yield opened


def python(sandbox: Sandbox, program: str, **options: Any) -> Result:
    return sandbox.run(["python", "-c", textwrap.dedent(program)], **options)


# ---- files and commands, alike in every kind ----


def test_a_command_finds_the_files_and_leaves_its_own(sandbox: Sandbox) -> None:
    sandbox.put({"a.txt": b"one\n", "deep/er/b.bin": bytes(range(256)), "gone.txt": b""})
    result = python(
        sandbox,
        """
        import os
        print(open("a.txt").read(), len(open("deep/er/b.bin", "rb").read()))
        os.unlink("gone.txt"); os.mkdir("new"); open("new/c.txt", "w").write("made")
        """,
    )
    assert result == Result("one\n 256\n", 0)
    assert sandbox.get() == {"a.txt": b"one\n", "deep/er/b.bin": bytes(range(256)), "new/c.txt": b"made"}
    sandbox.put({"only.txt": b"x"})
    assert sandbox.run(["sh", "-c", "echo *"]).output == "only.txt\n"


def test_nothing_but_files_outlives_a_command(sandbox: Sandbox) -> None:
    sandbox.put({"run.sh": b"echo ran"})
    program = "import os; os.mkdir('empty'); os.symlink('run.sh', 'link'); os.chmod('run.sh', 0o700)"
    assert python(sandbox, program).ok
    program = "import os; print(os.listdir(), oct(os.stat('run.sh').st_mode & 0o111))"
    assert python(sandbox, program).output == "['run.sh'] 0o0\n"


def test_output_is_that_of_both_streams_as_it_came(sandbox: Sandbox) -> None:
    program = "import sys\nfor n in range(3): print(n); print(-n, file=sys.stderr)\nsys.exit(3)"
    assert python(sandbox, program) == Result("0\n0\n1\n-1\n2\n-2\n", 3)
    assert python(sandbox, r"import os; os.write(1, b'a\xffb\0c')").output == "a�b\0c"


def test_standard_input_reaches_the_command(sandbox: Sandbox) -> None:
    given = bytes(range(256)) * 1000
    program = "import sys; print(sys.stdin.buffer.read() == bytes(range(256)) * 1000)"
    assert python(sandbox, program, stdin=given).output == "True\n"
    assert python(sandbox, "print(input())").output.endswith("EOFError: EOF when reading a line\n")


def test_exit_codes(sandbox: Sandbox) -> None:
    assert sandbox.run(["no-such-program"]) == Result("no-such-program: No such file or directory", 127)
    assert python(sandbox, "import os; os.abort()").exit_code == -signal.SIGABRT
    assert python(sandbox, "import os; os._exit(200)").exit_code == 200


def test_a_time_out_keeps_what_was_printed_and_written(sandbox: Sandbox) -> None:
    program = "print('before'); open('kept.txt', 'w').write('x')\nwhile True: pass"
    sandbox.put({})
    assert python(sandbox, program, timeout=1) == Result("before\n", None, "timeout")
    assert sandbox.get() == {"kept.txt": b"x"}
    assert python(sandbox, "print(open('kept.txt').read())").output == "x\n"


@pytest.mark.parametrize("kind", [*REAL, "unsafe"])
def test_a_limit_of_processor_time_is_not_one_of_the_clock(kind: Kind) -> None:
    with open_sandbox(kind, limits=Limits(timeout=20, cpu_seconds=1)) as sandbox:
        assert python(sandbox, "import time; time.sleep(1.5); print('rested')").output == "rested\n"
        started = time.monotonic()
        assert python(sandbox, "print('before')\nwhile True: pass") == Result("before\n", None, "timeout")
        assert time.monotonic() - started < 15
        assert python(sandbox, "print(1)").ok


def test_output_has_an_end(sandbox: Sandbox) -> None:
    result = python(sandbox, "while True: print('x' * 99)")
    assert (result.stopped, result.exit_code) == ("output", None)
    assert len(result.output) == 65536 + len("\n... output cut at 65536 bytes")


def test_runs_are_repeatable(sandbox: Sandbox) -> None:
    program = "import os, socket; print(hash('x'), {'a', 'b', 'c'}, os.environ.get('USER'), os.listdir())"
    sandbox.put({"one": b"", "two": b""})
    assert python(sandbox, program) == python(sandbox, program)


@pytest.mark.real("docker", "bwrap")
def test_tracebacks_are_the_same_everywhere() -> None:
    program = b"import json\njson.loads('{')"
    said = []
    for kind in ("docker", "bubblewrap"):
        with open_sandbox(kind) as sandbox:  # type: ignore[arg-type]
            sandbox.put({"bad.py": program})
            said.append(sandbox.run(["python", "bad.py"]).output)
    assert said[0] == said[1] and "JSONDecodeError" in said[0]
    assert sys.prefix not in said[0] and sys.base_prefix not in said[0].replace("/usr/lib", "")


def test_files_that_are_too_many_or_too_large_are_lost_after_those_before() -> None:
    limits = Limits(files=3, files_mb=1)
    with open_sandbox("unsafe", limits=limits) as sandbox:
        sandbox.put({"z.txt": b"mine"})
        python(sandbox, "for n in range(9): open(f'{n}.bin', 'wb').write(bytes(9 - n))")
        assert set(sandbox.get()) == {"z.txt", "8.bin", "7.bin"}
        python(sandbox, "open('z.txt', 'wb').write(bytes(2 << 20))")
        assert set(sandbox.get()) == {"8.bin", "7.bin"}


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a/./b", "\0", "a\nb"),
        *("\ud800", "x" * 256, "/".join("abcdefghijklmnopq"), "é" * 128),
    ],
)
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with open_sandbox("unsafe") as sandbox:
        sandbox.put({"kept": b""})
        with pytest.raises(ToolError, match="is no path in the work folder"):
            sandbox.put({path: b""})
        assert sandbox.get() == {"kept": b""}


def test_files_that_do_not_fit_are_refused() -> None:
    limits = Limits(files=2, files_mb=1)
    check_files({"a": bytes(1 << 20), "b": b""}, limits)
    for files, said in (
        ({"a": bytes(1 << 20), "b": b"x"}, "1048577 bytes"),
        ({"a": b"", "b": b"", "c": b""}, "3 files are too many"),
        ({"a": b"", "a/b": b""}, "'a' cannot be a file and the folder of 'a/b'"),
    ):
        with pytest.raises(ToolError, match=said):
            check_files(files, limits)


@given(
    st.dictionaries(
        st.text(max_size=40) | st.from_regex(r"[./a-c~]{1,9}"), st.binary(max_size=99), max_size=4
    )
)
@settings(max_examples=60, deadline=None)
def test_files_are_refused_or_come_back(files: dict[str, bytes]) -> None:
    with open_sandbox("unsafe") as sandbox:
        try:
            sandbox.put(files)
        except ToolError:
            assert sandbox.get() == {}
            return
        assert sandbox.run(["true"]).ok
        assert sandbox.get() == files


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result("7\n", 0), "7"),
        (Result("", 0), "(no output)"),
        (Result("oops\n", 1), "oops\n(exit code 1)"),
        (Result("", -11), "(ended by signal 11)"),
        (Result("a", None, "timeout"), "a\n(stopped: it ran for too long)"),
        (Result("", None, "memory"), "(stopped: it used too much memory)"),
    ],
)
def test_a_result_as_an_agent_reads_it(result: Result, text: str) -> None:
    assert result.text() == text


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"memory_mb": 8}, {"pids": 1}, {"cpus": "2"}, {"files": -1}]
)
def test_limits_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Limits(**wrong)


def test_a_closed_sandbox_stays_closed() -> None:
    sandbox = open_sandbox("unsafe")
    sandbox.close()
    sandbox.close()
    with pytest.raises(ValueError, match="closed"):
        sandbox.run(["true"])


def test_unknown_kinds_and_images_of_others_are_refused() -> None:
    with pytest.raises(UserError, match="Unknown sandbox 'podman': it is one of docker, bubblewrap, unsafe"):
        open_sandbox("podman")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="only the docker sandbox has images"):
        open_sandbox("bubblewrap", image="mine")


def test_importing_sandboxes_loads_no_docker() -> None:
    code = "import opd_agents.tools.sandbox, opd_agents.tools.python"
    assert loaded_after(code, "docker", "requests") == set()


# ---- nothing stands in for what is missing ----


def test_no_daemon_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(MissingPart, match="needs a Docker daemon, and none answers"):
        open_sandbox("docker", limits=Limits(pids=31))


def test_no_bubblewrap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPart, match="apt-get install bubblewrap"):
        open_sandbox("bubblewrap")


@pytest.mark.real("docker")
def test_no_image_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_agents.tools.sandbox import docker

    with pytest.raises(MissingPart, match="needs the image opd-agents/no-such, which is not there: build or"):
        open_sandbox("docker", image="opd-agents/no-such")
    monkeypatch.setattr(docker, "IMAGE", "opd-agents/not-built")
    with pytest.raises(MissingPart, match="build it with `opd-agents sandbox build`"):
        open_sandbox("docker")


@pytest.mark.real("docker")
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [('VOLUME ["/data"]', UserError, "declares volumes"), ("CMD sh", MissingPart, "python3")],
)
def test_an_image_that_cannot_serve_is_told(change: str, error: type[Exception], said: str) -> None:
    from opd_agents.tools.sandbox.docker import connect

    client, name = connect(), f"opd-agents/test-{os.getpid()}"
    client.api.import_image_from_data(bytes(1024), name, "latest", [change])
    try:
        with pytest.raises(error, match=said), open_sandbox("docker", image=name) as sandbox:
            sandbox.run(["true"])
    finally:
        discard(name)


# ---- containers ----


def mine(process: int) -> list[Any]:
    """The containers of a process."""
    from opd_agents.tools.sandbox.docker import connect

    found = owners.containers(connect())
    return [container for container in found if f" {process} " in container.labels[owners.LABEL]]


def with_cpus(cpus: float) -> list[Any]:
    """Those of this process whose limits say so."""
    return [c for c in mine(os.getpid()) if c.attrs["HostConfig"]["NanoCpus"] == round(cpus * 1e9)]


def assert_soon(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.1)


def discard(image: str) -> None:
    """Remove an image, and the spares that run of it."""
    from docker.errors import APIError, ImageNotFound

    from opd_agents.tools.sandbox import docker

    def removed() -> bool:
        try:
            client.images.remove(image)
        except APIError as error:
            return isinstance(error, ImageNotFound)
        return True

    client = docker.connect()
    with contextlib.suppress(UserError):
        docker.spares(image, Limits()).stop()
    assert_soon(removed)


@contextlib.contextmanager
def program(text: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of its own, as far as the line that it prints."""
    command = [sys.executable, "-c", textwrap.dedent(text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


@pytest.mark.real("docker")
def test_a_container_has_next_to_nothing() -> None:
    with open_sandbox("docker", limits=Limits(memory_mb=64, pids=16, cpus=0.5)) as sandbox:
        assert sandbox.run(["true"]).exit_code == 127
        config = next(found for c in mine(os.getpid()) if (found := c.attrs["HostConfig"])["PidsLimit"] == 16)
    assert config["NetworkMode"] == "none" and config["ReadonlyRootfs"] and config["AutoRemove"]
    assert config["Memory"] == config["MemorySwap"] == 64 << 20
    assert config["PidsLimit"] == 16
    assert config["CapDrop"] == ["ALL"] and not config["CapAdd"] and not config["Privileged"]
    assert config["SecurityOpt"] == ["no-new-privileges"] and not config["Binds"]


@pytest.mark.real("docker")
@pytest.mark.parametrize("busy", [False, True])
def test_no_container_survives_the_kill_of_its_owner(busy: bool) -> None:
    from opd_agents.tools.sandbox.docker import connect

    then = "sandbox.run(['python', '-c', 'while True: pass'], timeout=300)" if busy else "time.sleep(300)"
    text = f"""
        import time
        from opd_agents.tools.sandbox import open_sandbox
        sandbox = open_sandbox("docker")
        sandbox.run(["python", "-c", "1"])
        print("here", flush=True)
        {then}
    """
    with program(text) as process:
        assert_soon(lambda: len(mine(process.pid)) >= 2)  # its own and a spare
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # One that was killed before its start never runs; it is for the reaper.
        assert_soon(lambda: {container.status for container in mine(process.pid)} <= {"created"})
        owners.reap(connect())
        assert_soon(lambda: not mine(process.pid))


@pytest.mark.real("docker")
def test_a_forked_process_leaves_its_parents_container_alone() -> None:
    text = """
        import os
        from opd_agents.tools.sandbox import open_sandbox
        sandbox = open_sandbox("docker")
        sandbox.put({"a.txt": b"x"})
        sandbox.run(["python", "-c", "open('b.txt', 'w')"])
        child = os.fork()
        for number in range(3):
            assert sandbox.run(["python", "-c", f"print({os.getpid()})"]).output == f"{os.getpid()}\\n"
        assert set(sandbox.get()) == {"a.txt", "b.txt"}
        sandbox.close()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            print("here", flush=True)
    """
    with program(text) as process:
        assert process.wait() == 0
    assert_soon(lambda: not mine(process.pid))


@pytest.mark.real("docker")
def test_closing_ends_the_container_and_spares_are_few() -> None:
    for _ in range(3):
        with open_sandbox("docker", limits=Limits(cpus=0.7)) as sandbox:
            assert python(sandbox, "print(1)").ok
    assert_soon(lambda: len(with_cpus(0.7)) <= 2)


@pytest.mark.real("docker")
def test_a_container_that_was_killed_is_replaced() -> None:
    with open_sandbox("docker", limits=Limits(cpus=0.9)) as sandbox:
        sandbox.put({"a.txt": b"x"})
        assert python(sandbox, "open('b.txt', 'w')").ok
        for container in with_cpus(0.9):
            owners.remove(container)
        assert python(sandbox, "import os; print(sorted(os.listdir()))").output == "['a.txt', 'b.txt']\n"


@pytest.mark.real("docker")
def test_a_container_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_agents.tools.sandbox import supervised

    with open_sandbox("docker", limits=Limits(cpus=0.8)) as sandbox:
        assert python(sandbox, "print(1)").ok
        containers = with_cpus(0.8)
        running = [
            container.attrs["State"]["Pid"] for container in containers if container.status == "running"
        ]
        assert (
            running and 0 not in running
        )  # 0 is a container's that only begins, and the group of this process
        for pid in running:
            os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(supervised, "GRACE", 0.5)
        with pytest.raises(ToolError, match="does not answer"):
            python(sandbox, "print(2)", timeout=0.5)
        monkeypatch.undo()
        for container in containers:
            owners.remove(container)
        assert python(sandbox, "print(3)").output == "3\n"


@pytest.mark.real("docker")
def test_many_threads_start_and_end_containers_at_once() -> None:
    """More addresses than a client of docker's keeps connections to: shared, it would close those in use."""
    from opd_agents.tools.sandbox.docker import own_client

    def one(number: int) -> str:
        with open_sandbox("docker", limits=Limits(cpus=0.6)) as sandbox:
            return python(sandbox, f"print({number})").output

    with ThreadPoolExecutor(6) as pool:
        assert pool.submit(own_client).result() is not own_client()
        assert list(pool.map(one, range(36))) == [f"{number}\n" for number in range(36)]


@pytest.mark.real("docker")
def test_the_reaper_removes_containers_of_the_dead_only() -> None:
    from opd_agents.tools.sandbox import docker

    client = docker.connect()
    with program("import time; print('here', flush=True); time.sleep(60)") as process:
        place = owners.owner().rsplit(" ", 2)[0]
        label = f"{place} {process.pid} {owners.began(process.pid)}"
        options = docker.options(Limits()) | {"labels": {owners.LABEL: label}}
        container = client.containers.create(docker.IMAGE, **options)
        owners.reap(client)
        assert mine(process.pid) == [container]
        process.kill()
        assert_soon(lambda: owners.is_gone(label))  # though nobody has waited for it yet
        owners.reap(client)
        assert mine(process.pid) == []


def test_an_owner_is_known_by_when_it_began_and_where() -> None:
    boot, namespace, pid, began = owners.owner().split(" ")
    assert not owners.is_gone(owners.owner())
    assert owners.is_gone(f"{boot} {namespace} {pid} {int(began) - 1}")  # the number was given again
    assert not owners.is_gone(f"{boot} pid:[1] {pid} 1")  # of another container: not for us to say
    assert not owners.is_gone(f"another-machine {namespace} {pid} 1")


# ---- the image and the command line ----


@pytest.mark.real("docker")
def test_the_image_says_what_is_in_it_and_is_built_once() -> None:
    from opd_agents.tools.sandbox import image

    name = f"opd-agents/test-build-{os.getpid()}"
    made = image.build(name=name)
    try:
        labels = image.labels(name)
        assert labels is not None and labels["source"] == "host" and labels["digest"].startswith("sha256:")
        assert "libc.so" in labels["packages"]
        assert image.build(name=name) == made
        with open_sandbox("docker", image=name) as sandbox:
            modules = "json, sqlite3, ssl, ctypes, asyncio, unittest, decimal, zlib, bz2, lzma, hashlib, uuid"
            assert python(sandbox, f"import {modules}, sys; print(sys.version.split()[0])").output == (
                labels["python"] + "\n"
            )
    finally:
        discard(name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.real("docker", "debootstrap")
def test_an_image_of_debian() -> None:
    from opd_agents.tools.sandbox import image

    name = f"opd-agents/test-debian-{os.getpid()}"
    image.build("debian", name)
    try:
        labels = image.labels(name)
        assert labels is not None and "python3=" in labels["packages"]
        with open_sandbox("docker", image=name) as sandbox:
            sandbox.put({"a.txt": b"x"})
            result = sandbox.run(["sh", "-c", "cat a.txt; python -V; id -u"])
            assert result.output == f"xPython {labels['python']}\n65534\n"
    finally:
        discard(name)


@pytest.mark.real("docker")
def test_the_command_line_shows_and_cleans() -> None:
    shown = CliRunner().invoke(app, ["sandbox", "status"])
    assert shown.exit_code == 0 and "opd-agents/sandbox:latest" in shown.stdout
    cleaned = CliRunner().invoke(app, ["sandbox", "clean"])
    assert cleaned.exit_code == 0 and cleaned.stdout.startswith("Removed ")


@pytest.mark.parametrize("command", ["build", "status", "clean"])
def test_the_command_line_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    result = CliRunner().invoke(app, ["sandbox", command])
    assert result.exit_code == 2 and "needs a Docker daemon" in result.stderr
    assert (
        f"Example: opd-agents sandbox {command}" in CliRunner().invoke(app, ["sandbox", command, "-h"]).stdout
    )


# ---- the tool ----


@pytest.fixture(scope="module", params=REAL)
def tool(request: pytest.FixtureRequest) -> Iterator[tuple[Sandbox, Tool]]:
    with open_sandbox(request.param, limits=Limits(timeout=2)) as sandbox:
        yield sandbox, run_python(sandbox, max_chars=500)


def test_run_python_shows_what_is_printed_and_keeps_files(tool: tuple[Sandbox, Tool]) -> None:
    sandbox, run = tool
    sandbox.put({"data.txt": b"41", SNIPPET: b"my own"})
    assert (
        run({"code": "n = int(open('data.txt').read()) + 1\nopen('out.txt', 'w').write(str(n))\nprint(n)"})
        == "42"
    )
    assert sandbox.get() == {"data.txt": b"41", "out.txt": b"42", SNIPPET: b"my own"}
    assert run({"code": ""}) == "(no output)"
    assert run({"code": "1 / 0"}).endswith("ZeroDivisionError: division by zero\n(exit code 1)")
    assert run({"code": "print('x' * 10_000)"}).count("... 9500 characters left out ...") == 1


@given(st.text() | st.sampled_from(["\ud800", "\0", "import os; os._exit(0)", "(" * 10_000, "while 1: pass"]))
@settings(max_examples=15, deadline=None)
def test_run_python_always_answers(tool: tuple[Sandbox, Tool], code: str) -> None:
    try:
        assert len(tool[1]({"code": code})) < 600
    except ToolError as error:
        assert str(error)


def test_a_text_is_shortened_in_its_middle() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdef", 4) == "ab\n... 2 characters left out ...\nef"
