"""The sections of one run."""

from __future__ import annotations

from pydantic import Field

from opd_agents.config.base import Section
from opd_agents.config.correction import Correction
from opd_agents.config.judge import Judge
from opd_agents.config.loss import Loss
from opd_agents.config.sections import (
    ChatSettings,
    Discriminator,
    EnvironmentSource,
    EvaluationSettings,
    Rollout,
    Student,
    TrainerSettings,
)
from opd_agents.config.serving import Sampler, TransformersSampling
from opd_agents.config.teachers import Teacher


class Stage(Section):
    """One run, or one stage of it."""

    name: str
    output: str | None = None
    seed: int = Field(0, ge=0)
    imports: list[str] = []
    method: str | None = None
    student: Student
    teacher: Teacher | None = None
    references: dict[str, Teacher] = {}  # further models that the loss compares with, by name
    sampler: Sampler = TransformersSampling()
    chat: ChatSettings = ChatSettings()
    environments: list[EnvironmentSource] = []
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    correction: Correction | None = None
    judge: Judge | None = None
    discriminator: Discriminator | None = None
    trainer: TrainerSettings = TrainerSettings()
    evaluation: EvaluationSettings | None = None
