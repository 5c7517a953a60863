"""A run folder as data: config, metrics, summary, stages, seeds, and its trajectory lines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_agents.errors import RunFolderError

RUN_FILES = ("metrics.jsonl", "summary.json", "config.yaml")
NOT_STAGES = {"checkpoints", "trajectories"}
SEED_FOLDER = re.compile(r"seed-(\d+)")


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. ``metrics`` holds one flat mapping a step; ``parts`` are sub-folders with runs in
    them: the stages, or, in ``seeds``, the same run at several seeds."""

    path: Path
    name: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    parts: tuple[Run, ...]
    seeds: tuple[Run, ...]

    def training(self, label: str = "") -> Iterator[tuple[str, Run]]:
        """Everything below here that has training steps, as (label, run); the label of the run itself
        is empty, that of a stage its path below the run."""
        if self.metrics:
            yield label, self
        for part in self.parts:
            yield from part.training(f"{label}/{part.path.name}".lstrip("/"))

    def modified(self) -> float:
        """When the run last wrote, in seconds since the epoch."""
        files = [self.path / name for name in RUN_FILES if (self.path / name).is_file()]
        times = [file.stat().st_mtime for file in files]
        return max([*times, *(run.modified() for run in (*self.parts, *self.seeds))], default=0.0)


def read_run(path: Path) -> Run:
    """Read a run folder and the runs below it.

    Raises:
        RunFolderError: the folder is missing, holds no run, or one of its files is broken.
    """
    if not path.is_dir():
        raise RunFolderError(f"There is no run folder {path}. Give a folder that `opd-agents train` wrote.")
    if not is_run_folder(path):
        raise RunFolderError(
            f"{path} is no run folder: neither metrics.jsonl nor summary.json is in it or in its stages. "
            "Give the folder that `opd-agents train` or `opd-agents quickstart` wrote, such as runs/NAME."
        )
    config = _read_config(path / "config.yaml")
    children = [child for child in sorted(path.iterdir()) if child.is_dir() and is_run_folder(child)]
    seeds = [child for child in children if SEED_FOLDER.fullmatch(child.name)]
    stages = [child for child in children if child not in seeds and child.name not in NOT_STAGES]
    order = list(config.get("stages") or ())
    stages.sort(key=lambda child: order.index(child.name) if child.name in order else len(order))
    seeds.sort(key=lambda child: int(child.name.removeprefix("seed-")))
    return Run(
        path=path,
        name=path.resolve().name,
        config=config,
        metrics=tuple(read_jsonl(path / "metrics.jsonl")),
        summary=_read_summary(path / "summary.json"),
        parts=tuple(read_run(child) for child in stages),
        seeds=tuple(read_run(child) for child in seeds),
    )


def is_run_folder(path: Path) -> bool:
    """Whether the folder, or one below it, has written metrics or a summary."""
    if any((path / name).is_file() for name in ("metrics.jsonl", "summary.json")):
        return True
    below = (child for child in path.iterdir() if child.is_dir() and child.name not in NOT_STAGES)
    return any(is_run_folder(child) for child in below)


def read_jsonl(path: Path, skip_endings: tuple[bytes, ...] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, none if there is no such file.

    A broken last line is passed over: the run may be writing it. Lines that end with one of
    ``skip_endings`` are passed over unparsed, because trajectory files are large.

    Raises:
        RunFolderError: a broken line that is not the last.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        broken: RunFolderError | None = None
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.endswith(skip_endings):
                continue
            if broken:
                raise broken
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                broken = RunFolderError(
                    f"{path}, line {number}, is no JSON object ({error}). Resume the run with "
                    "`opd-agents train CONFIG --resume`, which rewrites what lies past the last checkpoint, "
                    "or remove the line."
                )
                continue
            yield value


def number(value: Any) -> float | None:
    """A finite number, or None for anything else (absent, null, text, NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def prepare_output(runs: Sequence[Path], out: Path | None) -> Path:
    """Where the report goes; its folder is made.

    Raises:
        RunFolderError: the place is a folder.
    """
    target = runs[0] / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise RunFolderError(f"{target} is a folder. Give a file to write, such as {target / 'report.html'}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{path} is no YAML: {error}. Put back the file that the run wrote, or remove it."
        ) from error
    if not isinstance(value, Mapping):
        raise RunFolderError(f"{path} holds no mapping. Put back the file that the run wrote, or remove it.")
    return value


def _read_summary(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    remedy = "Remove the file, and run the same command again to write it anew."
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunFolderError(f"{path} is no JSON: {error}. {remedy}") from error
    policies = value.get("policies", {}) if isinstance(value, Mapping) else None
    evaluation = value.get("evaluation") or {} if isinstance(value, Mapping) else None
    if not isinstance(policies, Mapping) or not all(isinstance(p, Mapping) for p in policies.values()):
        raise RunFolderError(f"{path} holds no mapping of policies to their figures. {remedy}")
    if not isinstance(evaluation, Mapping):
        raise RunFolderError(f"{path}: `evaluation` is no mapping. {remedy}")
    return value
