"""Hostile programs in the real sandboxes: each is contained, and the sandbox works on."""

import contextlib
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from textwrap import dedent

import pytest

from opd_agents.tools import ToolError
from opd_agents.tools.sandbox import Limits, Result, Sandbox, open_sandbox

BOTH = [
    pytest.param("docker", marks=pytest.mark.real("docker")),
    pytest.param("bubblewrap", marks=pytest.mark.real("bwrap")),
]
PARTS = {"bin", "lib", "lib64", "usr", "etc", "dev", "proc", "sys", "tmp", "work", ".dockerenv"}
KEPT = {"notes/kept.txt": b"mine"}


@pytest.fixture(scope="module")
def opened() -> Iterator[dict[str, Sandbox]]:
    made: dict[str, Sandbox] = {}
    yield made
    for sandbox in made.values():
        sandbox.close()


@pytest.fixture(params=BOTH)
def sandbox(request: pytest.FixtureRequest, opened: dict[str, Sandbox]) -> Sandbox:
    return chosen(request.param, opened)


@pytest.fixture(params=[pytest.param("docker", marks=pytest.mark.real("docker"))])
def container(request: pytest.FixtureRequest, opened: dict[str, Sandbox]) -> Sandbox:
    """For what only Docker stops."""
    return chosen(request.param, opened)


def chosen(kind: str, opened: dict[str, Sandbox]) -> Sandbox:
    if kind not in opened:
        opened[kind] = open_sandbox(kind, limits=Limits(timeout=5))  # type: ignore[arg-type]
    opened[kind].put(KEPT)
    return opened[kind]


def assert_contained(sandbox: Sandbox, program: str, timeout: float | None = None) -> Result:
    """Run a program; afterwards the sandbox must work, and hold the files, as if nothing had happened."""
    sandbox.put(KEPT | {"attack.py": dedent(program).encode()})
    result = sandbox.run(["python", "attack.py"], timeout=timeout)
    files = sandbox.get()
    assert files["notes/kept.txt"] == b"mine"
    after = sandbox.run(["python", "-c", "import os; print(2 + 2, sorted(os.listdir()))"])
    assert after.output == f"4 {sorted({path.split('/')[0] for path in files})}\n"
    return result


def test_a_fork_bomb_ends_at_the_limit_of_processes(container: Sandbox) -> None:
    result = assert_contained(
        container,
        """
        import os, time
        count = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(60)
                count += 1
        except BlockingIOError:
            print("forks", count)
        """,
    )
    assert result.exit_code == 0
    assert 8 < int(result.output.split()[1]) < 32


