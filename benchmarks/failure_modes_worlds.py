"""The worlds of failure_modes.yaml: one in which several ways lead to the goal and nobody can know which, so
that a policy needs the right odds, not one answer; and LockChain with locks that jam by themselves, too."""

from __future__ import annotations

import random
from typing import ClassVar, Literal

import opd_agents as opd
from opd_agents.envs.lockchain import LockChain
from opd_agents.errors import UserError
from opd_agents.types import Task

CANDIDATES = dict(zip("ant bear crow deer".split(), ("fbhd", "agec", "chfa", "ebgd"), strict=True))  # noqa: SIM905
ODDS = (0.4, 0.3, 0.2, 0.1)  # of a sign's four keys; times ``fits``, how often each fits


class Vault(opd.AgentEnv):
    """``dials``, one after the other, each with a sign. Of the four keys that belong to a sign ``fits`` (1 or
    2) fit this dial, drawn for the task by the odds; the agent turns one key a dial and learns only at the
    end whether all fitted. The expert knows, and turns each key that fits equally often: who imitates it
    learns the odds, and then success equals the mean probability of an episode's actions where one fits."""

    text_only: ClassVar[bool] = True
    has_expert: ClassVar[bool] = True
    split_sizes: ClassVar[dict[str, int]] = {"train": 20_000, "validation": 200, "test": 500}

    def __init__(self, dials: int = 2, fits: int = 2) -> None:
        if fits not in (1, 2) or dials < 1:
            raise UserError(f"Vault: dials must be 1 or more and fits 1 or 2, got {dials!r} and {fits!r}.")
        super().__init__([])
        self.dials, self.fits, self.max_turns = dials, fits, dials

    def begin(self, task: Task) -> str:
        draw = random.Random(f"Vault/{self.dials}/{self.fits}/{task.split}/{task.id}")
        signs = [draw.choice(list(CANDIDATES)) for _ in range(self.dials)]
        open_to = [_fitting(CANDIDATES[sign], self.fits, draw) for sign in signs]
        shown = [draw.choice(keys) for keys in open_to]
        self.state = {"signs": signs, "open_to": open_to, "shown": shown, "turned": []}
        return f"dial {signs[0]}"

    def on_text(self, text: str) -> str:
        self.state["turned"].append(text.strip())
        if len(self.state["turned"]) == self.dials:
            self.finish()
            return ""
        return f"dial {self.state['signs'][len(self.state['turned'])]}"

    def success(self) -> float:
        turned = self.state["turned"]
        fitted = [key in keys for key, keys in zip(turned, self.state["open_to"], strict=False)]
        return float(len(turned) == self.dials and all(fitted))

    def expert_action(self) -> str:
        shown: str = self.state["shown"][len(self.state["turned"])]
        return shown


def _fitting(keys: str, fits: int, draw: random.Random) -> list[str]:
    """``fits`` of the keys, each with ``fits`` times its odds: a systematic sample."""
    upto, start = 0.0, draw.random()
    marks = [start + number for number in range(fits)]
    found = []
    for key, odds in zip(keys, ODDS, strict=True):
        if any(upto <= mark < upto + fits * odds for mark in marks):
            found.append(key)
        upto += fits * odds
    return found


class SlippingChain(LockChain):
    """LockChain whose locks jam with the probability ``slip``, whatever key is turned: whoever acts in it
    comes off the track, and who learned in LockChain from the expert alone has never seen how to go on."""

    def __init__(self, slip: float = 0.1, horizon: int = 8, recovery: int = 2) -> None:
        super().__init__(horizon, recovery)
        self.slip = slip

    def turn_key(self, key: Literal["a", "b", "c", "d", "e", "f", "g", "h"]) -> str:
        """Turn a key in the present lock."""
        if self._freed is None and self.np_random.random() < self.slip:
            self._freed = 0
            return self._view()
        return super().turn_key(key)


opd.register("benchmarks/SlippingChain-v0", "failure_modes_worlds:SlippingChain")
opd.register("benchmarks/Vault-v0", "failure_modes_worlds:Vault")
