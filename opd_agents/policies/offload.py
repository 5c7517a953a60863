"""A model whose layers rest in the CPU's memory, and are on the GPU only while they compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

Slot: TypeAlias = tuple[nn.Module, str, nn.Parameter]
"""A module, and the name of a weight in it."""


class Offloaded:
    """Called and entered, has the layers of ``model``, which is on the CPU and not trained, on ``device``;
    entered within that, changes nothing.

    Embeddings and head go there for good: the model's own device is theirs, and losses project by the head
    at any time. The weights on the CPU stay there, page-locked, so that nothing has to be brought back.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._device, self._entered = device, 0
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        outer = {id(weight) for module in ends for weight in module.parameters()}
        slots = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
        ]
        self._resting = [slot for slot in slots if id(slot[2]) not in outer]
        if device.type == "cuda":
            for _, _, weight in self._resting:
                weight.data = weight.data.pin_memory()
        self._bring([slot for slot in slots if id(slot[2]) in outer])
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @property
    def nbytes(self) -> int:
        """Of what comes and goes."""
        return sum(weight.nbytes for weight in {id(w): w for _, _, w in self._resting}.values())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._entered:
            self._bring(self._resting)
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1
            if not self._entered:
                for module, name, weight in self._resting:
                    setattr(module, name, weight)

    def _bring(self, slots: Sequence[Slot]) -> None:
        """What is one weight in several places is one there."""
        there: dict[int, nn.Parameter] = {}
        for module, name, weight in slots:
            if id(weight) not in there:
                copy = weight.to(self._device, non_blocking=True)
                there[id(weight)] = nn.Parameter(copy, requires_grad=False)
            setattr(module, name, there[id(weight)])
