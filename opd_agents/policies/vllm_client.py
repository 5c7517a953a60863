"""vLLM servers over HTTP: token ids in, token ids and log-probs out.

Texts are never looked at: that of a part of a character is empty, and encoded anew it may be other tokens.
"""

from __future__ import annotations

import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2

from opd_agents.chat import Chat
from opd_agents.config import Server
from opd_agents.errors import ConfigError, ServerError

SLACK = 8  # requests by which a server may be busier than another and keep the conversations that it caches
AVOIDED = 10.0  # seconds for which a server that failed is asked for nothing while another works
QUICK = 30.0  # seconds for an answer that takes no computing
BACKOFF, LONGEST = 0.5, 30.0  # seconds before the first retry, doubled with each, up to the longest
TEXT = 'Which of the 17 cups is red?\n\n{"name": "search", "arguments": {"text": "caf\u00e9 \u2603"}}'

# The plain softmax at the temperature asked for, whatever the model's generation_config.json says.
PLAIN = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "ignore_eos": True, "add_special_tokens": False, "skip_special_tokens": False,
}  # fmt: skip


@dataclass(slots=True)
class _Replica:
    url: str
    load: int = 0  # requests under way
    failed_at: float = -AVOIDED  # of time.monotonic()


class VllmClient:
    """The servers of a config's section ``place``.

    A request goes to the server that its key names, which still holds the beginning of that conversation,
    unless it is busier than others. What may pass is tried again, on another server where there is one.
    """

    def __init__(self, settings: Server, place: str) -> None:
        """Raises ConfigError where the variable that should hold the key is not set."""
        self.place, self._settings, self._model = place, settings, settings.served_as
        self.urls = settings.urls
        self._replicas = [_Replica(url) for url in settings.urls]
        self._lock = threading.Lock()
        most = settings.concurrency * len(settings.urls)
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="vllm")
        headers = {}
        if settings.key is not None:
            if not (key := os.environ.get(settings.key)):
                raise ConfigError(f"{place}.key: the environment variable {settings.key} is not set.")
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx2.Client(
            headers=headers, timeout=httpx2.Timeout(settings.timeout, connect=10.0), trust_env=False,
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
        )  # fmt: skip

    def complete(self, bodies: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
        """The choice that answers each completion request, in order; all are under way together. Raises
        ServerError for one that is refused, or that no server answers."""
        work = [partial(self._balanced, body, key) for body, key in zip(bodies, keys, strict=True)]
        return self._all(work)

    def complete_on_each(self, body: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The choice of every server, by its URL. Raises as :meth:`complete`."""
        given = self._all([partial(self._again, partial(self._choice, url, body)) for url in self.urls])
        return dict(zip(self.urls, given, strict=True))

    def post_to_each(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What every server answers, by its URL. Raises ServerError; nothing is asked twice."""
        given = self._all([partial(self.post, url, path, body) for url in self.urls])
        return dict(zip(self.urls, given, strict=True))

    def get(self, url: str, path: str) -> Any:
        """What the server at ``url`` answers. Raises ServerError; one attempt."""
        return self._read(url + path, lambda: self._http.get(url + path, timeout=QUICK))

    def post(self, url: str, path: str, body: Mapping[str, Any]) -> Any:
        """What the server at ``url`` answers, None for an empty answer. Raises ServerError; one attempt."""
        return self._read(url + path, lambda: self._http.post(url + path, json=body))

    def _read(self, where: str, ask: Callable[[], httpx2.Response]) -> Any:
        try:
            answer = ask()
        except httpx2.TransportError as error:
            raise _MayPassError(f"{self.place}: {where} did not answer ({_told(error)}).") from None
        if answer.status_code != 200:
            passes = answer.status_code == 429 or answer.status_code >= 500
            words = f"{self.place}: {where} answered {answer.status_code}: {answer.text[:500]}"
            raise (_MayPassError if passes else ServerError)(words)
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise _MayPassError(f"{self.place}: {where} answered no JSON: {answer.text[:200]}") from None

    def check(self, chat: Chat, context: int, *, beyond: int = 0) -> None:
        """Raise ConfigError unless every server is there, serves the model, has the tokenizer of ``chat``,
        and room for conversations of ``context`` tokens (rollout.max_context_tokens) and ``beyond`` them."""
        own = chat.tokenizer.encode(TEXT, add_special_tokens=False)
        for url in self.urls:
            served = self._served(url)
            self._model = served["id"]
            if served["max_model_len"] < context + beyond:
                more = f" and its answer {beyond} more" if beyond else ""
                raise ConfigError(
                    f"{self.place}.urls: {url} reads {served['max_model_len']} tokens, but conversations may "
                    f"have {context}{more}. Start it with --max-model-len {context + beyond}, or lower "
                    "rollout.max_context_tokens."
                )
            body = {"model": self._model, "prompt": TEXT, "add_special_tokens": False}
            theirs = self.post(url, "/tokenize", body)["tokens"]
            if theirs != own:
                raise ConfigError(
                    f"{self.place}.urls: {url} has another tokenizer than the student: a text that the "
                    f"student reads as the ids {own[:8]}... it reads as {theirs[:8]}... Serve a model of the "
                    "student's tokenizer."
                )

    def check_route(self, path: str, remedy: str) -> None:
        """Raise ConfigError for a server that has not the route ``path``; it has it when started with
        ``remedy``."""
        for url in self.urls:
            try:
                known = self._http.post(url + path, json={}, timeout=QUICK).status_code != 404
            except httpx2.HTTPError as error:
                raise self._absent(url, error) from None
            if not known:
                raise ConfigError(f"{self.place}.urls: {url} has no {path}. Start it with {remedy}.")

    def _absent(self, url: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self.place}.urls: {url} does not answer as a vLLM server does ({_told(error)}). Start one "
            "with: vllm serve MODEL --port PORT"
        )

    def _served(self, url: str) -> dict[str, Any]:
        """What a server says of the model that it serves."""
        try:
            answer = self._http.get(f"{url}/v1/models", timeout=QUICK)
            models = {one["id"]: one for one in answer.raise_for_status().json()["data"]}
        except (httpx2.HTTPError, ValueError, KeyError) as error:
            raise self._absent(url, error) from None
        name = self._model or (next(iter(models)) if len(models) == 1 else None)
        if name not in models:
            wrong = f"has no {name!r}" if name else "has several models"
            raise ConfigError(f"{self.place}.served_as: {url} {wrong}; name one of {', '.join(models)}.")
        return dict(models[name])

    def _all(self, work: Sequence[Callable[[], Any]]) -> list[Any]:
        """All results, in order; after a failure, or an interrupt, nothing new is begun."""
        futures = [self._threads.submit(one) for one in work]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _balanced(self, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        return self._again(lambda: self._on_one(body, key))

    def _on_one(self, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        replica = self._take(key)
        try:
            return self._choice(replica.url, body)
        except _MayPassError:
            replica.failed_at = time.monotonic()
            raise
        finally:
            with self._lock:
                replica.load -= 1

    def _take(self, key: str) -> _Replica:
        with self._lock:
            now = time.monotonic()
            working = [one for one in self._replicas if now - one.failed_at >= AVOIDED] or self._replicas
            least = min(working, key=lambda one: one.load)
            home = working[zlib.crc32(key.encode()) % len(working)]
            chosen = home if home.load < least.load + SLACK else least
            chosen.load += 1
            return chosen

    def _again(self, attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for number in range(self._settings.retries):
            try:
                return attempt()
            except _MayPassError:
                time.sleep(random.uniform(0.5, 1.0) * min(LONGEST, BACKOFF * 2**number))
        return attempt()

    def _choice(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice that answers a request."""
        known = {"model": self._model, "return_token_ids": True}
        answer = self.post(url, "/v1/completions", {**PLAIN, **known, **body})
        choice: dict[str, Any] = answer["choices"][0]
        if choice["prompt_token_ids"] != list(body["prompt"]):
            raise ServerError(f"{self.place}: {url} answered other token ids than it was asked about.")
        return choice


class _MayPassError(ServerError):
    """A failure that the same request need not have again."""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
