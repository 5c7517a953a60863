"""A model that reads many episodes in lock-step, its keys and values kept across turns.

Each row of the cache belongs to one episode. Before a turn the cached ids are checked to be a prefix of
the episode's history; only what is new is fed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from opd_agents.policies.attention import attention_masks, layer_windows
from opd_agents.policies.base import Action, History
from opd_agents.policies.cache import GrowingLayer, growing_cache
from opd_agents.policies.models import forward_flops, head

PREFILL_ELEMENTS = 2**25  # of the mask of one forward pass; longer contexts are fed in parts
SHARED_TOKENS = 64  # a common beginning of so many tokens is worth feeding once
HOLES = 0.25  # share of a cache's slots beyond which it is copied without its holes


class NextTokens(Protocol):
    """Distributions of the next token [B, V] of episodes that write one action in lock-step, as log-probs
    (nats, float32) at the sampling temperature."""

    def begin(self, histories: Sequence[History]) -> Tensor:
        """Of the action's first token, after each history."""
        ...

    def follow(self, tokens: Tensor, alive: Tensor) -> Tensor:
        """After one token more (int64 [B]) of the rows that are ``alive`` (bool [B]); of others anything."""
        ...

    def end(self, histories: Sequence[History], actions: Sequence[Action]) -> None:
        """The actions are written, each but for its last token as it was followed."""
        ...


@dataclass(frozen=True, slots=True)
class _Cached:
    """Row r holds the keys and values of ``ids[r]``; ``slots`` (int64 [B, L]) is the position of the token in
    each slot of the cache, -1 for a hole."""

    uids: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    slots: Tensor
    store: Cache


class Reader:
    """The :class:`NextTokens` of a model at ``temperature`` (0: its most probable token alone).

    ``weights`` is entered around whatever the model computes: it may switch an adapter off. Without ``reuse``
    every history is read from its beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float,
        *,
        reuse: bool = True,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.temperature, self.reuse, self.weights = model, temperature, reuse, weights
        self.flops = 0
        self._windows = dict(layer_windows(model))
        self._kept: _Cached | None = None  # of the last turn
        self._open: _Cached | None = None  # of the action that is being written
        self._positions = torch.empty(0)  # of its next token [B]
        self._fed = 0  # tokens of context

    @property
    def keeps(self) -> bool:
        """Whether keys and values are kept."""
        return self._kept is not None

    def release(self) -> None:
        """Free the keys and values that are kept: their episodes have ended, or the weights have changed."""
        self._kept = self._open = None

    def begin(self, histories: Sequence[History]) -> Tensor:
        old, self._kept = self._kept, None  # an error leaves none behind that was extended by half
        cached = self._select(old, histories)
        new: Sequence[tuple[int, ...]] = [
            history.ids[len(ids) :] for history, ids in zip(histories, cached.ids, strict=True)
        ]
        with self.weights():
            cached, new, shared = self._feed_shared(cached, new)
            final, slots = self._feed(cached, new)
            logits = head(self.model)(final)
        self._open = _Cached(cached.uids, tuple(h.ids for h in histories), slots, cached.store)
        self._positions = (slots >= 0).sum(1)
        self._fed = shared + sum(map(len, new))
        return log_distribution(logits, self.temperature)

    def follow(self, tokens: Tensor, alive: Tensor) -> Tensor:
        now, positions = self._open, self._positions
        assert now is not None  # an action was begun
        slots = torch.cat([now.slots, positions.where(alive, -1)[:, None]], dim=1)
        with self.weights():
            hidden = self._forward(tokens[:, None], positions[:, None], slots, now.store)
            logits = head(self.model)(hidden[:, -1])
        self._open, self._positions = _Cached(now.uids, now.ids, slots, now.store), positions + alive
        return log_distribution(logits, self.temperature)

    def end(self, histories: Sequence[History], actions: Sequence[Action]) -> None:
        now, self._open = self._open, None
        assert now is not None
        if self.reuse:
            fed = tuple(h.ids + a.ids[:-1] for h, a in zip(histories, actions, strict=True))
            self._kept = _Cached(now.uids, fed, now.slots, now.store)
        context = sum(len(history.ids) for history in histories) / len(histories)
        # an action's last token is fed with what follows it
        tokens = self._fed + sum(len(action.ids) for action in actions) - len(actions)
        with self.weights():
            self.flops += forward_flops(self.model, tokens, context)

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


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """What is sampled from logits [B, V]: log-probs in float32; at temperature 0 all is on the first of the
    most probable tokens."""
    if temperature == 0:
        nothing = torch.full_like(logits, -torch.inf, dtype=torch.float32)
        return nothing.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, at least one of each left over."""
    first, last = min(rows, key=tuple), max(rows, key=tuple)  # all others begin as these two do
    shortest = min(map(len, rows)) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _copied(store: Cache, change: Callable[[Tensor], Tensor]) -> Cache:
    """A cache of changed keys and values [B, heads, L, D]; ``store`` gives its layers up one by one."""
    result = growing_cache()
    for number in range(len(store.layers)):
        layer, store.layers[number] = store.layers[number], GrowingLayer()
        assert isinstance(layer, GrowingLayer)  # growing_cache() makes no other
        result.update(change(layer.keys), change(layer.values), number)
    return result
