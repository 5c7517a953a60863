"""The transformers sampler: many episodes in lock-step, one key-value cache kept across turns.

Each row of the cache belongs to one episode. Before a turn the cached ids are checked to be a prefix of
the episode's history; only what is new is fed. Draws are inverse-CDF on counter-based uniforms, so an
episode's tokens do not depend on which other episodes share the batch beyond floating-point rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from opd_agents.policies.base import Action, History
from opd_agents.policies.cache import GrowingLayer, growing_cache
from opd_agents.policies.models import forward_flops, head
from opd_agents.types import Actor, StopReason


@dataclass(frozen=True, slots=True)
class _Cached:
    """Row r holds the keys and values of ``ids[r]`` in the slots where ``valid[r]`` (bool [B, L])."""

    uids: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    valid: Tensor
    store: Cache


class TransformersSampler:
    """Samples at ``temperature`` (0: greedy). Log-probs are of the sampling distribution, in nats.

    Top-p, top-k and penalties do not exist here: what is sampled is what is scored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: frozenset[int],
        *,
        actor: Actor,
        temperature: float,
        reuse: bool = True,
    ) -> None:
        self.model, self.actor, self.temperature, self.reuse = model, actor, temperature, reuse
        self.policy_version = 0
        self.generated_tokens = 0  # sampled
        self.flops = 0
        self._end_ids = torch.tensor(sorted(end_ids))
        self._cached: _Cached | None = None

    def reset(self, policy_version: int) -> None:
        """Forget the cache: the weights have changed."""
        self.policy_version, self._cached = policy_version, None

    @torch.inference_mode()
    def act(self, histories: Sequence[History]) -> list[Action]:
        if not histories:
            return []
        cached = self._select(histories)
        new = [history.ids[len(ids) :] for history, ids in zip(histories, cached.ids, strict=True)]
        logits, valid = self._prefill(cached, new)
        tokens, logprobs, valid = self._decode(cached.store, histories, logits, valid)
        actions = [
            self._action(row, history)
            for row, history in zip(zip(tokens, logprobs, strict=True), histories, strict=True)
        ]
        fed = tuple(h.ids + a.ids[:-1] for h, a in zip(histories, actions, strict=True))
        self._cached = (
            _Cached(tuple(h.uid for h in histories), fed, valid, cached.store) if self.reuse else None
        )
        self._count(new, actions, histories)
        return actions

    def _select(self, histories: Sequence[History]) -> _Cached:
        """The cache rows of these episodes in their order, compacted to the front; an episode without a
        row, or whose row is no proper prefix of its history, starts from an empty one."""
        old = self._cached
        if old is None:
            empty = torch.zeros(len(histories), 0, dtype=torch.bool)
            return _Cached(tuple(h.uid for h in histories), ((),) * len(histories), empty, growing_cache())
        row_of = {uid: row for row, uid in enumerate(old.uids)}
        rows = [row_of.get(h.uid, -1) for h in histories]
        usable = [
            row >= 0 and len(old.ids[row]) < len(h.ids) and h.ids[: len(old.ids[row])] == old.ids[row]
            for row, h in zip(rows, histories, strict=True)
        ]
        index = torch.tensor([max(row, 0) for row in rows])
        valid = old.valid[index] & torch.tensor(usable)[:, None]
        length = int(valid.sum(1).max())
        order = torch.argsort(~valid, dim=1, stable=True)[:, :length]
        store = growing_cache()
        for layer, kept in enumerate(old.store.layers):
            assert isinstance(kept, GrowingLayer)  # growing_cache() makes no other
            gather = order[:, None, :, None].expand(-1, kept.keys.shape[1], -1, kept.keys.shape[3])
            store.update(kept.keys[index].gather(2, gather), kept.values[index].gather(2, gather), layer)
        ids = tuple(old.ids[row] if good else () for row, good in zip(rows, usable, strict=True))
        return _Cached(tuple(h.uid for h in histories), ids, valid.gather(1, order), store)

    def _prefill(self, cached: _Cached, new: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Feed the new context, right-padded; returns logits [B, V] after each row's last token and the
        validity of all cache slots [B, L]."""
        lengths = torch.tensor([len(ids) for ids in new])
        width = int(lengths.max())
        ids = torch.zeros(len(new), width, dtype=torch.int64)
        for row, values in enumerate(new):
            ids[row, : len(values)] = torch.tensor(values)
        fresh = torch.arange(width)[None] < lengths[:, None]
        valid = torch.cat([cached.valid, fresh], dim=1)
        start = cached.valid.sum(1, keepdim=True)
        # [B, 1, width, L]: every valid old slot, and the new ones up to the query
        past = cached.valid[:, None, :].expand(-1, width, -1)
        causal = torch.tril(torch.ones(width, width, dtype=torch.bool))[None].expand(len(new), -1, -1)
        hidden = self._forward(
            ids, start + torch.arange(width)[None], torch.cat([past, causal], 2)[:, None], cached.store
        )
        last = hidden[torch.arange(len(new)), lengths - 1]
        return head(self.model)(last), valid

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, store: Cache) -> Tensor:
        return self.model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=store, use_cache=True
        ).last_hidden_state

    def _decode(
        self, store: Cache, histories: Sequence[History], logits: Tensor, valid: Tensor
    ) -> tuple[list[list[int]], list[list[float]], Tensor]:
        limits = torch.tensor([history.max_tokens for history in histories])
        longest = int(limits.max())
        uniforms = torch.from_numpy(np.stack([history.random().random(longest) for history in histories]))
        positions = valid.sum(1)
        alive = torch.ones(len(histories), dtype=torch.bool)
        sampled: list[Tensor] = []
        scores: list[Tensor] = []
        lengths = torch.zeros(len(histories), dtype=torch.int64)
        for count in range(longest):
            tokens, logprobs = self._draw(logits, uniforms[:, count])
            sampled.append(tokens)
            scores.append(logprobs)
            lengths += alive
            alive = alive & ~torch.isin(tokens, self._end_ids) & (count + 1 < limits)
            if not bool(alive.any()):
                break
            valid = torch.cat([valid, alive[:, None]], dim=1)
            hidden = self._forward(tokens[:, None], positions[:, None], valid[:, None, None, :], store)
            logits = head(self.model)(hidden[:, -1])
            positions = positions + alive
        ids, values = torch.stack(sampled, 1).tolist(), torch.stack(scores, 1).tolist()
        ids = [row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)]
        values = [row[:n] for row, n in zip(values, lengths.tolist(), strict=True)]
        return ids, values, valid

    def _draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log-probs [B]; inverse CDF in float64."""
        if self.temperature == 0:
            tokens = logits.argmax(-1)
            return tokens, torch.zeros(len(tokens))
        logprobs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        cdf = logprobs.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def _action(self, row: tuple[list[int], list[float]], history: History) -> Action:
        ids, logprobs = row
        ended = ids[-1] in self._end_ids.tolist()
        return Action(
            self.actor, StopReason.END if ended else StopReason.LENGTH, tuple(ids), tuple(logprobs),
            policy_version=self.policy_version,
        )  # fmt: skip

    def _count(
        self, new: Sequence[tuple[int, ...]], actions: Sequence[Action], histories: Sequence[History]
    ) -> None:
        sampled = sum(len(action.ids) for action in actions)
        context = sum(len(history.ids) for history in histories) / len(histories)
        self.generated_tokens += sampled
        # an action's last token is fed with what follows it
        fed = sum(map(len, new)) + sampled - len(actions)
        self.flops += forward_flops(self.model, fed, context)
