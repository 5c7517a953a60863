"""TaskEnv: which task an episode is of, out of splits of the environment's own or of a file."""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import gymnasium

from opd_agents.envs.tasks import TaskFile, TaskRow
from opd_agents.errors import DataError, UnknownName, UserError
from opd_agents.types import Task


class TaskEnv(gymnasium.Env[str, str], ABC):
    """An environment whose episodes are of tasks in splits.

    Tasks may come from a file of the user's (``make(id, tasks=PATH)``): its splits replace the environment's.
    A row either has what the environment builds its world of, then ``row_fields`` names the fields that it
    needs and ``begin`` reads ``self.row``; or it selects one of the environment's own tasks.
    """

    row_fields: ClassVar[tuple[str, ...]] = ()  # of a task file's row; none: a row selects an own task

    split_sizes: Mapping[str, int] = {"train": 1}  # task ids of a split are "0" ... str(size - 1)
    tasks: TaskFile | None = None  # where the tasks come from, if not from the environment itself

    _task: Task | None = None  # by its place in ``split_sizes``
    _row: TaskRow | None = None
    _own_sizes: Mapping[str, int] | None = None  # where a file's splits have taken their place
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]  # it was made with

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        env = super().__new__(cls)
        env._arguments = (args, kwargs)
        return env

    @property
    def task(self) -> Task:
        """The present task: with a task file, for an environment that makes its own tasks, the one of those
        that the row selects. Raises gymnasium's ResetNeeded before the first reset."""
        return self.listed_task if self._row is None or self.row_fields else self._row.own_task()

    @property
    def listed_task(self) -> Task:
        """The present task by its place in ``split_sizes``, which is what ``reset`` takes. Raises gymnasium's
        ResetNeeded before the first reset."""
        if self._task is None:
            raise gymnasium.error.ResetNeeded(f"{type(self).__name__}: call reset() first.")
        return self._task

    @property
    def row(self) -> TaskRow:
        """The present task's row of the task file. Raises UserError where there is no file."""
        if self._row is None:
            raise self._no_tasks()
        return self._row

    def task_number(self, task: Task) -> int:
        """The task's place among those of all splits, in the order of ``split_sizes``: a task generator that
        makes task after task from it has no task in two splits. A file that selects tasks changes none."""
        sizes = self.split_sizes if self.row_fields else self._own_sizes or self.split_sizes
        before = itertools.takewhile(lambda split: split != task.split, sizes)
        return sum(sizes[split] for split in before) + int(task.id)

    def use_tasks(self, tasks: TaskFile) -> None:
        """Take the tasks from a file; once, before the first reset. Raises DataError for a row that does
        not fit, naming file, row and field."""
        tasks.check(f"{type(self).__module__}.{type(self).__qualname__} {self._arguments}", self.check_row)
        self.tasks, self.split_sizes, self._own_sizes = tasks, tasks.split_sizes, self.split_sizes

    def split_size(self, split: str) -> int:
        """How many tasks a split has. Raises UserError for a split that does not exist."""
        if self.tasks is not None:
            return self.tasks.size(split)
        if not self.split_sizes:
            raise self._no_tasks()
        if split not in self.split_sizes:
            raise UnknownName(f"split of {type(self).__name__}", split, self.split_sizes, "opd-agents envs")
        return self.split_sizes[split]

    def check_row(self, row: TaskRow) -> None:
        """Raise UserError for a row of a task file that cannot be a task; override to ask for more."""
        if missing := [name for name in self.row_fields if not row.holds(name)]:
            raise DataError(f"the field `{missing[0]}` is missing, which {type(self).__name__} needs.")
        if self.row_fields:
            return
        if "task_id" not in row.metadata:
            raise DataError(
                f"{type(self).__name__} makes its own tasks; a row selects one of them by `metadata: "
                '{"task_id": ..., "split": ...}` (without a split: the row\'s), and `task_id` is missing.'
            )
        own = row.own_task()
        self._require_task(own)
        if own.split == "test" and row.split != "test":
            raise DataError(f"a task of {type(self).__name__}'s test split must stay in split 'test'.")

    # ---- inside ----

    def _set_task(self, task: Task) -> None:
        self._task = task
        self._row = None if self.tasks is None else self.tasks.row(task)

    def _choose_task(self, options: dict[str, Any]) -> Task:
        split = str(options.pop("split", next(iter(self.split_sizes), "train")))
        task_id = options.pop("task_id", None)
        if options:
            raise UserError(f"reset() knows no option {', '.join(options)}: options are task_id and split.")
        size = self.split_size(split)
        if task_id is None:
            return Task(str(self.np_random.integers(size)), split)
        task = Task(str(task_id), split)
        if self.tasks is not None and not task.id.isdecimal():
            task = Task(self.tasks.find(split, task.id) or task.id, split)
        self._require_task(task)
        return task

    def _require_task(self, task: Task) -> None:
        size, name = self.split_size(task.split), task.id
        if not (name.isdecimal() and str(int(name)) == name and int(name) < size):
            raise UserError(f"No task {name!r} in split {task.split!r}: its tasks are '0' to '{size - 1}'.")

    def _no_tasks(self) -> UserError:
        return UserError(
            f"{type(self).__name__} has no task file: give one in `options: {{tasks: PATH}}`, by "
            "`--option tasks=PATH`, or opd.make(id, tasks=PATH)."
        )