def test_a_doubling_fork_bomb_is_killed_whole(container: Sandbox) -> None:
    program = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """
    assert assert_contained(container, program, timeout=1).stopped == "timeout"


def test_threads_end_at_the_limit_of_processes(container: Sandbox) -> None:
    result = assert_contained(
        container,
        """
        import threading, time
        for number in range(1000):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        """,
    )
    assert "can't start new thread" in result.output


def test_memory_is_limited(container: Sandbox) -> None:
    result = assert_contained(container, "print('before', flush=True)\nx = bytearray(1 << 30)")
    assert (result.stopped, result.exit_code, result.output) == ("memory", None, "before\n")


def test_memory_of_a_child_is_limited(container: Sandbox) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(1 << 30)'])"
    assert assert_contained(container, program).stopped == "memory"


@pytest.mark.real("bwrap")
def test_bubblewrap_limits_the_memory_of_one_process(opened: dict[str, Sandbox]) -> None:
    result = assert_contained(chosen("bubblewrap", opened), "x = bytearray(1 << 30)")
    assert result.exit_code == 1 and "MemoryError" in result.output


def test_the_disk_is_limited(sandbox: Sandbox) -> None:
    result = assert_contained(
        sandbox,
        """
        for folder in "/work", "/tmp", "/dev/shm":
            written = 0
            try:
                for number in range(10):
                    with open(f"{folder}/full{number}", "wb", buffering=0) as file:
                        for _ in range(7):
                            written += file.write(bytes(1 << 20))
            except OSError as error:
                print(14 <= written >> 20 <= 16, error.strerror)
        """,
    )
    assert result.output == "True No space left on device\n" * 3


def test_one_file_is_limited(sandbox: Sandbox) -> None:
    result = assert_contained(sandbox, "open('sparse', 'wb').truncate(1 << 40)")
    assert result.exit_code != 0 and sandbox.get()["sparse"] == b""
    assert_contained(sandbox, "open('sparse', 'wb').truncate(8 << 20)")
    assert "sparse" not in sandbox.get()  # larger than what outlives a command


def test_many_files_are_limited(container: Sandbox) -> None:
    result = assert_contained(
        container,
        """
        try:
            for number in range(100_000):
                open(f"file{number}", "w").close()
        except OSError as error:
            print(number < 5000, error.strerror)
        """,
    )
    assert result.output == "True No space left on device\n"
    assert len(container.get()) <= container.limits.files


def test_nothing_else_can_be_written(sandbox: Sandbox) -> None:
    result = assert_contained(
        sandbox,
        """
        import os
        written = []
        for folder, below, _ in os.walk("/"):
            below[:] = [name for name in below if not name.startswith("python3.")]
            if not folder.startswith(("/proc/", "/sys/", "/work", "/tmp", "/dev/shm", "/dev/mqueue")):
                try:
                    open(f"{folder}/mine", "w")
                    written.append(folder)
                except OSError:
                    pass
        print(written)
        """,
    )
    assert result.output == "[]\n"


def test_there_is_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        program = f"""
            import socket
            for address in ("127.0.0.1", "172.17.0.1", "169.254.169.254", "1.1.1.1"):
                for port in ({server.getsockname()[1]}, 2375, 80, 53):
                    try:
                        socket.create_connection((address, port), timeout=0.5)
                        print("connected", address, port)
                    except OSError:
                        pass
            try:
                print(socket.getaddrinfo("deb.debian.org", 80))
            except OSError:
                print("no names")
            print([name for _, name in socket.if_nameindex()])
            """
        result = assert_contained(sandbox, program)
        with pytest.raises(TimeoutError):
            server.accept()
    names, interfaces = result.output.splitlines()
    assert names == "no names"
    assert "lo" in interfaces and "eth" not in interfaces


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\nfor n in 1, 2, 3, 13, 15: signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os\nos.close(1); os.close(2)\nwhile True: pass",
        "import sys; sys.stdin.read(); __import__('time').sleep(60)",
        "(lambda: 9 ** 9 ** 9)()",
    ],
    ids=["loop", "sleep", "ignores-signals", "stops-itself", "closes-output", "stdin", "huge-number"],
)
def test_what_never_ends_is_stopped(sandbox: Sandbox, program: str) -> None:
    assert assert_contained(sandbox, program, timeout=0.5).stopped == "timeout"


@pytest.mark.parametrize(
    "program",
    [
        "while True: print('x' * 1000)",
        "import sys\nwhile True: sys.stderr.write('\\x00\\xff' * 1000)",
        "import os\nos.fork(); os.fork()\nwhile True: os.write(1, b'\\xff' * 65536)",
    ],
    ids=["print", "zeros", "four-processes"],
)
def test_endless_output_is_cut(sandbox: Sandbox, program: str) -> None:
    result = assert_contained(sandbox, program)
    assert result.stopped == "output"
    assert result.output.endswith("... output cut at 65536 bytes")
    assert len(result.output) < 66_000


def test_no_signal_reaches_the_program_inside(sandbox: Sandbox) -> None:
    result = assert_contained(
        sandbox,
        """
        import os, signal
        for number in sorted(signal.valid_signals()):
            try:
                os.kill(1, number)
            except OSError as error:
                print(error)
        print("sent")
        """,
    )
    assert result.exit_code == 0 and result.output.endswith("sent\n")


def test_a_program_that_kills_all_kills_itself(sandbox: Sandbox) -> None:
    program = "import os, signal; os.fork(); os.kill(-1, signal.SIGKILL); os.kill(os.getpid(), 9)"
    assert assert_contained(sandbox, program).exit_code == -9


def test_the_program_inside_is_closed_to_commands(sandbox: Sandbox) -> None:
    result = assert_contained(
        sandbox,
        """
        import ctypes, os
        for path, mode in (("fd/0", "rb"), ("fd/1", "wb"), ("mem", "rb"), ("environ", "rb"), ("mem", "wb")):
            try:
                open(f"/proc/1/{path}", mode)
                print("opened", path)
            except OSError:
                pass
        libc = ctypes.CDLL(None, use_errno=True)
        print("attached", libc.ptrace(16, 1, 0, 0))
        """,
    )
    assert result.output == "attached -1\n"


def test_a_command_that_tampers_with_the_program_inside_has_no_result(sandbox: Sandbox) -> None:
    with pytest.raises(ToolError, match="broke down"):
        assert_contained(sandbox, "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))")
    assert sandbox.run(["python", "-c", "print('on')"]).output == "on\n"
    assert sandbox.get()["notes/kept.txt"] == b"mine"


def test_no_process_outlives_its_command(sandbox: Sandbox) -> None:
    result = assert_contained(
        sandbox,
        """
        import os, sys, time
        if os.fork() == 0:  # a daemon, in a session of its own, without the command's output
            os.setsid()
            if os.fork() == 0:
                for descriptor in (0, 1, 2):
                    os.close(descriptor)
                time.sleep(2)
                open("/work/notes/kept.txt", "w").write("changed")
        sys.exit(0)
        """,
    )
    assert result.exit_code == 0
    found = sandbox.run(["python", "-c", "import os; print([n for n in os.listdir('/proc') if n.isdigit()])"])
    assert len(eval(found.output)) == 2  # the program inside, and this one


def test_no_file_of_the_machine_is_there(sandbox: Sandbox) -> None:
    with tempfile.NamedTemporaryFile(suffix="-secret") as secret:
        result = assert_contained(
            sandbox,
            f"""
            import os
            print([path for path in ({secret.name!r}, {__file__!r}, {sys.prefix!r}) if os.path.exists(path)])
            print(sorted(set(os.listdir("/")) - {PARTS}), os.path.exists("/var/run/docker.sock"))
            for path in ("/etc/shadow", "/proc/kcore", "/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda"):
                try:
                    print("read", path, open(path, "rb").read(1))
                except OSError:
                    pass
            """,
        )
    assert result.output == "[]\n[] False\n"


def test_links_lead_nowhere(sandbox: Sandbox) -> None:
    result = assert_contained(
        sandbox,
        """
        import os
        os.symlink("/etc/passwd", "passwd")
        os.symlink("/", "root")
        os.symlink("../../..", "notes/up")
        os.symlink("loop", "loop")
        os.mkfifo("pipe")
        os.rename("notes", "moved"); os.symlink("moved", "notes")
        os.unlink("notes"); os.rename("moved", "notes")
        open("plain", "w").write("kept")
        """,
    )
    assert result.exit_code == 0, result.output
    assert set(sandbox.get()) == {"attack.py", "notes/kept.txt", "plain"}


def test_a_folder_that_cannot_be_emptied_costs_a_fresh_sandbox(sandbox: Sandbox) -> None:
    assert_contained(
        sandbox,
        """
        import os
        for number in range(1500):  # deeper than Python recurses
            os.mkdir("d")
            os.chdir("d")
        """,
    )
    assert_contained(
        sandbox, "import os; os.mkdir('shut'); open('shut/x', 'w'); os.chmod('shut', 0); os.chmod('.', 0o500)"
    )


def test_odd_names_are_left_out(sandbox: Sandbox) -> None:
    program = r"""
        for name in (b"\xff\xfe", b"new\nline", b"tab\tbed", b"fine", "naïve".encode()):
            open(b"/work/" + name, "w").close()
        """
    assert_contained(sandbox, program)
    assert set(sandbox.get()) == {"attack.py", "notes/kept.txt", "fine", "naïve"}


def test_there_are_no_privileges_and_no_way_to_any(sandbox: Sandbox) -> None:
    result = assert_contained(
        sandbox,
        """
        import ctypes, os
        status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
        print(os.getuid(), os.geteuid(), status["CapEff"], status["CapBnd"], status["NoNewPrivs"])
        libc = ctypes.CDLL(None, use_errno=True)
        calls = {
            "setuid": libc.setuid(0), "setgid": libc.setgid(0), "chroot": libc.chroot(b"/tmp"),
            "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), "umount": libc.umount2(b"/work", 2),
            "hostname": libc.sethostname(b"x", 1), "nice": os.system("exit 0") or libc.setpriority(0, 0, -5),
            "klog": libc.klogctl(3, ctypes.create_string_buffer(64), 64),
        }
        print([name for name, value in calls.items() if value >= 0])
        """,
    )
    assert result.output == "65534 65534 0000000000000000 0000000000000000 1\n[]\n"


def test_docker_refuses_new_namespaces(container: Sandbox) -> None:
    program = "import ctypes; print([ctypes.CDLL(None).unshare(1 << bit) for bit in (17, 28, 29, 30)])"
    assert assert_contained(container, program).output == "[-1, -1, -1, -1]\n"


def test_open_files_are_limited(sandbox: Sandbox) -> None:
    result = assert_contained(sandbox, "files = [open('/dev/null') for _ in range(1000)]")
    assert "Too many open files" in result.output


def test_odd_commands_are_answered(sandbox: Sandbox) -> None:
    for command in ([], [""], ["no such"], ["python\0"], ["\ud800"], ["x" * 300_000], ["/"], ["/proc/1/mem"]):
        assert sandbox.run(command).exit_code == 127
    assert sandbox.run(["python", "-c", "print('on')"]).output == "on\n"


def test_sandboxes_at_once_do_not_meet(container: Sandbox) -> None:
    def play(number: int) -> None:
        with open_sandbox("docker") as own:
            own.put({"a.txt": str(number).encode()})
            program = "import os; open('b.txt', 'w').write(open('a.txt').read() * 2); print(os.listdir())"
            seen[number] = own.run(["python", "-c", program]).output
            kept[number] = own.get()

    seen: dict[int, str] = {}
    kept: dict[int, dict[str, bytes]] = {}
    threads = [threading.Thread(target=play, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    with contextlib.ExitStack() as joined:
        for thread in threads:
            joined.callback(thread.join)
    assert {number: files["b.txt"] for number, files in kept.items()} == {
        n: f"{n}{n}".encode() for n in range(4)
    }
    assert len(seen) == 4
