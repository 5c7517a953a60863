"""Tools over a set of text files, in memory or in a real folder, and the rules of their paths."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

from opd_agents.tools.base import ToolError

MAX_PATH, MAX_PART, MAX_DEPTH = 500, 200, 16  # bytes of a path and of its parts, and how many parts
MAX_HITS, MAX_HIT, MAX_SHOWN = 20, 120, 4000  # hits of a search, characters of a hit and of one reading


def checked_path(path: str) -> str:
    """The path as it is kept: relative, without "." and empty parts. Raises ToolError for any other path,
    one with ".." included: nothing outside can be named, so nothing outside can be reached."""
    if not path.isprintable() or "\\" in path or not _fits(path, MAX_PATH):
        raise ToolError("bad path: too long, or a character that no path may have")
    if path.startswith("/"):
        raise ToolError("bad path: paths are relative, such as 'notes/today.txt'")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ToolError("bad path: '..' is not allowed")
    if not 1 <= len(parts) <= MAX_DEPTH or not all(_fits(part, MAX_PART) for part in parts):
        raise ToolError("bad path: empty, too deep, or a name is too long")
    return "/".join(parts)


def _fits(text: str, limit: int) -> bool:
    return len(text) <= limit and len(text.encode(errors="surrogatepass")) <= limit


@dataclass(frozen=True, slots=True)
class Quota:
    """How much the files may hold; sizes in characters."""

    files: int = 200
    file_size: int = 20_000
    total_size: int = 500_000


class FileTools:
    """Typed methods to be passed to an environment as tools.

    ``files`` maps paths to texts: a dict, or a :class:`~opd_agents.tools.workspace.Workspace`. A folder is
    there as long as a file is in it. All that an agent can do wrong is a ToolError and changes nothing.
    """

    def __init__(self, files: MutableMapping[str, str], quota: Quota | None = None) -> None:
        self.files, self.quota = files, quota or Quota()

    def list_files(self, folder: str = "") -> list[str]:
        """List what is in a folder; names of folders end in "/"."""
        start = f"{checked_path(folder)}/" if folder.strip("./") else ""
        inside = [path.removeprefix(start) for path in self.files if path.startswith(start)]
        if start and not inside:
            raise ToolError(f"no folder {folder!r}")
        return sorted({name + slash for name, slash, _ in (path.partition("/") for path in inside)})

    def find_files(self, pattern: str) -> list[str]:
        """Find files by path; * stands for anything."""
        if len(pattern) > MAX_PATH:
            raise ToolError("the pattern is too long")
        return _shortened([path for path in sorted(self.files) if fnmatch.fnmatchcase(path, pattern)])

    def search_files(self, text: str) -> str:
        """Find the lines that hold a text, in all files."""
        if not text:
            raise ToolError("no text to search for")
        hits = [
            f"{path}:{number}: {line[:MAX_HIT]}"
            for path, content in self._texts()
            for number, line in enumerate(content.split("\n"), 1)
            if text in line
        ]
        return "\n".join(_shortened(hits)) or "not found"

    def read_file(self, path: str, start: int = 1) -> str:
        """Read a file from a line on, the first by default."""
        lines = self._read(path).split("\n")
        if not 1 <= start <= len(lines):
            raise ToolError(f"{path} has {len(lines)} lines")
        sizes = itertools.accumulate(len(line) + 1 for line in lines[start - 1 :])
        stop = start - 1 + sum(size <= MAX_SHOWN for size in sizes)
        if stop == len(lines):
            return "\n".join(lines[start - 1 :])
        shown = lines[start - 1 : stop] or [lines[start - 1][:MAX_SHOWN]]
        more = f": go on with start={max(stop, start) + 1}" if max(stop, start) < len(lines) else ""
        return "\n".join([*shown, f"... cut{more}"])

    def write_file(self, path: str, text: str) -> str:
        """Write a file, new or in place of the old one."""
        return self._write(path, text, "written")

    def append_file(self, path: str, text: str) -> str:
        """Add a text to the end of a file."""
        return self._write(path, self._read(path) + text, "appended")

    def edit_file(self, path: str, old: str, new: str) -> str:
        """Replace a text that stands exactly once in a file."""
        content = self._read(path)
        count = content.count(old) if old else 0
        if count != 1:
            raise ToolError(f"the old text stands {count} times in {path}, not once")
        return self._write(path, content.replace(old, new), "edited")

    def move_file(self, path: str, target: str) -> str:
        """Move or rename a file; the target must not be there yet."""
        self.copy_file(path, target)
        del self.files[checked_path(path)]
        return "moved"

    def copy_file(self, path: str, target: str) -> str:
        """Copy a file; the target must not be there yet."""
        content = self._read(path)
        if checked_path(target) in self.files:
            raise ToolError(f"{target} is already there")
        return self._write(target, content, "copied")

    def delete_file(self, path: str) -> str:
        """Delete a file."""
        self._read(path)
        del self.files[checked_path(path)]
        return "deleted"

    def _read(self, path: str) -> str:
        try:
            return self.files[checked_path(path)]
        except KeyError:
            raise ToolError(f"no file {path!r}") from None

    def _write(self, path: str, text: str, done: str) -> str:
        path = checked_path(path)
        if len(text) > self.quota.file_size:
            raise ToolError(f"too large: a file may have {self.quota.file_size} characters")
        others = {other: len(content) for other, content in self._texts() if other != path}
        if len(others) >= self.quota.files or sum(others.values()) + len(text) > self.quota.total_size:
            raise ToolError("no space left: delete something first")
        for other in others:
            if other.startswith(path + "/"):
                raise ToolError(f"{path} is a folder")
            if path.startswith(other + "/"):
                raise ToolError(f"{other} is a file")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ToolError("the text is no valid Unicode") from None
        self.files[path] = text
        return done

    def _texts(self) -> Iterator[tuple[str, str]]:
        """All files in order; one in a real folder that is no text is passed over."""
        for path in sorted(self.files):
            try:
                yield path, self.files[path]
            except (ToolError, KeyError):
                continue


def _shortened(items: list[str]) -> list[str]:
    more = len(items) - MAX_HITS
    return items if more <= 0 else [*items[:MAX_HITS], f"... and {more} more"]
