"""Evaluations on disk: each episode as it ends, so that an interrupted one goes on where it was.

In a folder: ``how.json`` (what was asked for, and whose weights played), ``eval-POLICY.jsonl`` (sampled
episodes) and ``eval-POLICY.greedy.jsonl``, a line of :func:`opd_agents.runs.trajectory_row` each, and, when
all is done, ``evaluation.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_agents.errors import ConfigError, RunFolderError
from opd_agents.runs import trajectory_row, write_whole
from opd_agents.types import Outcome, Trajectory, from_dict, to_json

HOW = "how.json"
IN_EACH = {"limits.concurrency"}  # no figure depends on it


class Records:
    """The episodes of one policy, kept in ``file`` (None: in memory) as they end.

    ``done`` are those that have ended, of this call and of earlier ones, by uid; those that failed by an
    error are to be played again. ``spent`` is what all of them took together, by name.
    """

    def __init__(self, file: Path | None) -> None:
        """Raises RunFolderError for a file that holds something else."""
        self._file = file
        self._rows = {} if file is None else _read(file)
        self.done = {uid: trajectory for uid, (trajectory, _) in self._rows.items()}
        self._before = _most(spent for _, spent in self._rows.values())
        self.spent = dict(self._before)
        if file is not None and file.exists():
            write_whole(file, self._lines(self._rows))  # without a line that a kill cut off

    def add(self, trajectory: Trajectory, spent: Mapping[str, float]) -> None:
        """An episode has ended; ``spent`` is since the call began."""
        self.spent = _sum(self._before, spent)
        self.done[trajectory.uid] = trajectory
        self._rows[trajectory.uid] = trajectory, self.spent
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(self._lines([trajectory.uid]))

    def finish(self, uids: Sequence[str]) -> list[Trajectory]:
        """The episodes in this order, which is then the file's."""
        if self._file is not None:
            write_whole(self._file, self._lines(uids))
        return [self.done[uid] for uid in uids]

    def _lines(self, uids: Iterable[str]) -> str:
        rows = [{"spent": self._rows[uid][1], **trajectory_row(self._rows[uid][0])} for uid in uids]
        return "".join(to_json(row) + "\n" for row in rows)


def begin(folder: Path, how: Mapping[str, Any], policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Make ``folder``, or see that it holds the same evaluation, perhaps of other policies; those that it
    does not know yet join it. Raises RunFolderError where it holds another one, ConfigError for policies
    whose files would have one name."""
    file, how = folder / HOW, json.loads(json.dumps(how))
    if len({stem(policy) for policy in policies}) < len(policies):
        raise ConfigError("Two policies would be written to one file: give one of them by another path.")
    known: dict[str, Any] = {"how": how, "policies": {}}
    if file.is_file():
        known = _mapping(file)
    elif folder.is_dir() and any(folder.glob("eval-*.jsonl")):
        raise RunFolderError(
            f"{folder} holds episodes, and no {HOW} that says of what. Give another folder as --out."
        )
    elif folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; give another --out.")
    changed = _differences(known["how"], how)
    changed += [
        f"{name}: {key}"
        for name, own in policies.items()
        for key in own
        if name in known["policies"] and known["policies"][name].get(key) != own[key]
    ]
    if changed:
        raise RunFolderError(
            f"{folder} holds an evaluation that differs in {', '.join(changed)}. Give another folder as "
            "--out, or ask for the same to go on with it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    joined = {"how": known["how"], "policies": {**known["policies"], **policies}}
    write_whole(file, json.dumps(joined, indent=1) + "\n")


def stem(policy: str) -> str:
    """A policy's part of a file's name."""
    return policy.strip("/").replace("/", "-")


def _read(file: Path) -> dict[str, tuple[Trajectory, dict[str, float]]]:
    rows: dict[str, tuple[Trajectory, dict[str, float]]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            trajectory, spent = from_dict(Trajectory, row["trajectory"]), dict(row["spent"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break  # cut off by a kill
            raise RunFolderError(
                f"{file}, line {number}, is no episode of an evaluation ({error!r}). Remove the line, "
                "and its episode is played again."
            ) from None
        if trajectory.outcome is not Outcome.ERROR:
            rows[trajectory.uid] = trajectory, spent
    return rows


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not (isinstance(found, dict) and {"how", "policies"} <= found.keys()):
        raise RunFolderError(f"{file} is not what an evaluation wrote. Give another folder as --out.")
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _differences(a, b, f"{name}.")
        elif a != b and name.removeprefix("suite.") not in IN_EACH:
            changed.append(f"{name} ({json.dumps(a)} there, {json.dumps(b)} now)")
    return changed


def _most(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    most: dict[str, float] = {}
    for part in parts:
        most |= {key: max(value, most.get(key, 0)) for key, value in part.items()}
    return most


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in (*one, *other)}
