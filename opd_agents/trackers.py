"""Who is told a run's metrics besides its folder: TensorBoard, Weights & Biases, MLflow, by accelerate's
trackers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from opd_agents.config import RunConfig
from opd_agents.distributed import World
from opd_agents.errors import ConfigError, MissingPart
from opd_agents.runs import write_whole

PROJECT = "opd-agents"  # of runs whose tracker names no other: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME
IDS = "trackers.json"  # in the run folder: which run of each tracker it is
OFFLINE = {
    "wandb": "`wandb login`, WANDB_API_KEY, or WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI, the address of a server or sqlite:///FILE",
}

Log: TypeAlias = Callable[[Mapping[str, Any]], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingPart for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPart(
                f'trainer.trackers: {name} is not installed: pip install "opd-agents[{name}]", or leave it'
                " out."
            )


@contextmanager
def tracking(config: RunConfig, step: int, told: int, world: World) -> Iterator[Log]:
    """Gives what tells the trackers a step's row of metrics, of which they take the numbers.

    A run that goes on from ``step`` goes on in the runs that the trackers have of it: TensorBoard drops what
    it has of later steps, the others are told nothing up to ``told``, the last that they know. Of several
    processes the main one tells. Raises ConfigError for a tracker that does not begin.
    """
    ids = config.folder / IDS
    known = json.loads(ids.read_text(encoding="utf-8")) if ids.is_file() else {}
    trackers: dict[str, Any] = {}
    with ExitStack() as opened:
        if world.is_main:
            for name, tracker in _trackers(config, step, known):
                _begin(name, tracker, None if name in known else config)
                opened.callback(tracker.finish)
                trackers[name] = tracker
            if found := {name: _id(name, one) for name, one in trackers.items() if name in OFFLINE}:
                write_whole(ids, json.dumps(known | found, indent=1) + "\n")

        def log(row: Mapping[str, Any]) -> None:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            for name, tracker in trackers.items():
                if name not in known or row["step"] > told:
                    tracker.log(_named(numbers) if name == "mlflow" else numbers, step=row["step"])

        yield log


def _trackers(config: RunConfig, step: int, known: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    if not (config.trainer.tensorboard or config.trainer.trackers):
        return
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    folder = config.folder
    if config.trainer.tensorboard:
        yield "tensorboard", TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=step + 1)
    if "wandb" in config.trainer.trackers:
        goes_on = {"id": known["wandb"], "resume": "allow"} if "wandb" in known else {}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        yield "wandb", WandBTracker(project, name=config.name, dir=str(folder), **goes_on)
    if "mlflow" in config.trainer.trackers:
        yield "mlflow", MLflowTracker(PROJECT, run_id=known.get("mlflow"), run_name=config.name)


def _begin(name: str, tracker: Any, config: RunConfig | None) -> None:
    """A new run of a tracker is told the ``config``."""
    try:
        tracker.start()
        if config is not None and name in OFFLINE:
            settings = _flat(config.model_dump(mode="json"))
            tracker.store_init_configuration(_named(settings) if name == "mlflow" else settings)
    except Exception as error:  # whatever its library raises for a missing key or a server that is not there
        raise ConfigError(
            f"trainer.trackers: {name} does not begin: {error} Set it up ({OFFLINE.get(name, 'a disk')}), or"
            " leave it out."
        ) from error


def _id(name: str, tracker: Any) -> str:
    run = tracker.tracker
    return str(run.id if name == "wandb" else run.info.run_id)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys; lists as JSON."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: json.dumps(value) if isinstance(value, list) else value}


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """By names that MLflow takes: `loss.ce`, as a store in files has no room for `loss/ce` beside `loss`."""
    return {re.sub(r"[^\w. :-]", ".", key): value for key, value in values.items()}
