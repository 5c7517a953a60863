"""A run on disk: metrics, trajectories and checkpoints, written so that a kill loses nothing finished."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opd_agents.errors import CheckpointError, RunFolderError
from opd_agents.types import ActionFeedback, Credit, Trajectory, to_json

PARTIAL = ".partial-"  # names of what is being written or removed; a kill may leave them behind
BEST, FORMER_BEST = "best", ".former-best"
TRANSCRIPTS = "transcripts"
ASKING = {"key", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "retries"} | {
    *("prices", "max_tokens", "max_cost", "cache")
}  # of an endpoint: none of its answers is another by them


class RunFolder:
    """``runs/NAME/``. Opening it fresh refuses a folder that holds a run; resuming refuses another config.

    A folder with nothing but a config, of a run that was refused when it began, counts as none. Resuming a
    folder that is empty or does not exist starts the run. Raises RunFolderError.

    Of several processes one ``writes``: for the others the folder stands already, and they leave it alone.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        if not writes:
            return
        text = yaml.safe_dump(dict(config), sort_keys=False)  # the order of stages counts
        stored = path / "config.yaml"
        started = stored.is_file() and any(f.is_file() and f.name != "config.yaml" for f in path.rglob("*"))
        if started and not resume:
            raise RunFolderError(
                f"{path} holds a run already. Add --resume to go on with it, give another `output=`, or "
                "remove the folder."
            )
        old = read_config(stored) if started else config
        if changed := _differences(old, config):
            raise RunFolderError(
                f"{path} was started with another config ({', '.join(changed)}); resume it with the config "
                f"in {stored}, or start a new run with another `output=`."
            )
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file; give another `output=`.")
        path.mkdir(parents=True, exist_ok=True)
        if not stored.is_file() and any(not file.name.startswith(PARTIAL) for file in path.iterdir()):
            raise RunFolderError(f"{path} is not empty and holds no run; give another `output=`.")
        write_whole(stored, text)  # first: what a kill leaves behind is then known as a run
        (path / "trajectories").mkdir(exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return checkpoints_in(self.path)

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep_last: int) -> Path:
        """A checkpoint is written beside its place and renamed: it is there whole, or not at all.

        A step's checkpoint that exists already is kept. Raises OSError if it cannot be written, for example
        on a full disk; the older ones are then still there.
        """
        final = self.path / "checkpoints" / f"step-{step}"
        if not self.writes:
            return final
        if not final.exists():
            write_folder(final, write)
        for old in (*self.checkpoints()[:-keep_last], self.path / FORMER_BEST):
            _discard(old)
        return final

    def best(self) -> dict[str, Any] | None:
        """The evaluation of the weights in ``best/``, with their ``step``; None before there are any."""
        file = self.path / BEST / "evaluation.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def save_best(self, result: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Weights and their evaluation (``result``, with a ``step``) in place of those in ``best/``.

        What was there as of the newest checkpoint stays aside until the next one is written: a resume forgets
        all steps past a checkpoint, and ``best/`` must then be what it was.
        """

        def write_all(folder: Path) -> None:
            write(folder)
            (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        old, checkpoints = self.best(), self.checkpoints()
        partial = self.path / f"{PARTIAL}new-{BEST}"
        _write_folder(partial, write_all)
        if old is not None and old["step"] <= (_number(checkpoints[-1]) if checkpoints else 0):
            os.replace(self.path / BEST, self.path / FORMER_BEST)
        _discard(self.path / BEST)
        os.replace(partial, self.path / BEST)
        _sync(self.path)

    def truncate(self, step: int) -> None:
        """Forget metrics, trajectories and best weights past ``step``: they are computed again, to the same
        values."""
        if not self.writes:
            return
        for partial in (*self.path.glob(f"{PARTIAL}*/"), *(self.path / "checkpoints").glob(f"{PARTIAL}*")):
            shutil.rmtree(partial)
        if (best := self.best()) is not None and best["step"] > step:
            _discard(self.path / BEST)
        if (self.path / BEST).exists():
            _discard(self.path / FORMER_BEST)
        elif (self.path / FORMER_BEST).exists():
            os.replace(self.path / FORMER_BEST, self.path / BEST)
        metrics = self.path / "metrics.jsonl"
        if metrics.is_file():
            kept = [line for line in metrics.read_text().splitlines() if _step_of(line) <= step]
            write_whole(metrics, "".join(line + "\n" for line in kept))
        for file in self.path.glob("*/step-*.jsonl"):  # of trajectories and transcripts
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()

    def log(self, row: Mapping[str, Any]) -> None:
        """One flat line of metrics; NaN and infinity become null."""
        if not self.writes:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def save_trajectories(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        if self.writes:
            save_trajectories(self.path, f"step-{step:06d}", rows)

    def save_transcript(self, step: int, exchanges: Iterable[Mapping[str, Any]]) -> None:
        """``transcripts/step-N.jsonl``: what was asked of APIs and what they answered, a line each."""
        if self.writes:
            (self.path / TRANSCRIPTS).mkdir(exist_ok=True)
            lines = "".join(to_json(one) + "\n" for one in exchanges)
            write_whole(self.path / TRANSCRIPTS / f"step-{step:06d}.jsonl", lines)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The last that a run writes."""
        if self.writes:
            write_whole(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")


def trajectory_row(
    trajectory: Trajectory,
    credit: Sequence[Credit] = (),
    repair: Mapping[str, Any] | None = None,
    feedback: Sequence[ActionFeedback] = (),
) -> dict[str, Any]:
    """A line of a trajectory file: an episode, the credit of its actions, what a judge said of them, and what
    was tried to repair it (last: a reader looks there first)."""
    return {"trajectory": trajectory, "credit": credit, "feedback": feedback, "repair": repair}


def save_trajectories(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """``trajectories/NAME.jsonl`` of a run folder, one line each."""
    write_whole(folder / "trajectories" / f"{name}.jsonl", "".join(to_json(row) + "\n" for row in rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, none before its first step. A line that is being written, or that a kill
    cut off, is no row."""
    file = path / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def checkpoints_in(path: Path) -> list[Path]:
    return sorted((path / "checkpoints").glob("step-*"), key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder (of its last stage that has one), or ``path`` itself if it is a
    checkpoint. Raises CheckpointError."""
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Give a checkpoint, or a run folder that holds one.")
    found = [checkpoint for stage in _with_stages(path) for checkpoint in checkpoints_in(stage)[-1:]]
    if not found:
        raise CheckpointError(
            f"{path} holds neither a model (config.json or adapter_config.json) nor checkpoints of a run."
        )
    return found[-1]


def newest_checkpoint(path: str) -> str:
    """Of a run folder its newest checkpoint; a checkpoint, or the id of a model on the hub, as it is."""
    local = Path(path)
    beside_others = len(local.parts) > 1 and local.parent.is_dir()  # runs/techer is a slip, not an id
    may_be_id = path.count("/") < 2 and not path.startswith((".", "/")) and not beside_others
    return path if may_be_id and not local.exists() else str(latest_checkpoint(local))


def best_checkpoint(path: Path) -> Path:
    """The weights of a run folder (of its last stage that has them) with the best evaluation. Raises
    CheckpointError."""
    found = [stage / BEST for stage in _with_stages(path) if (stage / BEST).is_dir()]
    if not found:
        raise CheckpointError(
            f"{path} holds no {BEST}/: a run keeps its best weights if it has an `evaluation` and "
            "trainer.keep_best. Without --best the newest checkpoint is taken."
        )
    return found[-1]


def _with_stages(path: Path) -> list[Path]:
    """A run folder, or those of its stages in their order."""
    config = path / "config.yaml"
    stages = (read_config(config).get("stages") or {}) if config.is_file() else {}
    return [path / stage for stage in stages] or [path]


def read_config(file: Path) -> dict[str, Any]:
    """The config.yaml of a run. Raises RunFolderError."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise RunFolderError(f"{file} is no config of a run. Put it back as it was, or take another folder.")
    return config


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """``write`` a folder beside its place, which may be empty, and rename it. Raises OSError."""
    partial = final.with_name(f"{PARTIAL}{final.name}")
    _write_folder(partial, write)
    os.replace(partial, final)
    _sync(final.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _discard(folder: Path) -> None:
    """Remove a folder, if there is one, so that a kill leaves it whole or not at all."""
    if folder.exists():
        partial = folder.with_name(f"{PARTIAL}{folder.name}")
        os.replace(folder, partial)
        shutil.rmtree(partial)


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """A new folder, on disk with all that ``write`` puts into it; nothing is left if that fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        write(folder)
        for file in (*folder.rglob("*"), folder):
            _sync(file)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if wrapped := _os_error(error):
            raise wrapped from error
        raise


def _os_error(error: BaseException) -> OSError | None:
    """The OSError that ``error`` wraps: torch and safetensors report a full disk by errors of their own."""
    if isinstance(error.__context__, OSError):
        return error.__context__
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf  # a line cut off by a kill


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ; where the run is written to and who else is told of it does not
    matter, nor what an endpoint may cost and how fast it is asked."""
    result = []
    free = ASKING if prefix.endswith("endpoint.") else {"output", "trackers"}
    for key in sorted({*old, *new} - free):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            result += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return result
