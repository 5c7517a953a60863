"""What every sandbox is: a folder of files, and commands that are run in it within limits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Literal, Self, TypeAlias

from opd_agents.errors import UserError
from opd_agents.tools.base import ToolError

Stopped: TypeAlias = Literal["timeout", "memory", "output"]
_WHY: dict[Stopped, str] = {
    "timeout": "it ran for too long",
    "memory": "it used too much memory",
    "output": "it wrote too much",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command may use. Raises UserError for a limit that nothing can run in.

    ``timeout`` in seconds of wall clock; ``cpu_seconds``, whole ones, of a core's time for each process,
    which do not depend on what else the machine does. ``disk_mb`` for the work folder and for ``/tmp`` each,
    ``pids`` for processes and threads together. ``files`` and ``files_mb`` bound the files that outlive a
    run: beyond them new files are gone with it, the largest first.
    """

    timeout: float = 4.0
    cpu_seconds: int | None = None
    memory_mb: int = 128
    pids: int = 32
    cpus: float = 1.0
    disk_mb: int = 16
    output_bytes: int = 65536
    files: int = 256
    files_mb: int = 1

    def __post_init__(self) -> None:
        least = {"memory_mb": 32, "pids": 4}  # what the program inside needs for itself
        for name in (field.name for field in fields(self)):
            value, lowest = getattr(self, name), least.get(name, 0)
            if name == "cpu_seconds" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or value < lowest:
                wanted = f"at least {lowest}" if lowest else "a number above 0"
                raise UserError(f"Limits({name}={value!r}): it must be {wanted}.")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one command.

    ``output`` holds standard output and error as they came, cut at ``Limits.output_bytes``, with undecodable
    bytes replaced. ``exit_code`` is None if the command was stopped, and -N if signal N ended it; 127 is a
    command that could not be started.
    """

    output: str
    exit_code: int | None
    stopped: Stopped | None = None

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def text(self) -> str:
        """The result as an agent reads it."""
        if self.stopped is not None:
            ending = f"(stopped: {_WHY[self.stopped]})"
        elif self.exit_code is not None and self.exit_code < 0:
            ending = f"(ended by signal {-self.exit_code})"
        else:
            ending = f"(exit code {self.exit_code})"
        parts = [self.output.rstrip("\n")] if self.output.strip() else []
        if not self.ok:
            parts.append(ending)
        return "\n".join(parts) or "(no output)"


class Sandbox(ABC):
    """A work folder, and commands run in it; a context manager, to be used by one thread at a time.

    The folder is plain data: every command finds exactly its files, in a folder that is otherwise empty, and
    nothing else of a command outlives it, no process, link, permission or empty folder. So a folder can be
    kept, compared and forked.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._files: dict[str, bytes] = {}
        self._closed = False

    def put(self, files: Mapping[str, bytes]) -> None:
        """Make ``files`` (relative path: content) all that the work folder holds.

        Raises ToolError, for an agent to read, for a path that leaves the folder or is no plain path, and for
        more files or bytes than the limits allow.
        """
        check_files(files, self.limits)
        self._files = dict(files)

    def get(self) -> dict[str, bytes]:
        """The regular files of the work folder, also after a command that was stopped."""
        return dict(self._files)

    def run(self, command: Sequence[str], *, stdin: bytes = b"", timeout: float | None = None) -> Result:
        """Run ``command`` in the work folder; ``python`` is the sandbox's Python 3.

        ``timeout`` in seconds, by default that of the limits. Raises ToolError if the sandbox itself fails,
        and MissingPart if it cannot be started; never for what the command does.
        """
        if self._closed:
            raise ValueError("this sandbox was closed")
        seconds = self.limits.timeout if timeout is None else timeout
        output, exit_code, stopped, files = self._execute(list(command), stdin, seconds)
        self._files = {path: content for path, content in files.items() if is_plain(path)}
        text = output.decode(errors="replace")
        if stopped == "output":
            text += f"\n... output cut at {self.limits.output_bytes} bytes"
        return Result(text, exit_code, stopped)

    @abstractmethod
    def _execute(self, command: list[str], stdin: bytes, timeout: float) -> Ran:
        """Run the command on ``self._files``."""

    def close(self) -> None:
        """Free what it holds; harmless when closed already."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# Output, exit code, why it was stopped, and the files that it left.
Ran: TypeAlias = tuple[bytes, int | None, Stopped | None, dict[str, bytes]]


def is_plain(path: str) -> bool:
    """Whether ``path`` is the one way to write a path below the work folder."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts)
        and "/".join(parts) == path
        and ".." not in parts
        and path.isprintable()
        and len(path) <= 255  # of the usual file systems' names, in bytes below
        and max(len(part.encode()) for part in parts) <= 255
        and len(parts) <= 16
    )


def check_files(files: Mapping[str, bytes], limits: Limits) -> None:
    """Raise ToolError for files that no work folder could hold."""
    for path in files:
        if not is_plain(path):
            raise ToolError(f"{path[:80]!r} is no path in the work folder; write one like 'folder/name.py'")
        if above := [str(parent) for parent in PurePosixPath(path).parents if str(parent) in files]:
            raise ToolError(f"{above[0]!r} cannot be a file and the folder of {path!r} at once")
    if len(files) > limits.files:
        raise ToolError(f"{len(files)} files are too many: the work folder holds {limits.files}")
    size = sum(map(len, files.values()))
    if size > limits.files_mb << 20:
        raise ToolError(f"the files have {size} bytes together: the work folder holds {limits.files_mb} MiB")
