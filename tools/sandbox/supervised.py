"""Sandboxes with the program of ``inside.py`` in them: the host's end of the line, and a run over it."""

from __future__ import annotations

import base64
import contextlib
import importlib.resources
import json
import os
import select
import socket
import struct
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from opd_agents.tools.base import ToolError
from opd_agents.tools.sandbox.base import Limits, Ran, Sandbox

GRACE = 10.0  # seconds beyond a command's time-out in which the program inside must have answered
WRITABLE = ("/work", "/tmp", "/dev/shm")  # the folders that are, each of its own small memory
LARGEST = 1 << 28  # bytes of an answer


def program(limits: Limits, rlimits: Mapping[str, int] = MappingProxyType({})) -> list[str]:
    """The command that starts the program inside; ``rlimits`` are further ones of the ``resource`` module."""
    settings = {
        "writable": WRITABLE,
        "output_bytes": limits.output_bytes,
        "cpu_seconds": limits.cpu_seconds,
        "files": limits.files,
        "files_bytes": limits.files_mb << 20,
        "rlimits": {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64, "RLIMIT_FSIZE": limits.disk_mb << 20, **rlimits},
    }
    source = importlib.resources.files("opd_agents.tools.sandbox").joinpath("inside.py").read_text("utf-8")
    return ["python3", "-I", "-S", "-c", source, json.dumps(settings)]


class Line:
    """The host's end of the line to a program inside, which ends when this is closed.

    ``receive(n)`` of the connection gives at most n bytes and b"" at its end, as a socket's does.
    """

    def __init__(self, connection: socket.socket, receive: Callable[[int], bytes]) -> None:
        self._connection = connection
        self._receive = receive

    def ask(self, request: dict[str, Any], timeout: float) -> Any:
        """Send a request and wait for its answer. Raises TimeoutError, and other OSErrors for a line that
        is broken."""
        data = json.dumps(request).encode()
        self._connection.settimeout(timeout)
        self._connection.sendall(struct.pack(">Q", len(data)) + data)
        return self.answer(timeout)

    def is_open(self) -> bool:
        """Whether the program inside is there, waiting for a request."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return not poll.poll(0)

    def answer(self, timeout: float) -> Any:
        """The next message from within."""
        deadline = time.monotonic() + timeout
        length = struct.unpack(">Q", self._read(8, deadline))[0]
        if length > LARGEST:
            raise ConnectionError(f"an answer of {length} bytes")
        return json.loads(self._read(length, deadline))

    def _read(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self._receive(min(length - len(data), 1 << 20))
            if not chunk:
                raise ConnectionError("the program inside ended")
            data += chunk
        return bytes(data)

    def close(self) -> str:
        """End the line, and with it the program inside; what that complained about, where it can be known."""
        with contextlib.suppress(OSError):  # closing alone would wait for other holders of the connection
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        return ""

    def kill(self) -> None:
        """End a program that does not end with its line."""
        self.close()


class SupervisedSandbox(Sandbox):
    """A sandbox that starts its program inside with the first command, and anew after a stop."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._line: Line | None = None
        self._process = os.getpid()

    @abstractmethod
    def _open(self) -> Line:
        """The line to a program that has said hello."""

    def _execute(self, command: list[str], stdin: bytes, timeout: float) -> Ran:
        request = {
            "command": command,
            "stdin": base64.b64encode(stdin).decode(),
            "timeout": timeout,
            "files": {path: base64.b64encode(content).decode() for path, content in self._files.items()},
        }
        # Once more, where the last command left a folder that cannot be emptied: a run needs its files only.
        reply = self._ask(request) or self._ask(request)
        if reply is None:
            raise ToolError("the sandbox broke down")
        if reply["stopped"] is not None:
            self._release()
        files = {path: base64.b64decode(data) for path, data in reply["files"].items()}
        return base64.b64decode(reply["output"]), reply["exit_code"], reply["stopped"], files

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._process != os.getpid():  # a forked copy: the line is its parent's
            self._process, self._line = os.getpid(), None
        if self._line is not None and not self._line.is_open():  # it was idle for long
            self._release()
        line = self._line = self._line or self._open()
        try:
            return line.ask(request, request["timeout"] + GRACE)
        except TimeoutError as error:
            line.kill()
            self._line = None
            raise ToolError("the sandbox does not answer") from error
        except OSError:
            self._release()
            return None
        except BaseException:  # an interrupt: what comes next on this line would answer the wrong request
            self._release()
            raise

    def _release(self) -> None:
        line, self._line = self._line, None
        if line is not None and self._process == os.getpid():
            line.close()

    def close(self) -> None:
        super().close()
        self._release()
