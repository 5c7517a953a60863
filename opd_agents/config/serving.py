"""Models behind vLLM servers: where they are, how they are asked, how the student's weights reach them."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from opd_agents.config.base import ADDRESS, KeyVariable, Section


class Server(Section):
    """vLLM servers of one model, as many as there are ``urls`` (such as http://127.0.0.1:8000); requests are
    shared out among them.

    ``served_as`` is the model's name there; null: it is the only one. ``key`` is the *name* of the
    environment variable that holds the servers' API key; null: they ask for none.
    """

    urls: list[str] = Field(min_length=1)
    served_as: str | None = None
    key: KeyVariable | None = None
    concurrency: int = Field(64, gt=0)  # requests at once to each
    timeout: float = Field(600.0, gt=0)  # seconds of one attempt
    retries: int = Field(5, ge=0)  # of what may pass: 429, 5xx, time-outs, cut connections

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not re.fullmatch(ADDRESS, url):
                raise ValueError(f"{url!r} is no address such as http://127.0.0.1:8000")
        plain = [url.rstrip("/").removesuffix("/v1") for url in urls]
        if len(set(plain)) < len(plain):
            raise ValueError("the same server stands there twice")
        return plain


class Engine(Section):
    """vLLM in this process: ``memory`` is the share of the GPU's that it may fill, the model's weights among
    it; without a ``dtype`` in the student's."""

    memory: float = Field(0.3, gt=0, lt=1)
    dtype: Literal["float32", "bfloat16"] | None = None


class TransformersSampling(Section):
    """The student acts in this process."""

    kind: Literal["transformers"] = "transformers"


class VllmSampling(Server):
    """The student acts on vLLM servers, which get its weights after every step: by ``reload`` from files in
    ``folder`` that they read, too (null: of the run's folder), or by ``nccl`` from GPU to GPU."""

    kind: Literal["vllm"]
    weights: Literal["reload", "nccl"] = "reload"
    folder: str | None = None


Sampler: TypeAlias = Annotated[TransformersSampling | VllmSampling, Field(discriminator="kind")]
