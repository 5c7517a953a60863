"""The transformers sampler: actions of many episodes, written in lock-step token by token.

Draws are inverse-CDF on counter-based uniforms, so an episode's tokens do not depend on which other episodes
share the batch beyond floating-point rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.chat.thinking_budget import ThinkingBudget, WrittenAction
from opd_agents.policies.base import Action, History
from opd_agents.policies.reader import NextTokens, Reader
from opd_agents.types import Actor, StopReason


class TransformersSampler:
    """Samples at ``temperature`` (0: greedy). Log-probs are of the sampling distribution, in nats.

    Top-p, top-k and penalties do not exist here: what is sampled is what is scored. ``thinking`` closes
    thoughts that use up their budget; the ids that it puts there are ``forced``. Asked to act for nobody, it
    gives the cache's memory back. ``reuse`` and ``weights`` are the :class:`Reader`'s.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: frozenset[int],
        *,
        actor: Actor,
        temperature: float,
        thinking: ThinkingBudget | None = None,
        reuse: bool = True,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.reader = Reader(model, temperature, reuse=reuse, weights=weights)
        self.model, self.actor, self.thinking = model, actor, thinking
        self.policy_version = 0
        self.generated_tokens = 0  # sampled; forced ones are not
        self._end_ids = torch.tensor(sorted(end_ids), device=model.device)

    @property
    def flops(self) -> int:
        return self.reader.flops

    def reset(self, policy_version: int) -> None:
        """The weights have changed."""
        self.policy_version = policy_version
        self.release()

    def release(self) -> None:
        """Free the keys and values that are kept: their episodes have ended."""
        self.reader.release()

    def act(self, histories: Sequence[History]) -> list[Action]:
        with self.reader.weights():
            return self.act_from(self.reader, histories)

    @torch.inference_mode()
    def act_from(self, source: NextTokens, histories: Sequence[History]) -> list[Action]:
        """Actions whose tokens are drawn from the distributions of ``source``, with log-probs under them."""
        if not histories:
            self.release()
            return []
        written = [self.thinking.follow(history.ids) for history in histories] if self.thinking else []
        tokens, logprobs = self._write(source, histories, written)
        forced = [tuple(one.forced) for one in written] or [()] * len(histories)
        actions = [self._action(*row) for row in zip(tokens, logprobs, forced, strict=True)]
        source.end(histories, actions)
        self.generated_tokens += sum(action.n_sampled for action in actions)
        return actions

    def _write(
        self, source: NextTokens, histories: Sequence[History], written: Sequence[WrittenAction]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The ids of each action and their log-probs."""
        device, longest = self.model.device, max(history.max_tokens for history in histories)
        limits = torch.tensor([history.max_tokens for history in histories], device=device)
        drawn = np.stack([history.random().random(longest) for history in histories])
        uniforms = torch.from_numpy(drawn).to(device)
        alive = torch.ones(len(histories), dtype=torch.bool, device=device)
        sampled: list[Tensor] = []
        scores: list[Tensor] = []
        lengths = torch.zeros(len(histories), dtype=torch.int64, device=device)
        distribution = source.begin(histories)
        for count in range(longest):
            tokens, logprobs = _draw(distribution, uniforms[:, count])
            if written:
                tokens, logprobs = _written(written, alive, tokens, logprobs)
            sampled.append(tokens)
            scores.append(logprobs)
            lengths += alive
            alive = alive & ~torch.isin(tokens, self._end_ids) & (count + 1 < limits)
            if not bool(alive.any()):
                break
            distribution = source.follow(tokens, alive)
        ids, values = torch.stack(sampled, 1).tolist(), torch.stack(scores, 1).tolist()
        ids = [row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)]
        values = [row[:n] for row, n in zip(values, lengths.tolist(), strict=True)]
        return ids, values

    def _action(
        self, ids: Sequence[int], logprobs: Sequence[float], forced: tuple[tuple[int, int], ...]
    ) -> Action:
        ended = ids[-1] in self._end_ids.tolist()
        return Action(
            self.actor, StopReason.END if ended else StopReason.LENGTH, tuple(ids), tuple(logprobs),
            policy_version=self.policy_version, forced=forced,
        )  # fmt: skip


def _draw(logprobs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] of distributions [B, V] and their log-probs [B]; inverse CDF in float64."""
    cdf = logprobs.double().exp().cumsum(-1)
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)
    tokens = tokens.clamp(max=logprobs.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _written(
    rows: Sequence[WrittenAction], alive: Tensor, tokens: Tensor, logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """What each living row writes next [B], and its log-prob [B]: 0 where it is not the sampled token."""
    pairs = zip(rows, alive.tolist(), tokens.tolist(), strict=True)
    chosen = torch.tensor([row.write(token) if live else token for row, live, token in pairs])
    forced = torch.tensor([row.is_forced for row in rows])
    return chosen.to(tokens.device), logprobs.masked_fill(forced.to(logprobs.device), 0.0)
