"""What all sections of a config share: frozen models, plug-in references, coefficients over a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

PLUG_IN = r"^[\w.]+:\w+$"  # module:name, importable here or through `imports`


def _names_a_variable(key: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key):
        raise ValueError("is the name of an environment variable, such as OPENAI_API_KEY, never a key itself")
    return key


KeyVariable: TypeAlias = Annotated[str, AfterValidator(_names_a_variable)]
ADDRESS = r"https?://[^@?#\s]+"  # without name, key or query


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ramp(Section):
    """From ``start`` to ``end`` as the run's progress goes from 0 to ``until``, where it stays."""

    kind: Literal["linear", "cosine"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)
    until: float = Field(1.0, gt=0, le=1)


class Switch(Section):
    """``start`` until the run's progress reaches ``at``, then ``end``."""

    kind: Literal["switch"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)
    at: float = Field(gt=0, lt=1)


class Adaptive(Section):
    """``start``, then after every step times exp(``rate``) where the step's ``metric`` is above ``target``
    and times exp(-``rate``) where it is below, within [``low``, ``high``]; a negative rate shrinks above."""

    kind: Literal["adaptive"]
    metric: str
    target: float
    start: float = Field(gt=0)
    rate: float
    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _can_move(self) -> Adaptive:
        if self.rate == 0 or not self.low <= self.start <= self.high or self.low == self.high:
            raise ValueError("needs a rate other than 0 and low <= start <= high, low < high")
        return self


Schedule: TypeAlias = Annotated[Ramp | Switch | Adaptive, Field(discriminator="kind")]
Scheduled: TypeAlias = Annotated[float, Field(ge=0)] | Schedule
SignedScheduled: TypeAlias = float | Schedule


def always_zero(schedule: float | Schedule) -> bool:
    match schedule:
        case Adaptive():
            return False
        case Ramp() | Switch():
            return schedule.start == schedule.end == 0
        case constant:
            return constant == 0


def bounds(schedule: float | Schedule) -> tuple[float, float]:
    """The least and the largest value that it may ever take."""
    match schedule:
        case Adaptive():
            return schedule.low, schedule.high
        case Ramp() | Switch():
            return min(schedule.start, schedule.end), max(schedule.start, schedule.end)
        case constant:
            return constant, constant


def all_zero_somewhere(schedules: Iterable[float | Schedule]) -> bool:
    """Whether at some point of a run all of them are 0."""
    parts = list(schedules)
    places = {0.0, 1.0}  # and where one jumps or stops: between two of these none begins or ceases to be 0
    places |= {one.at for one in parts if isinstance(one, Switch)}
    places |= {one.until for one in parts if isinstance(one, Ramp)}
    return any(all(_zero_at(one, place) for one in parts) for place in places)


def _zero_at(schedule: float | Schedule, progress: float) -> bool:
    match schedule:
        case Adaptive():
            return False
        case Switch():
            return (schedule.start if progress < schedule.at else schedule.end) == 0
        case Ramp():
            ended, begun = progress >= schedule.until, progress > 0
            return (ended or schedule.start == 0) and (not begun or schedule.end == 0)
        case constant:
            return constant == 0
