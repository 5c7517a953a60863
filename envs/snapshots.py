"""An episode at one moment, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opd_agents.types import Task

ForkMode = Literal["snapshot", "replay", "none"]


@dataclass(frozen=True, slots=True)
class Recording:
    """What verified replay needs: the generator's state at the reset, the actions, and the digest of the
    state before each of them and after the last."""

    start: Mapping[str, Any]
    actions: tuple[str, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An episode at one moment, as a picklable value.

    ``state`` is the pickled result of ``get_state()``, or a Recording where states cannot be copied.
    """

    task: Task
    turn: int
    over: bool
    rng: Mapping[str, Any]
    state: bytes | Recording
