"""The transformers sampler: many episodes in lock-step, one key-value cache kept across turns.

Each row of the cache belongs to one episode. Before a turn the cached ids are checked to be a prefix of
the episode's history; only what is new is fed. Draws are inverse-CDF on counter-based uniforms, so an
episode's tokens do not depend on which other episodes share the batch beyond floating-point rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from opd_agents.chat.thinking_budget import ThinkingBudget, WrittenAction
from opd_agents.policies.attention import attention_masks, layer_windows
from opd_agents.policies.base import Action, History
from opd_agents.policies.cache import GrowingLayer, growing_cache
from opd_agents.policies.models import forward_flops, head
from opd_agents.types import Actor, StopReason

PREFILL_ELEMENTS = 2**25  # of the mask of one forward pass; longer contexts are fed in parts
SHARED_TOKENS = 64  # a common beginning of so many tokens is worth feeding once
HOLES = 0.25  # share of a cache's slots beyond which it is copied without its holes


@dataclass(frozen=True, slots=True)
class _Cached:
    """Row r holds the keys and values of ``ids[r]``; ``slots`` (int64 [B, L]) is the position of the token in
    each slot of the cache, -1 for a hole."""

    uids: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    slots: Tensor
    store: Cache


class TransformersSampler:
    """Samples at ``temperature`` (0: greedy). Log-probs are of the sampling distribution, in nats.

    Top-p, top-k and penalties do not exist here: what is sampled is what is scored. ``thinking`` closes
    thoughts that use up their budget; the ids that it puts there are ``forced``. Asked to act for nobody, it
    gives the cache's memory back.
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
    ) -> None:
        self.thinking = thinking
        self.model, self.actor, self.temperature, self.reuse = model, actor, temperature, reuse
        self.policy_version = 0
        self.generated_tokens = 0  # sampled; forced ones are not
        self.flops = 0
        self._end_ids = torch.tensor(sorted(end_ids), device=model.device)
        self._windows = dict(layer_windows(model))
        self._cached: _Cached | None = None

    def reset(self, policy_version: int) -> None:
        """The weights have changed."""
        self.policy_version = policy_version
        self.release()

    def release(self) -> None:
        """Free the keys and values that are kept: their episodes have ended."""
        self._cached = None

    @torch.inference_mode()
    def act(self, histories: Sequence[History]) -> list[Action]:
        if not histories:
            return []
        old, self._cached = self._cached, None  # an error leaves none behind that was extended by half
        cached = self._select(old, histories)
        new: Sequence[tuple[int, ...]] = [
            history.ids[len(ids) :] for history, ids in zip(histories, cached.ids, strict=True)
        ]
        cached, new, fed_tokens = self._feed_shared(cached, new)
        final, slots = self._feed(cached, new)
        logits = head(self.model)(final)
        written = [self.thinking.follow(history.ids) for history in histories] if self.thinking else []
        tokens, logprobs, slots = self._decode(cached.store, histories, logits, slots, written)
        forced = [tuple(one.forced) for one in written] or [()] * len(histories)
        actions = [self._action(*row) for row in zip(tokens, logprobs, forced, strict=True)]
        fed = tuple(h.ids + a.ids[:-1] for h, a in zip(histories, actions, strict=True))
        self._cached = (
            _Cached(tuple(h.uid for h in histories), fed, slots, cached.store) if self.reuse else None
        )
        self._count(fed_tokens + sum(map(len, new)), actions, histories)
        return actions

    def _select(self, old: _Cached | None, histories: Sequence[History]) -> _Cached:
        """The cache rows of these episodes in their order; an episode without a row, or whose row is no
        proper prefix of its history, starts from an empty one. Where episodes have left, or holes have grown
        to too many, the rows are copied, compacted to the front; ``old`` has then lost its layers."""
        if old is None:
            empty = torch.zeros(len(histories), 0, dtype=torch.int64, device=self.model.device)
            return _Cached(tuple(h.uid for h in histories), ((),) * len(histories), empty, growing_cache())
        row_of = {uid: row for row, uid in enumerate(old.uids)}
        rows = [row_of.get(h.uid, -1) for h in histories]
        usable = [
            row >= 0 and len(old.ids[row]) < len(h.ids) and h.ids[: len(old.ids[row])] == old.ids[row]
            for row, h in zip(rows, histories, strict=True)
        ]
        ids = tuple(old.ids[row] if good else () for row, good in zip(rows, usable, strict=True))
        tokens = max(map(len, ids))
        if all(usable) and rows == [*range(len(old.uids))] and tokens > (1 - HOLES) * old.slots.shape[1]:
            return old
        index = torch.tensor([max(row, 0) for row in rows], device=self.model.device)
        lost = ~torch.tensor(usable, device=self.model.device)[:, None]
        slots = old.slots[index].masked_fill(lost, -1)
        order = torch.argsort((slots < 0).byte(), dim=1, stable=True)[:, :tokens]
        place = order[:, None, :, None]
        store = _copied(old.store, lambda states: states[index].take_along_dim(place, 2))
        return _Cached(tuple(h.uid for h in histories), ids, slots.gather(1, order), store)

    def _feed_shared(
        self, cached: _Cached, new: Sequence[tuple[int, ...]]
    ) -> tuple[_Cached, Sequence[tuple[int, ...]], int]:
        """Where all rows are empty and begin alike (system prompt, tools, a group's task), feed that once.

        Returns the cache with it in every row, what is left to feed, and how many tokens were fed.
        """
        if cached.slots.shape[1] or len(new) == 1 or (shared := common_length(new)) < SHARED_TOKENS:
            return cached, new, 0
        one = _Cached(cached.uids[:1], ((),), cached.slots[:1], growing_cache())
        slots = self._feed(one, [new[0][:shared]])[1].expand(len(new), -1)
        store = _copied(one.store, lambda states: states.expand(len(new), -1, -1, -1))
        return _Cached(cached.uids, cached.ids, slots, store), [row[shared:] for row in new], shared

    def _feed(self, cached: _Cached, new: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Feed the new context, right-padded and in parts; returns the hidden state [B, H] of each row's last
        token and the positions of all cache slots [B, L]."""
        device, width, old = self.model.device, max(map(len, new)), cached.slots.shape[1]
        ids = torch.tensor([(*row, *[0] * (width - len(row))) for row in new], device=device)
        last = torch.tensor([len(row) - 1 for row in new], device=device)
        places = torch.arange(width, device=device)[None]
        start = (cached.slots >= 0).sum(1, keepdim=True)
        # Padding looks from the last token's position, so that it sees something; nothing sees it.
        positions = start + places.minimum(last[:, None])
        slots = torch.cat([cached.slots, positions.masked_fill(places > last[:, None], -1)], dim=1)
        size = max(1, PREFILL_ELEMENTS // slots.numel())
        final = torch.empty(0)
        for first in range(0, width, size):
            part = slice(first, first + size)
            hidden = self._forward(
                ids[:, part], positions[:, part], slots[:, : old + part.stop], cached.store
            )
            column = (last - first).clamp(0, hidden.shape[1] - 1)
            here = hidden[torch.arange(len(new), device=device), column]
            # a row that ended before this part has its state already
            final = torch.where((last >= first)[:, None], here, final) if first else here
        return final, slots

    def _forward(self, ids: Tensor, positions: Tensor, slots: Tensor, store: Cache) -> Tensor:
        mask = attention_masks(self.model, self._windows, slots, positions)
        return self.model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=store, use_cache=True
        ).last_hidden_state

    def _decode(
        self,
        store: Cache,
        histories: Sequence[History],
        logits: Tensor,
        slots: Tensor,
        written: Sequence[WrittenAction],
    ) -> tuple[list[list[int]], list[list[float]], Tensor]:
        device, longest = self.model.device, max(history.max_tokens for history in histories)
        limits = torch.tensor([history.max_tokens for history in histories], device=device)
        drawn = np.stack([history.random().random(longest) for history in histories])
        uniforms = torch.from_numpy(drawn).to(device)
        positions = (slots >= 0).sum(1)
        alive = torch.ones(len(histories), dtype=torch.bool, device=device)
        sampled: list[Tensor] = []
        scores: list[Tensor] = []
        lengths = torch.zeros(len(histories), dtype=torch.int64, device=device)
        for count in range(longest):
            tokens, logprobs = self._draw(logits, uniforms[:, count])
            if written:
                tokens, logprobs = _written(written, alive, tokens, logprobs)
            sampled.append(tokens)
            scores.append(logprobs)
            lengths += alive
            alive = alive & ~torch.isin(tokens, self._end_ids) & (count + 1 < limits)
            if not bool(alive.any()):
                break
            slots = torch.cat([slots, positions.where(alive, -1)[:, None]], dim=1)
            hidden = self._forward(tokens[:, None], positions[:, None], slots, store)
            logits = head(self.model)(hidden[:, -1])
            positions = positions + alive
        ids, values = torch.stack(sampled, 1).tolist(), torch.stack(scores, 1).tolist()
        ids = [row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)]
        values = [row[:n] for row, n in zip(values, lengths.tolist(), strict=True)]
        return ids, values, slots

    def _draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log-probs [B]; inverse CDF in float64."""
        if self.temperature == 0:
            tokens = logits.argmax(-1)
            return tokens, torch.zeros_like(tokens, dtype=torch.float32)
        logprobs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        cdf = logprobs.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def _action(
        self, ids: Sequence[int], logprobs: Sequence[float], forced: tuple[tuple[int, int], ...]
    ) -> Action:
        ended = ids[-1] in self._end_ids.tolist()
        return Action(
            self.actor, StopReason.END if ended else StopReason.LENGTH, tuple(ids), tuple(logprobs),
            policy_version=self.policy_version, forced=forced,
        )  # fmt: skip

    def _count(self, context_tokens: int, actions: Sequence[Action], histories: Sequence[History]) -> None:
        written = sum(len(action.ids) for action in actions)
        context = sum(len(history.ids) for history in histories) / len(histories)
        self.generated_tokens += sum(action.n_sampled for action in actions)
        # an action's last token is fed with what follows it
        fed = context_tokens + written - len(actions)
        self.flops += forward_flops(self.model, fed, context)


def _copied(store: Cache, change: Callable[[Tensor], Tensor]) -> Cache:
    """A cache of changed keys and values [B, heads, L, D]; ``store`` gives its layers up one by one."""
    result = growing_cache()
    for number in range(len(store.layers)):
        layer, store.layers[number] = store.layers[number], GrowingLayer()
        assert isinstance(layer, GrowingLayer)  # growing_cache() makes no other
        result.update(change(layer.keys), change(layer.values), number)
    return result


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, at least one of each left over."""
    first, last = min(rows, key=tuple), max(rows, key=tuple)  # all others begin as these two do
    shortest = min(map(len, rows)) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _written(
    rows: Sequence[WrittenAction], alive: Tensor, tokens: Tensor, logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """What each living row writes next [B], and its log-prob [B]: 0 where it is not the sampled token."""
    pairs = zip(rows, alive.tolist(), tokens.tolist(), strict=True)
    chosen = torch.tensor([row.write(token) if live else token for row, live, token in pairs])
    forced = torch.tensor([row.is_forced for row in rows])
    return chosen.to(tokens.device), logprobs.masked_fill(forced.to(logprobs.device), 0.0)
