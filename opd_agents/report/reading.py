"""A folder as data: a run's config, metrics, summary, stages and seeds; an evaluation's figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_agents.errors import RunFolderError

RUN_FILES = ("metrics.jsonl", "summary.json", "config.yaml")
HOW, RESULT = "how.json", "evaluation.json"  # of an evaluation
NOT_STAGES = {"checkpoints", "trajectories"}
AGAIN = "Remove the file, and run the same command again to write it anew."
SEED_FOLDER = re.compile(r"seed-(\d+)")


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. ``metrics`` holds one flat mapping a step; ``parts`` are sub-folders with runs in
    them: the stages, or, in ``seeds``, the same run at several seeds. Of a folder that `evaluate --out` wrote
    (``evaluated``) there are the figures alone, in the form of a summary."""

    path: Path
    name: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    parts: tuple[Run, ...]
    seeds: tuple[Run, ...]
    evaluated: bool = False

    def training(self, label: str = "") -> Iterator[tuple[str, Run]]:
        """Everything below here that has training steps, as (label, run); the label of the run itself
        is empty, that of a stage its path below the run."""
        if self.metrics:
            yield label, self
        for part in self.parts:
            yield from part.training(f"{label}/{part.path.name}".lstrip("/"))

    def everything(self, label: str = "") -> Iterator[tuple[str, Run]]:
        """This run and all below it, labelled so."""
        yield label, self
        for part in self.parts:
            yield from part.everything(f"{label}/{part.path.name}".lstrip("/"))

    def episode_files(self) -> list[Path]:
        """The trajectory files of this run or evaluation, without those of its parts."""
        folder, names = (self.path, "eval-*") if self.evaluated else (self.path / "trajectories", "*")
        return sorted(folder.glob(f"{names}.jsonl"))

    def modified(self) -> float:
        """When the run last wrote, in seconds since the epoch."""
        names = (HOW, RESULT) if self.evaluated else RUN_FILES
        files = [self.path / name for name in names if (self.path / name).is_file()]
        times = [file.stat().st_mtime for file in files]
        return max([*times, *(run.modified() for run in (*self.parts, *self.seeds))], default=0.0)


def read_run(path: Path) -> Run:
    """Read a run folder and the runs below it, or the folder of an evaluation.

    Raises:
        RunFolderError: the folder is missing, holds no run, or one of its files is broken.
    """
    if not path.is_dir():
        raise RunFolderError(f"There is no run folder {path}. Give a folder that `opd-agents train` wrote.")
    if not is_run_folder(path) and any((path / name).is_file() for name in (HOW, RESULT)):
        figures = _read_evaluation(path / RESULT)
        return Run(path, path.resolve().name, {}, (), figures, (), (), evaluated=True)
    if not is_run_folder(path):
        raise RunFolderError(
            f"{path} is no run folder: neither metrics.jsonl nor summary.json is in it or in its stages. "
            "Give the folder that `opd-agents train` or `opd-agents quickstart` wrote, such as runs/NAME, or"
            " `opd-agents evaluate --out`."
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


def repaired(line: bytes) -> bool:
    """Whether a line of a trajectory file holds a repair, which is its last field."""
    return not line.endswith((b'"repair": null}', b'"repair":null}'))


def read_jsonl(path: Path, wanted: Callable[[bytes], bool] = lambda line: True) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, none if there is no such file.

    A broken last line is passed over: the run may be writing it. Lines that are not ``wanted`` are passed
    over unparsed, because trajectory files are large.

    Raises:
        RunFolderError: a broken line that is not the last.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        broken: RunFolderError | None = None
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or not wanted(line):
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


def prepare_output(target: Path) -> None:
    """Make the folder that the report goes to.

    Raises:
        RunFolderError: the place is a folder.
    """
    if target.is_dir():
        raise RunFolderError(f"{target} is a folder. Give a file to write, such as {target / 'report.html'}.")
    target.parent.mkdir(parents=True, exist_ok=True)


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
    value = _read_json(path)
    policies, evaluation = value.get("policies", {}), value.get("evaluation") or {}
    if not isinstance(policies, Mapping) or not all(isinstance(p, Mapping) for p in policies.values()):
        raise RunFolderError(f"{path} holds no mapping of policies to their figures. {AGAIN}")
    if not isinstance(evaluation, Mapping):
        raise RunFolderError(f"{path}: `evaluation` is no mapping. {AGAIN}")
    return value


def _read_evaluation(path: Path) -> Mapping[str, Any]:
    """Its policies as those of a summary, with its comparisons; nothing of one that has not finished."""
    value = _read_json(path)
    try:
        rows = [{**row, **row.get("spent", {})} for row in value.get("policies", ())]
        compared = [dict(row) for row in value.get("comparisons", ())]
        if not value:
            return {}
        asked = {"Suite": value["suite"], "Split": value["split"]}
        if how := value.get("how"):
            asked |= {"Samples a task": how["samples"], "Seed": how["seed"]}
        policies = {str(row["policy"]): row for row in rows}
        return {"policies": policies, "comparisons": compared, "asked": asked}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{path} holds no list of policies and their figures. {AGAIN}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunFolderError(f"{path} is no JSON: {error}. {AGAIN}") from error
    if not isinstance(value, Mapping):
        raise RunFolderError(f"{path} holds no mapping of policies to their figures. {AGAIN}")
    return value
