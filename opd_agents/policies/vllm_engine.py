"""vLLM within this process: asked, and answering, as a server is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from opd_agents.config import Engine
from opd_agents.errors import ConfigError
from opd_agents.plugins import need
from opd_agents.policies.vllm_client import PLAIN

LOGPROBS = 20  # of a token at least, so that teachers who ask for less can share an engine
PREFILL = 2048  # tokens of a forward pass, whose logits over the whole vocabulary stand beside the cache
TEXTUAL = ("prompt", "add_special_tokens")  # of a request: what is no parameter of sampling


class VllmEngine:
    """The checkpoint ``path`` in an engine of the config's section ``place``, on this process's device.

    An engine stays until the process ends: stages and seeds of a run that ask for the same share it.
    """

    def __init__(
        self, settings: Engine, place: str, path: str, *, dtype: str, max_tokens: int, k: int, ranks: int
    ) -> None:
        """``max_tokens``: of a prompt and its answer; ``k``: log-probs of a token at most; ``ranks``: of the
        run. Raises MissingPart without vLLM, ConfigError for several ranks, and for a model that vLLM cannot
        load or hold."""
        if ranks > 1:
            raise ConfigError(
                f"{place}.engine: vLLM in each of {ranks} processes would take the others for its own. Start"
                " a server of the teacher, and give its `urls`."
            )
        self.place = place
        # Both are read when vLLM is imported. An engine in a process of its own would outlive a killed run.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._vllm = need("vllm", "vllm", f"{place}.engine")
        try:
            self._engine = _engine(path, dtype, settings.memory, max_tokens, max(k, LOGPROBS))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{place}.engine: vLLM cannot load {path}: {error}") from error

    def complete(self, bodies: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
        """The choice that answers each completion request, in order; there is one place for all ``keys``."""
        prompts = [{"prompt_token_ids": list(body["prompt"])} for body in bodies]
        parameters = [self._parameters(body) for body in bodies]
        return [_choice(one) for one in self._engine.generate(prompts, parameters, use_tqdm=False)]

    def complete_on_each(self, body: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Its choice, by its name."""
        return {"vLLM": self.complete([body], [""])[0]}

    def _parameters(self, body: Mapping[str, Any]) -> Any:
        asked = {name: value for name, value in {**PLAIN, **body}.items() if name not in TEXTUAL}
        return self._vllm.SamplingParams(**asked, detokenize=False)


@cache
def _engine(path: str, dtype: str, memory: float, max_tokens: int, k: int) -> Any:
    from vllm import LLM

    return LLM(
        model=path, dtype=dtype, gpu_memory_utilization=memory, max_model_len=max_tokens, max_logprobs=k,
        max_num_batched_tokens=PREFILL, logprobs_mode="processed_logprobs", generation_config="vllm",
        enforce_eager=True,  # graphs take minutes to make, and scoring gains little from them
    )  # fmt: skip


def _choice(output: Any) -> dict[str, Any]:
    """What a server writes of the same answer."""
    (written,) = output.outputs
    told = zip(written.token_ids, written.logprobs, strict=True) if written.logprobs else ()
    return {
        "token_ids": list(written.token_ids),
        "logprobs": {"token_logprobs": [given[token].logprob for token, given in told]},
        "finish_reason": written.finish_reason,
        "prompt_logprobs": [place and _named(place) for place in output.prompt_logprobs or ()],
    }


def _named(place: Mapping[int, Any]) -> dict[str, Any]:
    return {str(token): {"logprob": one.logprob, "rank": one.rank} for token, one in place.items()}
