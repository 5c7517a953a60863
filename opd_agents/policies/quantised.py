"""Weights of 8 or 4 bits for models that are not trained: rounded once, multiplied as what they stand for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from opd_agents.config import Quantisation

BLOCK = 64  # weights that share a scale
BITS: dict[Quantisation, int] = {"int8": 8, "int4": 4}


class Rounded(nn.Module):
    """A parametrization of a weight of ``shape`` [..., R, C], experts' with it: the whole multiples of a
    scale that are nearest to it, -(2^(bits-1) - 1) to 2^(bits-1) - 1 of them.

    Each matrix, its rows end to end, is cut into blocks of 64 (the last one filled up with zeros). ``codes``
    are int8 [..., blocks, 64]; of 4 bits uint8 [..., blocks, 32], a block's first half in the lower ones.
    ``scales`` stand in one row, in the weight's own type: the largest of each block by the most multiples.
    """

    def __init__(self, shape: torch.Size, bits: int) -> None:
        super().__init__()
        self.shape, self.bits = shape, bits

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1).to(torch.int8) - 8
        blocks = codes * scales.view(*codes.shape[:-1], 1)
        return blocks.flatten(-2)[..., : math.prod(self.shape[-2:])].reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, most = weight.flatten(-2), 2 ** (self.bits - 1) - 1
        blocks = functional.pad(rows, (0, -rows.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        scales = blocks.abs().amax(-1, keepdim=True) / most
        multiples = blocks / scales.clamp(min=torch.finfo(weight.dtype).tiny)  # of zeros alone none
        codes = multiples.round().clamp(-most, most).to(torch.int8)
        if self.bits == 4:
            low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
            codes = low | high << 4
        return codes, scales.flatten()


def round_weights(model: PreTrainedModel, to: Quantisation) -> None:
    """Round every matrix of a frozen model but its embeddings and its head, one after the other."""
    head = {id(weight) for weight in model.get_output_embeddings().parameters()}
    inner = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    for module in inner:
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim > 1 and id(weight) not in head:
                rounded = Rounded(weight.shape, BITS[to])
                # unsafe: what is kept has another type and shape, as said above
                parametrize.register_parametrization(module, name, rounded, unsafe=True)
