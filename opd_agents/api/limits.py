"""How much may be asked of an endpoint within a minute."""

from __future__ import annotations

import asyncio
from collections import deque

MINUTE = 60.0  # s


class Pace:
    """At most ``most`` of something within any minute; None: any amount. Used from one event loop."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._taken: deque[list[float]] = deque()  # [when, how much], of the last minute
        self._line = asyncio.Lock()  # first come, first served

    async def take(self, amount: float) -> list[float]:
        """Wait until ``amount`` fits in; more than ``most`` goes alone. What is returned is the entry, whose
        last number may be set to what it came to."""
        async with self._line:
            while (wait := self._wait(amount)) > 0:
                await asyncio.sleep(wait)
            entry = [asyncio.get_running_loop().time(), amount]
            if self.most is not None:
                self._taken.append(entry)
            return entry

    def _wait(self, amount: float) -> float:
        """Seconds until something more may have become free."""
        now = asyncio.get_running_loop().time()
        while self._taken and self._taken[0][0] + MINUTE <= now:
            self._taken.popleft()
        if self.most is None or not self._taken or sum(a for _, a in self._taken) + amount <= self.most:
            return 0.0
        return self._taken[0][0] + MINUTE - now
