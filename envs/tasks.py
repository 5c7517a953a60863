"""Tasks of an environment that come from a file of the user's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from opd_agents.errors import DataError, UserError
from opd_agents.rows import DEFAULT_SPLIT, read_splits
from opd_agents.types import Task

FIELDS = ("prompt", "answer", "metadata", "split", "id")


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task of a file. ``answer`` is whatever JSON value the file has; ``id`` is unique in its split and,
    where the file gives none, the row's place there."""

    id: str
    split: str
    prompt: str | None = None
    answer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, field: str) -> bool:
        """Whether the file gives this field a value; an empty one is none."""
        return {"prompt": self.prompt, "answer": self.answer, "metadata": self.metadata}[field] not in (
            None,
            "",
            {},
        )

    def own_task(self) -> Task:
        """The task of the environment's own that the row selects: ``metadata: {task_id, split}``."""
        return Task(str(self.metadata.get("task_id")), str(self.metadata.get("split", self.split)))


class TaskFile:
    """The tasks of a JSONL file or a `datasets` folder. The id of a task is its place in its split, "0" up;
    rows are read and converted when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for what cannot be read and for data without rows."""
        self.path = path
        splits = read_splits(path)
        self._splits = {name: splits[name] for name in sorted(splits, key=lambda s: s != DEFAULT_SPLIT)}
        self.split_sizes: Mapping[str, int] = {split: len(rows) for split, rows in self._splits.items()}
        self._checked: set[str] = set()

    def size(self, split: str) -> int:
        """How many tasks a split has. Raises DataError for a split that no row is in."""
        if split not in self.split_sizes:
            found = ", ".join(f"{name!r} ({size} tasks)" for name, size in self.split_sizes.items())
            raise DataError(
                f"{self.path} has no task in split {split!r}, only in {found}. A row names its split in the "
                "field `split`; without it, it is in 'train'."
            )
        return self.split_sizes[split]

    def row(self, task: Task) -> TaskRow:
        rows, place = self._splits[task.split], int(task.id)
        return _task_row(rows[place], task.split, place, rows.where(place))

    def find(self, split: str, id: str) -> str | None:
        """The task whose row has the field ``id`` with this value; None if there is none."""
        for place, raw in enumerate(self._splits[split]):
            if str(raw.get("id")) == id:
                return str(place)
        return None

    def check(self, key: str, inspect: Callable[[TaskRow], None]) -> None:
        """Convert and ``inspect`` every row, once per ``key``: what it raises is told with file and row.

        Raises DataError, also for two rows of a split with one id.
        """
        if key in self._checked:
            return
        for split, rows in self._splits.items():
            seen: dict[str, int] = {}
            for place, raw in enumerate(rows):
                row = _task_row(raw, split, place, rows.where(place))
                if "id" in raw and seen.setdefault(row.id, place) != place:
                    first = rows.where(seen[row.id])
                    raise DataError(f"{rows.where(place)}: the `id` {row.id!r} is that of {first} too.")
                try:
                    inspect(row)
                except UserError as error:
                    raise DataError(f"{rows.where(place)}: {error}") from None
        self._checked.add(key)


def load_tasks(path: str | Path) -> TaskFile:
    """The tasks of a file or folder, read once until it changes. Raises DataError; see TaskFile."""
    if not isinstance(path, str | Path) or not str(path):
        raise DataError(f"tasks: {path!r} is no path. Give a JSONL file or a folder of the library datasets.")
    place = Path(path).expanduser().resolve()
    files = [place, *place.rglob("*")] if place.is_dir() else [place]
    return _loaded(place, max((file.stat().st_mtime_ns for file in files if file.exists()), default=0))


@lru_cache(maxsize=16)
def _loaded(path: Path, changed: int) -> TaskFile:
    return TaskFile(path)


def _task_row(raw: Mapping[str, Any], split: str, place: int, where: str) -> TaskRow:
    for name in raw:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else "put what is your own into `metadata`."
            raise DataError(f"{where}: unknown field `{name}`; a task has {', '.join(FIELDS)}: {hint}")
    prompt, metadata, id = raw.get("prompt"), raw.get("metadata"), raw.get("id")
    if not isinstance(prompt, str | None):
        raise DataError(f"{where}: `prompt` must be a text, not {type(prompt).__name__} {prompt!r:.60}.")
    if not isinstance(metadata, Mapping | None):
        raise DataError(f"{where}: `metadata` must be an object, not {type(metadata).__name__}.")
    if isinstance(id, bool) or not isinstance(id, str | int | None):
        raise DataError(f"{where}: `id` must be a text or a whole number, not {id!r:.60}.")
    return TaskRow(str(place if id is None else id), split, prompt, raw.get("answer"), metadata or {})
