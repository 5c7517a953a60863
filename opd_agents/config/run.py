"""A run's config as a whole."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from opd_agents.config.fits import check_stage
from opd_agents.config.stage import Stage


class RunConfig(Stage):
    """One run. A run with ``stages`` trains them in order, each from the last weights."""

    stages: dict[str, RunConfig] = {}

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not self.stages:
            check_stage(self)
        elif any(stage.stages for stage in self.stages.values()):
            raise ValueError("stages: a stage cannot have stages of its own")
        return self
