"""A key-value cache whose layers have room to spare, so that a decoding step copies one token and not all."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens, at least


class GrowingLayer(DynamicLayer):
    """``keys`` and ``values`` [B, heads, L, D] are views of buffers that grow by a quarter: they take most of
    a rollout's memory."""

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        length = self.get_seq_length()
        stop = length + key_states.shape[-2]
        for index, states in enumerate((key_states, value_states)):
            if self._buffers[index].shape[-2] < stop:
                old = self._buffers[index]
                rows, heads, _, width = states.shape
                self._buffers[index] = states.new_empty(rows, heads, stop + max(ROOM, stop // 4), width)
                self._buffers[index][:, :, :length] = old[:, :, :length]
            self._buffers[index][:, :, length:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values


def growing_cache() -> Cache:
    return Cache(layer_class_to_replicate=GrowingLayer)
