"""LockChain: a long row of locks, where one wrong key costs as much as one chooses."""
# ruff: noqa: SIM905 -- lists of words are read best as words

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.splits import SPLIT_SIZES, draw_from_split
from opd_agents.errors import UserError
from opd_agents.types import Task, ToolCall

KEYS = "abcdefgh"
LOCK_SIGNS = "ant bear crow deer elk frog goat hare ibex jay koi lynx mole newt owl pig".split()
JAM_SIGNS = "ash birch cedar date elm fir ginkgo hazel iris juniper kapok larch maple nut oak pine".split()
# Every key fits two signs of either kind. No order: a key must be learned or looked up, never counted.
KEY_OF = dict(zip(LOCK_SIGNS, "fbhdagecchfaebgd", strict=True)) | dict(
    zip(JAM_SIGNS, "cgaehbfdhdbfcaeg", strict=True)
)


@dataclass(frozen=True, slots=True)
class Chain:
    """The content of one task: the sign of every lock, and those that a jam of it shows one by one."""

    locks: tuple[str, ...]
    jams: tuple[tuple[str, ...], ...]


class LockChain(AgentEnv):
    """Open ``horizon`` locks in order; each shows a sign, and one of eight keys fits it.

    A wrong key jams the lock: then ``recovery`` keys in a row, each for a sign that only jams show, free it,
    and a wrong one among them jams it anew. So one mistake costs ``recovery`` + 1 turns of an agent that
    knows the way back, and about 8 ** ``recovery`` of one that has never seen a jam and guesses; the expert's
    demonstrations show none. ``irreversible``: a wrong key breaks the chain and ends the episode.

    The reward is the share of the locks that were opened; an episode succeeds if it is all. With ``spare`` 0
    it lasts at most ``horizon`` turns, and an agent loses ``horizon`` * (1 - reward) of them off the track.
    That is the setting of Ross and Bagnell's bounds (2010, 2011): quadratic in the horizon for imitation of
    the expert, linear for a learner that is taught in the states that it visits itself.
    """

    has_expert: ClassVar[bool] = True
    split_sizes = SPLIT_SIZES

    def __init__(
        self, horizon: int = 16, recovery: int = 2, irreversible: bool = False, spare: int | None = None
    ) -> None:
        """``horizon``: locks, 2 to 4096. ``recovery``: keys that free a jammed lock, 0 to 64; with 0 a wrong
        key only costs its turn. ``spare``: turns beyond the horizon, by default those of two mistakes."""
        _check("horizon", horizon, 2, 4096)
        _check("recovery", recovery, 0, 64)
        if spare is not None:
            _check("spare", spare, 0, 1_000_000)
        self.horizon, self.recovery, self.irreversible = horizon, recovery, irreversible
        self.max_turns = horizon + (2 * (recovery + 1) if spare is None else spare)
        self.system_prompt = _rules(recovery, irreversible)
        self._opened = 0
        self._freed: int | None = None  # right keys since the lock jammed; None: it is not jammed
        super().__init__([self.turn_key])

    @property
    def chain(self) -> Chain:
        """The content of the present task."""
        return draw_chain(self.horizon, self.recovery, self.task.split, self.task.id)

    @property
    def turns_to_go(self) -> int:
        """How many turns the best policy still needs from here to the end, whatever the turn limit."""
        return self.horizon - self._opened + (0 if self._freed is None else self.recovery - self._freed)

    def begin(self, task: Task) -> str:
        self._opened, self._freed = 0, None
        return self._view()

    def turn_key(self, key: Literal["a", "b", "c", "d", "e", "f", "g", "h"]) -> str:
        """Turn a key in the present lock."""
        fits = key == KEY_OF[self._sign()]
        if self.irreversible and not fits:
            self.finish()
            return "broken"
        if self._freed is not None:
            self._freed = self._freed + 1 if fits else 0
        elif fits:
            self._opened += 1
        else:
            self._freed = 0
        if self._freed == self.recovery:
            self._freed = None
        if self._opened == self.horizon:
            self.finish()
            return "open"
        return self._view()

    def on_text(self, text: str) -> str:
        return "Use turn_key."

    def success(self) -> float:
        return self._opened / self.horizon

    def expert_action(self) -> str:
        return format_calls([ToolCall("turn_key", {"key": KEY_OF[self._sign()]})])

    def get_state(self) -> Any:
        return {"opened": self._opened, "freed": self._freed}

    def set_state(self, state: Any) -> None:
        self._opened, self._freed = state["opened"], state["freed"]

    def digest_text(self) -> str:
        return f"{self._opened} {self._freed} {self.chain.locks}"

    def _sign(self) -> str:
        if self._freed is None:
            return self.chain.locks[self._opened]
        return self.chain.jams[self._opened][self._freed]

    def _view(self) -> str:
        return f"{'lock' if self._freed is None else 'jam'} {self._sign()}"


@functools.lru_cache(maxsize=1024)  # groups, repairs and forks come back to the same task
def draw_chain(horizon: int, recovery: int, split: str, task_id: str) -> Chain:
    """The chain of a task. Its locks do not depend on ``recovery`` and are in one split only."""

    def draw(rng: random.Random) -> tuple[str, ...]:
        return tuple(rng.choices(LOCK_SIGNS, k=horizon))

    locks = draw_from_split(f"LockChain-v0/{horizon}", split, task_id, draw, " ".join)
    rng = random.Random(f"LockChain-v0/jams/{recovery}/{' '.join(locks)}")
    return Chain(locks, tuple(tuple(rng.choices(JAM_SIGNS, k=recovery)) for _ in locks))


def _rules(recovery: int, irreversible: bool) -> str:
    if irreversible:
        mistake, signs = "A wrong key breaks the chain for good.", LOCK_SIGNS
    elif recovery == 0:
        mistake, signs = "A wrong key costs a turn.", LOCK_SIGNS
    else:
        mistake = f"A wrong key jams the lock until {recovery} right keys in a row for the jam's signs."
        signs = LOCK_SIGNS + JAM_SIGNS
    book = "; ".join(f"{key}: {' '.join(sign for sign in signs if KEY_OF[sign] == key)}" for key in KEYS)
    return f"Open the locks one by one with turn_key: every sign has its key. {mistake} Keys: {book}."


def _check(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"LockChain: {name} must be a whole number in {low} ... {high}, got {value!r}.")
