"""What changes a model's weights: AdamW, or Muon on the matrices with AdamW on everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Muon, Optimizer

from opd_agents.sharding import divided_as, load_whole_state, whole


class ModelOptimizer:
    """The trainable weights of a model and the optimizers that together own each of them once.

    ``weights`` are the model's own parameters, ``masters`` what the optimizers change: the same tensors, or
    for weights of less than 32 bits float32 copies, because an update is mostly smaller than the distance
    between two bfloat16 numbers. Gradients of such weights are added up in float32 on the masters
    (:meth:`collect`); clipping and the optimizers see the masters alone; :meth:`step` rounds them into the
    weights.

    It is made of the parameters as the model holds them then, so a model is sharded first. Everything that a
    resume needs is in :meth:`state_dict`, in the order of ``weights``.
    """

    def __init__(self, model: nn.Module, kind: str, weight_decay: float) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = list(named.values())
        self.masters = [_master(weight) for weight in self.weights]
        masters = dict(zip(named, self.masters, strict=True))
        self.optimizers = build_optimizers(masters, kind, weight_decay)

    def collect(self) -> None:
        """After every backward pass: add what it left on the weights to the masters' gradients."""
        for weight, master in self._copied():
            if weight.grad is not None:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                master.grad += weight.grad
                weight.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale the masters' gradients to at most this norm, over all ranks; the norm before."""
        norm = whole(get_total_norm([master.grad for master in self.masters if master.grad is not None]))
        clip_grads_with_norm_(self.masters, max_norm, norm)
        return float(norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for weight, master in self._copied():
            weight.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        masters = [master.detach() for _, master in self._copied()]
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_whole_state(optimizer, saved)
        for (_, master), value in zip(self._copied(), state["masters"], strict=True):
            master.copy_(divided_as(master, value))

    def _copied(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.weights, self.masters, strict=True)
        return [(weight, master) for weight, master in pairs if weight is not master]


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if torch.finfo(weight.dtype).bits >= 32 else nn.Parameter(weight.detach().float())


def build_optimizers(
    trainable: Mapping[str, nn.Parameter], kind: str, weight_decay: float
) -> list[Optimizer]:
    """Optimizers for parameters by name; the learning rate is set each update.

    ``muon``: torch.optim.Muon (arXiv 2502.16982; updates scaled to AdamW's RMS, so that one learning rate
    serves both) on the two-dimensional weights inside the blocks, AdamW on embeddings, head, norms, biases.
    """
    matrices = [p for name, p in trainable.items() if kind == "muon" and p.ndim == 2 and not _is_table(name)]
    ids = {id(p) for p in matrices}
    rest = [p for p in trainable.values() if id(p) not in ids]
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        optimizers.append(AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay, foreach=True))
    return optimizers


def _is_table(name: str) -> bool:
    return "embed" in name or "lm_head" in name
