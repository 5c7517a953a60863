"""Where an API is, how it is asked, and what may be spent there."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from opd_agents.config.base import ADDRESS, KeyVariable, Section


class Prices(Section):
    """Of a million tokens, in the currency that you count in."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class Endpoint(Section):
    """An OpenAI-compatible endpoint: where it is, how it is asked, and what may be spent there.

    ``key`` is the *name* of the environment variable that holds the key; null: it asks for none. Without a
    ``base_url`` that of the variable OPENAI_BASE_URL counts, else OpenAI's. ``max_tokens`` (prompts included)
    and ``max_cost`` bound what is ever spent on the answers of one ``cache``, a file of the run's own unless
    it is given; runs that share one share its answers and its budget.
    """

    base_url: str | None = None
    key: KeyVariable | None = "OPENAI_API_KEY"
    concurrency: int = Field(16, gt=0)  # requests at once
    requests_per_minute: int | None = Field(None, gt=0)
    tokens_per_minute: int | None = Field(None, gt=0)
    timeout: float = Field(120.0, gt=0)  # seconds of wall clock for one attempt, its whole answer included
    retries: int = Field(6, ge=0)  # of what may pass: 429, 5xx, time-outs, cut connections
    structured: bool = True  # it takes a JSON schema for its answer; else that is asked for in words
    native_tools: bool = True  # it takes tools; else they are described in words
    body: dict[str, Any] = {}  # further fields of every request; null takes one out
    prices: Prices | None = None
    max_tokens: int | None = Field(None, gt=0)
    max_cost: float | None = Field(None, gt=0)
    cache: str | None = None

    @model_validator(mode="after")
    def _sound(self) -> Endpoint:
        if self.base_url is not None and not re.fullmatch(ADDRESS, self.base_url):
            raise ValueError(
                "`base_url` is an address such as http://localhost:8000/v1, without name, key or query"
            )
        if self.max_cost is not None and self.prices is None:
            raise ValueError("`max_cost` needs `prices: {input, output}`, per million tokens")
        return self
