"""Asking an endpoint until it answers: within its pace, its budget and its patience."""

from __future__ import annotations

import asyncio
import random

from opd_agents.api.connection import Connection, Failed
from opd_agents.api.limits import Pace
from opd_agents.api.store import Store
from opd_agents.api.wire import Answer, Body, estimated_tokens
from opd_agents.config import Endpoint
from opd_agents.errors import BudgetSpent, ConfigError, OpdError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # s, between attempts; doubled each time
MOST_PATIENCE = 600.0  # s, that an endpoint may ask to wait


class Attempts:
    """Every answer that it gets is in ``store`` before anyone sees it. ``counts`` are the client's. For one
    event loop; connected when it is first needed."""

    def __init__(self, endpoint: Endpoint, store: Store, counts: dict[str, float]) -> None:
        self.endpoint, self.store, self.counts = endpoint, store, counts
        self.proven = False  # whether the endpoint takes such requests as these
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._requests, self._tokens = Pace(endpoint.requests_per_minute), Pace(endpoint.tokens_per_minute)
        self._connection: Connection | None = None
        self._stopped: OpdError | None = None
        self._quiet_until = 0.0  # in the loop's time: the endpoint asked for it

    async def answer(self, key: str, body: Body) -> Answer:
        """Raises Failed where there is no answer after all attempts, or none can be, and as
        :meth:`ApiClient.ask` what stops everything."""
        for attempt in range(self.endpoint.retries + 1):
            try:
                return await self._attempt(key, body)
            except Failed as failed:
                patient = failed.wait is None or failed.wait <= MOST_PATIENCE
                if not (failed.passes and patient) or attempt == self.endpoint.retries:
                    raise
                self.counts[f"retries/{failed.kind}"] += 1
                await self._wait(attempt, failed.wait)
        raise AssertionError("the last attempt returns or raises")

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def _attempt(self, key: str, body: Body) -> Answer:
        await self._requests.take(1)
        taken = await self._tokens.take(estimated_tokens(body))
        async with self._slots:
            await self._quiet()
            self._check_may_ask()
            if self._connection is None:
                self._connection = Connection(self.endpoint)
            try:
                answer = await self._connection.send(body)
            except (BudgetSpent, ConfigError) as error:
                self._stopped = error
                raise
            except Failed as failed:
                if failed.kind == "bad_request" and not self.proven:
                    self._stopped = _first_refused(failed)
                    raise self._stopped from None
                raise
            cost = cost_of(answer, self.endpoint)
            self.store.put(key, answer, cost)
        self.proven, taken[1] = True, answer.tokens
        self.counts["paid"] += cost
        return answer

    def _check_may_ask(self) -> None:
        """Raise what has stopped everything, BudgetSpent where the budget has."""
        if self._stopped is not None:
            raise self._stopped
        spent, endpoint = self.store.spent, self.endpoint
        bounds = (("tokens", endpoint.max_tokens, spent.tokens), ("cost", endpoint.max_cost, spent.cost))
        for what, most, now in bounds:
            if most is not None and now >= most:
                raise BudgetSpent(f"The endpoint's max_{what} {most:g} is spent: it is at {now:g}.")

    async def _quiet(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._quiet_until - loop.time()) > 0:
            await asyncio.sleep(left)

    async def _wait(self, attempt: int, told: float | None) -> None:
        """Before the next attempt: as long as the endpoint asked for, of everyone, or ever longer, with
        jitter."""
        if told is not None:
            self._quiet_until = max(self._quiet_until, asyncio.get_running_loop().time() + told)
        else:
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))


def cost_of(answer: Answer, endpoint: Endpoint) -> float:
    """In the currency of the endpoint's prices; 0 without them."""
    if endpoint.prices is None:
        return 0.0
    read, written = answer.prompt_tokens, answer.completion_tokens
    return (read * endpoint.prices.input + written * endpoint.prices.output) / 1e6


def _first_refused(failed: Failed) -> ConfigError:
    return ConfigError(
        f"The endpoint refuses the first request: {failed.detail}. Set `endpoint.structured` or"
        " `endpoint.native_tools` to false if it knows no structured output or no tools; `endpoint.body` adds"
        " fields and takes some out."
    )
