"""The program inside a sandbox: it lays out files, runs one command after the other, and reads files back.

It is sent as source text to the ``python3`` of any image, so it needs nothing but the standard library, from
Python 3.8 on. As process 1 of its namespace it feels no signal from within, and ends all that a command left
running; being undumpable, it is closed to commands of its own user. It ends with the line to its owner.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import resource
import select
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from typing import IO, Any

IDLE_SECONDS = 1800  # then it ends by itself: whoever holds the line may have forgotten it
PR_SET_DUMPABLE = 4
OOM_COUNTERS = ("/sys/fs/cgroup/memory/memory.oom_control", "/sys/fs/cgroup/memory.events")  # cgroups 1 and 2
STDIN, STDOUT = 0, 1  # the two ends of the line


class OwnerGone(Exception):
    """The line ended while a command ran."""


def execute(
    command: Sequence[str],
    folder: str,
    stdin: bytes,
    timeout: float,
    cap: int,
    *,
    alone: bool,
    prepare: Callable[[], None] | None = None,
    line: int | None = None,
) -> tuple[bytes, int | None, str | None]:
    """Run a command: its output, its exit code (None: stopped) and why it was stopped.

    With ``alone`` every other process of the namespace is taken for one of the command's and killed at the
    end; else its process group is. ``line`` is a file descriptor that becomes readable when the owner goes.
    """
    if command[:1] in (["python"], ["python3"]):
        command = [sys.executable, *command[1:]]
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment(folder), start_new_session=True, preexec_fn=prepare,
            )  # fmt: skip
        except (OSError, ValueError, IndexError) as error:  # no such program, or no such arguments
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return f"{' '.join(command[:1])[:80]}: {reason}".encode(errors="replace"), 127, None
    assert process.stdout is not None
    output = bytearray()
    try:
        stopped = _watch(process, process.stdout, output, timeout, cap, line)
    finally:
        _end(process, alone)
    _drain(process.stdout, output, cap)
    if stopped is None and len(output) > cap:
        stopped = "output"
    if stopped is None and process.returncode == -signal.SIGXCPU:
        stopped = "timeout"
    return bytes(output[:cap]), None if stopped else process.returncode, stopped


def limit_cpu(seconds: int) -> None:
    """End this process by a signal after so many seconds of a core's time, and surely a second later."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def environment(folder: str) -> dict[str, str]:
    """What makes runs repeatable, and shows what was printed before a stop."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8", "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def _watch(
    process: subprocess.Popen[bytes],
    pipe: IO[bytes],
    output: bytearray,
    timeout: float,
    cap: int,
    line: int | None,
) -> str | None:
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        if line is not None:
            waiting.register(line, selectors.EVENT_READ)
        tick = 0.02
        while process.poll() is None:
            for key, _ in waiting.select(tick):
                if key.fileobj == line:
                    raise OwnerGone
                chunk = os.read(key.fd, 65536)
                output += chunk
                if not chunk:
                    waiting.unregister(pipe)
                    tick = 0.001  # most commands end with their output
            if len(output) > cap:
                return "output"
            if time.monotonic() >= deadline:
                return "timeout"
    return None


def _end(process: subprocess.Popen[bytes], alone: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if alone:
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ChildProcessError):
        while alone:
            os.waitpid(-1, 0)


def _drain(pipe: IO[bytes], output: bytearray, cap: int) -> None:
    os.set_blocking(pipe.fileno(), False)  # something that escaped may still hold the other end
    with pipe, contextlib.suppress(BlockingIOError):
        while len(output) <= cap:
            chunk = os.read(pipe.fileno(), 65536)
            if not chunk:
                return
            output += chunk


def write_files(folder: str, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        place = os.path.join(folder, path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(content)


def read_files(folder: str, before: Collection[str], count: int, size: int) -> dict[str, bytes]:
    """The regular files below ``folder`` that fit: those of ``before`` first, and then the smallest."""
    found, folders = [], [""]
    while folders:
        below = folders.pop()
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.is_dir(follow_symlinks=False) and path.count("/") < 16:
                    folders.append(path)
                elif entry.is_file(follow_symlinks=False):
                    found.append((path not in before, entry.stat(follow_symlinks=False).st_size, path))
    kept: dict[str, bytes] = {}
    for _, length, path in sorted(found):
        if length > size or len(kept) == count:
            continue
        with contextlib.suppress(OSError), open(os.path.join(folder, path), "rb") as file:
            kept[path] = file.read(length)
            size -= length
    return kept


def empty(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def send(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    data = struct.pack(">Q", len(data)) + data
    while data:
        data = data[os.write(STDOUT, data) :]


def receive() -> Any:
    """The next message; None at the end of the line, or when nothing comes for long."""
    if not select.select([STDIN], [], [], IDLE_SECONDS)[0]:
        return None
    head = _read(8)
    return json.loads(_read(struct.unpack(">Q", head)[0])) if head else None


def _read(length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = os.read(STDIN, length - len(data))
        if not chunk:
            return b""
        data += chunk
    return bytes(data)


def oom_kills() -> int:
    for path in OOM_COUNTERS:
        with contextlib.suppress(OSError), open(path) as lines:
            return sum(int(line.split()[1]) for line in lines if line.split()[0] == "oom_kill")
    return 0


def own_limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(number) for number in range(16)]


def serve(request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Run a request's command on its files."""

    def prepare() -> None:
        # Dumpable again: else its own files in /proc would not be the command's.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # the kernel shall choose the command, not the program inside
        for name, value in settings["rlimits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        if settings["cpu_seconds"] is not None:
            limit_cpu(settings["cpu_seconds"])

    folder, killed, own = settings["writable"][0], oom_kills(), own_limits()
    for place in settings["writable"]:
        empty(place)
    write_files(folder, {path: base64.b64decode(data) for path, data in request["files"].items()})
    output, exit_code, stopped = execute(
        request["command"], folder, base64.b64decode(request["stdin"]), request["timeout"],
        settings["output_bytes"], alone=True, prepare=prepare, line=STDIN,
    )  # fmt: skip
    if oom_kills() > killed:
        exit_code, stopped = None, "memory"
    if (
        own_limits() != own
    ):  # one user's processes may set each other's: nothing that follows could be relied on
        sys.exit("a command changed the limits of the program inside")
    files = read_files(folder, request["files"], settings["files"], settings["files_bytes"])
    return {
        "output": base64.b64encode(output).decode(),
        "exit_code": exit_code,
        "stopped": stopped,
        "files": {path: base64.b64encode(data).decode() for path, data in files.items()},
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    if os.getpid() != 1:  # else it would end all processes of its user
        sys.exit("the program inside a sandbox must be process 1")
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which process 1 does not feel
    send({"ready": True})
    with contextlib.suppress(OwnerGone, BrokenPipeError):
        while True:
            request = receive()
            if request is None:
                return
            send(serve(request, settings))


if __name__ == "__main__":
    main()
