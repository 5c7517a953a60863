"""Where weights come from: the runs that led to a checkpoint, and what their folders have of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_agents.errors import CheckpointError, RunFolderError
from opd_agents.policies.fingerprint import fingerprint
from opd_agents.runs import BEST, latest_checkpoint, read_config, read_metrics

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Measured:
    """Figures of an evaluation (see :func:`opd_agents.evaluation.summarise`), and those of ``before`` the
    training where it has any. ``chosen``: the weights were chosen by them."""

    suite: str
    split: str
    figures: Mapping[str, Any]
    before: Mapping[str, Any] = field(default_factory=dict)
    chosen: bool = False


@dataclass(frozen=True)
class Trained:
    """The weights of a run's ``folder`` as of ``step``: in ``best`` or in a checkpoint."""

    folder: Path
    step: int
    best: bool
    config: Mapping[str, Any]

    @property
    def summary(self) -> Mapping[str, Any]:
        """Empty before the run is done."""
        return read_json(self.folder / "summary.json")

    @property
    def checkpoint(self) -> Path:
        return self.folder / (BEST if self.best else f"checkpoints/step-{self.step}")

    def measured(self) -> Iterator[Measured]:
        """What was measured of exactly these weights: in training, then by `evaluate` into a folder in the
        run's (or in that of the run whose stage it is)."""
        settings, figures = self.config["evaluation"], self._evaluation()
        if settings and figures:
            before = self.summary.get("evaluation_at_start") or {}
            yield Measured(Path(settings["suite"]).stem, settings["split"], figures, before, self.best)
        whole = self.folder.parent
        places = [self.folder, *([whole] if (whole / "config.yaml").is_file() else [])]
        files = [file for place in places for file in sorted(place.glob(f"*/{EVALUATION}"))]
        found = [one for one in map(read_json, files) if "how" in one]  # others are of training
        own = fingerprint(str(self.checkpoint)) if found else ""
        for one in found:
            for row in one["policies"]:
                if one["how"]["policies"][row["policy"]].get("weights") == own:
                    yield Measured(one["suite"], one["split"], row)

    def _evaluation(self) -> Mapping[str, Any]:
        """Of the training; empty where there is none of these weights."""
        if self.best:
            return read_json(self.checkpoint / EVALUATION)
        if self.summary.get("steps") == self.step:
            return self.summary["evaluation"] or {}
        settings, state = self.config["evaluation"], read_json(self.checkpoint / "trainer.json")
        return (state.get("evaluation") or {}) if settings and self.step % settings["every"] == 0 else {}

    @property
    def totals(self) -> list[str]:
        """What was spent up to these weights, for a person."""
        row = next((row for row in read_metrics(self.folder) if row["step"] == self.step), {})
        spent = {key.removeprefix("total/"): value for key, value in row.items() if key.startswith("total/")}
        named = ((key.replace("_", " ").replace("flops", "FLOPs"), value) for key, value in spent.items())
        return [f"{_amount(value)} {name}" for name, value in named if value]


def trained(checkpoint: Path) -> Trained | None:
    """Where a checkpoint comes from; None for one that is in no run folder."""
    best, number = checkpoint.name == BEST, re.fullmatch(r"step-(\d+)", checkpoint.name)
    folder = checkpoint.parent if best else checkpoint.parent.parent
    if not (folder / "config.yaml").is_file() or not (best or number):
        return None
    step = int(number[1]) if number else read_json(checkpoint / EVALUATION)["step"]
    return Trained(folder, step, best, read_config(folder / "config.yaml"))


def lineage(checkpoint: Path) -> list[Trained]:
    """The runs that led to a checkpoint, each from the weights of the one before, the first first."""
    found: list[Trained] = []
    place: Path | None = checkpoint
    while place is not None and (run := trained(place)) is not None:
        found.insert(0, run)
        place = _checkpoint(run.config["student"]["model"])
    return found


def _checkpoint(model: str | None) -> Path | None:
    """Where the weights of a config's model are, if they are still here."""
    if model is None or not Path(model).is_dir():
        return None
    try:
        return latest_checkpoint(Path(model))
    except CheckpointError:
        return None


def _amount(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value < 1e12 else f"{value:.4g}"


def read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no file. Raises RunFolderError for one that cannot be read."""
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{file} is not what a run writes ({error}).") from None
    return found
