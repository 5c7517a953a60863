"""A key-value cache whose layers grow by doubling, so that a decoding step copies one token and not all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """``keys`` and ``values`` [B, heads, L, D] are views of buffers with room to spare."""

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
                self._buffers[index] = torch.empty(
                    *states.shape[:2], 2 * stop, states.shape[-1], dtype=states.dtype, device=states.device
                )
                self._buffers[index][:, :, :length] = old[:, :, :length]
            self._buffers[index][:, :, length:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values


def growing_cache() -> Cache:
    return Cache(layer_class_to_replicate=GrowingLayer)
