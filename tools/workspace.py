"""A real temporary folder as a mapping from paths to texts, which no path and no link leads out of."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from opd_agents.tools.base import ToolError
from opd_agents.tools.files import checked_path

MAX_BYTES = 1_000_000  # a file that another program made larger is not read
# O_NOFOLLOW at every part of a path, each opened relative to the one before: whoever else can write in the
# folder (a program in a sandbox) may put a link there at any moment, and it is never followed.
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe would wait for its other end
WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Workspace(MutableMapping[str, str]):
    """The text files of a folder of its own, deleted by ``close`` or with the object; keys are in order.

    Give ``FileTools(Workspace())`` its methods as tools. Only regular files count: links, pipes and devices
    are no keys. Raises KeyError for what is no key; ToolError for a bad path, a file that is no text or too
    large, and what cannot be written.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="opd-agents-"))
        self._delete = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    def close(self) -> None:
        """Delete the folder."""
        self._delete()

    def __getitem__(self, path: str) -> str:
        with self._parent(path) as (folder, name):
            file = os.open(name, READ, dir_fd=folder)
            try:
                found = os.fstat(file)
                if not stat.S_ISREG(found.st_mode):
                    raise KeyError(path)
                if found.st_nlink > 1 or found.st_size > MAX_BYTES:  # another name of it may be outside
                    raise ToolError(f"{path} is too large or has several names")
                content = os.read(file, MAX_BYTES)
            finally:
                os.close(file)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ToolError(f"{path} is no text") from None

    def __setitem__(self, path: str, text: str) -> None:
        content = text.encode()
        with self._parent(path, create=True) as (folder, name):
            fresh = f".{secrets.token_hex(8)}"
            file = os.open(fresh, WRITE, 0o600, dir_fd=folder)
            try:  # replaces a link or a pipe of that name, and never writes through it
                with open(file, "wb") as stream:
                    stream.write(content)
                os.rename(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                os.unlink(fresh, dir_fd=folder)
                raise

    def __delitem__(self, path: str) -> None:
        with self._parent(path) as (folder, name):
            os.unlink(name, dir_fd=folder)
        above = checked_path(path)
        while above := above.rpartition("/")[0]:  # a folder is there as long as a file is in it
            with contextlib.suppress(OSError, KeyError, ToolError), self._parent(above) as (folder, name):
                os.rmdir(name, dir_fd=folder)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths())

    def __len__(self) -> int:
        return len(self._paths())

    def _paths(self) -> list[str]:
        root = os.open(self.root, FOLDER)
        try:
            return sorted(_walk(root, ""))
        finally:
            os.close(root)

    @contextlib.contextmanager
    def _parent(self, path: str, create: bool = False) -> Iterator[tuple[int, str]]:
        """The folder that a path is in, opened, and the name in it."""
        *folders, name = checked_path(path).split("/")
        with contextlib.ExitStack() as opened:
            try:
                folder = os.open(self.root, FOLDER)
                opened.callback(os.close, folder)
                for part in folders:
                    if create:
                        with contextlib.suppress(FileExistsError):
                            os.mkdir(part, 0o700, dir_fd=folder)
                    folder = os.open(part, FOLDER, dir_fd=folder)
                    opened.callback(os.close, folder)
                yield folder, name
            except OSError as error:  # not there, a link or a file in the way, a full disk
                if not create:
                    raise KeyError(path) from None
                raise ToolError(f"{path}: {os.strerror(error.errno or 0).lower()}") from None


def _walk(folder: int, above: str) -> Iterator[str]:
    """The paths of the regular files below an open folder; only such as ``checked_path`` accepts."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError, ToolError):  # gone meanwhile, or no name that a tool may use
                path = checked_path(f"{above}{entry.name}")
                if entry.is_file(follow_symlinks=False):
                    yield path
                elif entry.is_dir(follow_symlinks=False):
                    inner = os.open(entry.name, FOLDER, dir_fd=folder)
                    try:
                        yield from _walk(inner, f"{path}/")
                    finally:
                        os.close(inner)
