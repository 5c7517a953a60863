"""An episode at one moment, as a value."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opd_agents.errors import EnvironmentContractError
from opd_agents.types import Task

ForkMode = Literal["snapshot", "replay", "none"]


@dataclass(frozen=True, slots=True)
class Recording:
    """What verified replay needs: the generator's states at the reset and wherever the noise was drawn
    afresh, each with the number of actions before it; the actions, and the digest of the state before each of
    them and after the last."""

    noise: tuple[tuple[int, Mapping[str, Any]], ...]
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


def pickled(state: Any, owner: str) -> bytes:
    """The result of ``get_state()`` of ``owner``, a class's name. Raises EnvironmentContractError."""
    try:
        return pickle.dumps(state, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # what pickle raises, by object
        raise EnvironmentContractError(
            f"get_state() of {owner} cannot be pickled ({error}): return plain data, or "
            'set fork_mode = "replay".'
        ) from error
