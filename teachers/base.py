"""What a teacher is, and what it gives: a closed set of signal types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.policies.base import Action, History, Policy


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The teacher's last hidden states before every action token of a packed batch, and its head.

    ``hidden`` [N, H], on any device, follows the order of the packed table; ``head`` maps it, on the
    student's device, to logits [N, V]. The full next-token distribution is thus available by chunk, without
    ever storing logits.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


class Teacher(Protocol):
    """What a run needs of a teacher; ``teacher.kind: module:name`` names a class like this.

    A run makes it as ``cls(path, chat, *, dtype, temperature, **options)`` from the section ``teacher``
    (``path`` is None without a ``model``) and the run's ``chat`` and sampling temperature. It must refuse
    another vocabulary than the chat's. ``LocalTeacher`` is one, and the easiest to derive from.
    """

    gives: ClassVar[frozenset[type]]  # of the signals of this module; without HiddenStates it only acts

    @property
    def greedy(self) -> Policy:
        """Acts at temperature 0: its action replaces the student's in a repair."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens scored plus tokens written, so far."""
        ...

    @property
    def flops(self) -> int:
        """Spent so far; 0 where that cannot be known."""
        ...

    def act(self, histories: Sequence[History]) -> list[Action]:
        """Act as a :class:`Policy`, where ``rollout.source`` asks for the teacher."""
        ...

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> HiddenStates:
        """Its signal on finished trajectories, without gradient, ``max_tokens`` at most in a forward pass;
        with ``keep`` (bool [N]) only rows that have such tokens matter. Called if it gives HiddenStates."""
        ...
