"""The client of an endpoint: many requests at once, each answer paid for once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from opd_agents.api.attempts import Attempts, cost_of
from opd_agents.api.connection import Failed, base_url_of, key_for
from opd_agents.api.store import Store, key_of
from opd_agents.api.wire import (
    Body,
    Reply,
    Request,
    after,
    asked_again,
    body_of,
    read_reply,
)
from opd_agents.config import Endpoint
from opd_agents.types import to_dict

RETRIED = ("rate_limit", "server_error", "timeout", "connection", "bad_json", "wrong_schema")
FAILURES = (*RETRIED, "bad_request", "refusal", "empty", "too_large", "bad_body")
MENDABLE = ("bad_json", "wrong_schema")
COUNTS = (
    *("requests", "cached", "prompt_tokens", "completion_tokens", "cost", "paid"),
    *(f"retries/{kind}" for kind in RETRIED),
    *(f"failures/{kind}" for kind in FAILURES),
)


class _Asked(NamedTuple):
    """What became of a request, and the exchanges that it took."""

    reply: Reply
    exchanges: list[dict[str, Any]]


class ApiClient:
    """The model ``model`` at ``endpoint``, its answers kept in the file ``store`` (None: in memory).

    ``counts`` are of this object: ``requests`` (answers needed, re-asked ones included), how many of them
    were ``cached``, tokens and ``cost`` of all of them as if each had been paid for, what was ``paid``,
    ``retries/KIND``, ``failures/KIND``. Costs are in the currency of ``endpoint.prices``, 0 without them.

    Usable from any one thread at a time. Nothing is connected before an answer is needed that is not stored.
    Raises ConfigError where there is no key and nothing is stored.
    """

    def __init__(self, model: str, endpoint: Endpoint, *, store: Path | None) -> None:
        check_key(endpoint, store)
        self.model, self.endpoint = model, endpoint
        self._path, self._base_url = store, base_url_of(endpoint)
        self._counts: dict[str, float] = dict.fromkeys(COUNTS, 0)
        self._exchanges: list[dict[str, Any]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._parts = AsyncExitStack()  # what is open while the loop runs

    @property
    def counts(self) -> Mapping[str, float]:
        return dict(self._counts)

    def take_transcript(self) -> list[dict[str, Any]]:
        """What was asked and answered since the last call, as JSON data in the order of the requests:
        ``model``, ``request``, ``sample``, and ``answer`` or ``failure``."""
        taken, self._exchanges = self._exchanges, []
        return taken

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Their replies in order; equal requests are asked once.

        What was answered is stored also where this raises: BudgetSpent when the budget does not allow another
        request (those on their way are waited for), ConfigError for what no retry can heal, such as a key
        that is refused, and KeyboardInterrupt.
        """
        loop = self._running()
        future = asyncio.run_coroutine_threadsafe(self._ask_all(requests), loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends connections and the thread behind them; idempotent, and the client may be used again."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        asyncio.run_coroutine_threadsafe(self._parts.aclose(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop of the thread that all requests live in, begun when it is first needed."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="api", daemon=True)
            self._thread.start()
            try:
                asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
            except BaseException:
                self.close()
                raise
        return self._loop

    async def _open(self) -> None:
        store = self._parts.enter_context(closing(Store(self._path)))
        self._attempts = Attempts(self.endpoint, store, self._counts)
        self._parts.push_async_callback(self._attempts.close)

    async def _ask_all(self, requests: Sequence[Request]) -> list[Reply]:
        bodies = [body_of(request, self.model, self.endpoint) for request in requests]
        keys = [self._key(body, one.sample) for body, one in zip(bodies, requests, strict=True)]
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        tasks = {key: asyncio.ensure_future(self._ask(requests[i], bodies[i])) for key, i in first.items()}
        results = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        replies: list[Reply] = []
        errors: list[BaseException] = []
        for place, key in enumerate(keys):
            match results[key]:
                case BaseException() as error:
                    errors.append(error)
                case asked if first[key] == place:
                    self._exchanges += asked.exchanges
                    replies.append(asked.reply)
                case asked:
                    replies.append(replace(asked.reply, cached=True))
        if errors:
            raise errors[0]
        return replies

    async def _ask(self, request: Request, body: Body) -> _Asked:
        """An answer that does not keep to the request's schema is asked for once more."""
        asked = await self._once(request, body)
        if (kind := asked.reply.failure) in MENDABLE:
            self._counts[f"retries/{kind}"] += 1
            text, problem = asked.exchanges[0]["answer"]["text"], asked.reply.detail
            again = await self._once(request, asked_again(body, text, problem))
            asked = _Asked(after(asked.reply, again.reply), asked.exchanges + again.exchanges)
        if asked.reply.failure is not None:
            self._counts[f"failures/{asked.reply.failure}"] += 1
        return asked

    async def _once(self, request: Request, body: Body) -> _Asked:
        """By the stored answer, or by one that is then stored."""
        self._counts["requests"] += 1
        exchange = {"model": self.model, "request": body, "sample": request.sample}
        key = self._key(body, request.sample)
        stored = self._attempts.store.get(key)
        try:
            answer = stored or await self._attempts.answer(key, body)
        except Failed as failed:
            failure = Reply(failure=failed.kind, detail=failed.detail)
            return _Asked(failure, [exchange | {"failure": failed.kind, "detail": failed.detail}])
        self._attempts.proven = True
        self._counts["cached"] += stored is not None
        self._counts["prompt_tokens"] += answer.prompt_tokens
        self._counts["completion_tokens"] += answer.completion_tokens
        self._counts["cost"] += cost_of(answer, self.endpoint)
        reply = replace(read_reply(answer, request), cached=stored is not None)
        return _Asked(reply, [exchange | {"answer": to_dict(answer)}])

    def _key(self, body: Body, sample: int) -> str:
        return key_of(self._base_url, body, sample)


def store_of(endpoint: Endpoint, folder: Path) -> Path:
    """The file of an endpoint's answers, of a run in ``folder``."""
    return Path(endpoint.cache) if endpoint.cache is not None else folder / "answers.sqlite"


def check_key(endpoint: Endpoint, store: Path | None) -> None:
    """Raise ConfigError where the endpoint needs a key and its variable has none, unless there are answers,
    by which a run may get along without it."""
    if store is None or not store.exists():
        key_for(endpoint)
