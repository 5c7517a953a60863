"""Whether a server's model is the trainer's: log-probs of the same tokens, after every update of its weights.

An update can fail in silence: reloading a model whose embeddings are tied may keep its old head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.policies.models import head, hidden_states
from opd_agents.policies.vllm_client import VllmClient

# How far the trainer's log-probs may be from the sampler's, in nats. A bfloat16 logit between 32 and 64, as
# large models have, is known to 0.25 only: one token says little there, but all of them tell other weights.
GAPS = {"float32": {"tolerance": 1e-3}, "bfloat16": {"tolerance": 5.0, "mean": 0.2}}
NEXT = 5  # most probable next tokens that are compared


class Probe:
    """Compares what the servers say of ``model`` (weights of ``dtype``) with what it is, sampled at
    ``temperature``."""

    def __init__(self, client: VllmClient, model: PreTrainedModel, temperature: float, dtype: str) -> None:
        self.client, self.model, self.temperature = client, model, temperature
        self._bounds = GAPS[dtype]

    def check(self, ids: Sequence[int]) -> None:
        """Raise AlignmentError unless every server's log-probs of ``ids``, and those that it would sample
        with next, are the trainer's; ConfigError where they are those of temperature 1."""
        logits = self._logits(ids)
        request = {"prompt": list(ids), "max_tokens": 1, "return_tokens_as_token_ids": True}
        # before the prompt is read anew for its own log-probs: this would meet what a cache still has of it
        sampling = self.client.complete_on_each(
            {**request, "temperature": self.temperature, "logprobs": NEXT}
        )
        reading = self.client.complete_on_each({**request, "temperature": 1.0, "prompt_logprobs": 0})
        for url, choice in sampling.items():
            heated = _gaps(choice, logits[-1] / self.temperature)
            if self._agree(_gaps(choice, logits[-1])) and not self._agree(heated):
                raise ConfigError(
                    f"{self.client.place}.urls: {url} gives log-probs of temperature 1, whatever it samples "
                    f"at, and rollout.temperature is {self.temperature:g}. Start it with --logprobs-mode "
                    "processed_logprobs"
                )
            self._check(url, "next tokens", heated)
        own = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None]).squeeze(1)
        for url, choice in reading.items():
            places = zip(ids, choice["prompt_logprobs"], strict=True)
            given = [place[str(token)]["logprob"] for token, place in list(places)[1:]]
            self._check(url, "a conversation", own - torch.tensor(given))

    @torch.no_grad()
    def _logits(self, ids: Sequence[int]) -> Tensor:
        states = hidden_states(self.model, torch.tensor([ids]))[0]
        logits: Tensor = head(self.model)(states).float().cpu()
        return logits

    def _agree(self, gaps: Tensor) -> bool:
        gaps = gaps.abs()
        mean = self._bounds.get("mean", self._bounds["tolerance"])
        return bool(gaps.max() <= self._bounds["tolerance"]) and bool(gaps.mean() <= mean)

    def _check(self, url: str, what: str, gaps: Tensor) -> None:
        if not self._agree(gaps):
            worst, mean = float(gaps.abs().max()), float(gaps.abs().mean())
            raise AlignmentError(
                f"{self.client.place}.urls: {url} has not the trainer's weights: its log-probs of {what} are "
                f"up to {worst:.3g} nats away, {mean:.3g} in the mean (tolerances {self._bounds}). An update "
                "did not arrive whole, or the server runs another architecture, dtype or logprobs mode."
            )


def _gaps(choice: Mapping[str, Any], logits: Tensor) -> Tensor:
    """Of the next tokens' log-probs to those of ``logits`` [V]."""
    given = choice["logprobs"]["top_logprobs"][0]
    ids = [int(token.removeprefix("token_id:")) for token in given]
    return logits.log_softmax(-1)[ids] - torch.tensor(list(given.values()))
