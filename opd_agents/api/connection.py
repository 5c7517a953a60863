"""One attempt at an endpoint: a request's body in, its answer or the kind of its failure out."""

from __future__ import annotations

import asyncio
import os
import time
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx2
import openai

from opd_agents.api.wire import Answer, Body, read_answer
from opd_agents.config import Endpoint
from opd_agents.errors import BudgetSpent, ConfigError, OpdError

OPENAI = "https://api.openai.com/v1"
MOST_BYTES = 4_000_000  # of an answer's body
REACH = 10.0  # s, for an endpoint to say anything
TYPED = ("model", "messages")  # what the SDK wants by name; the rest of a body goes beside it


class Failed(OpdError):
    """An attempt that brought no answer: ``kind`` is rate_limit, server_error, timeout, connection or
    bad_request; all but the last are worth another attempt, after ``wait`` seconds where the endpoint said
    so."""

    def __init__(self, kind: str, detail: str, wait: float | None = None) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.wait = kind, detail, wait

    @property
    def passes(self) -> bool:
        return self.kind != "bad_request"


class Connection:
    """An endpoint and the key to it, which leaves this object in a request's header alone. For one event
    loop.

    Raises ConfigError where the environment variable that should hold the key does not.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self._key = endpoint, key_for(endpoint)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=base_url_of(endpoint), max_retries=0,
            timeout=endpoint.timeout,
            http_client=openai.DefaultAsyncHttpxClient(
                limits=httpx2.Limits(max_connections=endpoint.concurrency)
            ),
        )  # fmt: skip

    async def send(self, body: Body) -> Answer:
        """Raises Failed; ConfigError for a key or a model that the endpoint refuses, BudgetSpent where its
        own quota is used up."""
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                return await self._send(body)
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException):
            raise Failed("timeout", f"no answer within {self.endpoint.timeout:g} s") from None
        except (openai.APIConnectionError, httpx2.TransportError) as error:
            cause = error.__cause__ or error
            raise Failed("connection", self._shown(f"{type(cause).__name__}: {cause}")) from None

    async def _send(self, body: Body) -> Answer:
        rest = {key: value for key, value in body.items() if key not in TYPED}
        create = cast(Any, self._client.chat.completions.with_streaming_response.create)
        received = bytearray()
        async with create(model=body["model"], messages=body["messages"], extra_body=rest) as response:
            async for chunk in response.iter_bytes():
                received += chunk
                if len(received) > MOST_BYTES:
                    return Answer(problem="too_large", completion_tokens=MOST_BYTES // 4)
        return read_answer(bytes(received), body)

    async def close(self) -> None:
        await self._client.close()

    def _refused(self, error: openai.APIStatusError) -> OpdError:
        """What an HTTP status means."""
        status, told = error.status_code, self._shown(error.message)
        where = f"{base_url_of(self.endpoint)} answered {status}: {told}"
        if status == 402 or error.code == "insufficient_quota":
            return BudgetSpent(f"The endpoint's own quota is used up: {where}")
        if status in (401, 403):
            return ConfigError(f"{where}. The key comes from the environment variable {self.endpoint.key}.")
        if status == 404:
            return ConfigError(f"{where}. Check the model's name and the endpoint's `base_url`.")
        if status == 429:
            return Failed("rate_limit", where, retry_after(error.response.headers))
        if status >= 500 or status in (408, 409):
            return Failed("server_error", where, retry_after(error.response.headers))
        return Failed("bad_request", where)

    def _shown(self, text: str) -> str:
        """Safe to show: some servers repeat the key that they were given."""
        return (text.replace(self._key, "***") if self._key else text)[:300]


def base_url_of(endpoint: Endpoint) -> str:
    return endpoint.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI


def key_for(endpoint: Endpoint) -> str | None:
    """The key. Raises ConfigError where the variable that the config names is not set."""
    if endpoint.key is None:
        return None
    if not (key := os.environ.get(endpoint.key, "").strip()):
        raise ConfigError(
            f"The environment variable {endpoint.key} is not set; it must hold the key to "
            f"{base_url_of(endpoint)}. For a server that asks for none set `endpoint.key: null`."
        )
    return key


def check_reachable(endpoint: Endpoint) -> None:
    """Ask for the list of models, which costs nothing. Raises ConfigError where nobody answers, where the key
    is refused, and where there is none; any other answer will do, for not every endpoint has such a list."""
    where, key = base_url_of(endpoint), key_for(endpoint)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        status = httpx2.get(f"{where}/models", headers=headers, timeout=REACH).status_code
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ConfigError(
            f"{where} cannot be reached ({type(error).__name__}: {error}). Start the server, or name another"
            " address with `endpoint.base_url` or the environment variable OPENAI_BASE_URL"
            + (f", and the variable of its key, now {endpoint.key}, with `endpoint.key`." if key else ".")
        ) from None
    if status == 401:
        raise ConfigError(f"{where} refuses the key in the environment variable {endpoint.key}.")


def retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds that the endpoint asks to wait: a number, or until a date."""
    told = headers.get("retry-after", "")
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None
