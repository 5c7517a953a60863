"""The bubblewrap sandbox: namespaces without a daemon, an opt-in for machines that cannot have Docker.

It keeps commands from the network, from all files of the machine but Python's, and from its other processes;
memory is limited for each process alone. What it does not stop: forking (many processes together may use all
of the machine's memory and processors, until their time-out), and system calls that Docker's filter refuses.
"""

from __future__ import annotations

import shutil
import socket
import subprocess

from opd_agents.errors import MissingPart
from opd_agents.tools.sandbox.base import Limits
from opd_agents.tools.sandbox.host_python import LINKS, layout
from opd_agents.tools.sandbox.supervised import WRITABLE, Line, SupervisedSandbox, program

START_SECONDS = 20.0


class BubblewrapSandbox(SupervisedSandbox):
    """Commands in namespaces of their own; see ``open_sandbox``."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        if shutil.which("bwrap") is None:
            raise MissingPart("The bubblewrap sandbox needs the program bwrap: apt-get install bubblewrap.")

    def _open(self) -> Line:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                ["bwrap", *options(self.limits)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,  # an interrupt at the terminal is for this process
            )
        line = BubblewrapLine(ours, process)
        try:
            line.answer(START_SECONDS)
        except OSError as error:
            raise MissingPart(f"bwrap does not start: {line.close().strip() or error}") from error
        return line


class BubblewrapLine(Line):
    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        super().__init__(connection, connection.recv)
        self._process = process

    def close(self) -> str:
        """End it, and what it complained about."""
        super().close()
        try:  # the program inside ends with the line, and bwrap with it
            said = self._process.communicate(timeout=5)[1]
        except subprocess.TimeoutExpired:
            self._process.kill()
            said = self._process.communicate()[1]
        return said.decode(errors="replace")


def options(limits: Limits) -> list[str]:
    """What bwrap is told: only Python and its libraries are there, and only three folders can be written."""
    alone = ["--unshare-all", "--unshare-user", "--as-pid-1", "--new-session", "--clearenv"]
    nobody = ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--hostname", "sandbox"]
    files = ["--proc", "/proc", "--dev", "/dev"]
    for path, target in sorted(LINKS.items()):
        files += ["--symlink", target, f"/{path}"]
    for place, origin in sorted(layout().items()):
        files += ["--ro-bind", str(origin), f"/{place}"]
        if (origin / "site-packages").is_dir():  # what is installed here is nothing of a command's
            files += ["--tmpfs", f"/{place}/site-packages", "--remount-ro", f"/{place}/site-packages"]
    for folder in WRITABLE:
        files += ["--size", str(limits.disk_mb << 20), "--tmpfs", folder]
    files += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/work", "--setenv", "PATH", "/usr/bin"]
    return [*alone, *nobody, *files, *program(limits, {"RLIMIT_AS": limits.memory_mb << 20})]
