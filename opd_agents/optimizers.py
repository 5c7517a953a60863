"""AdamW, or Muon on the matrices with AdamW on everything else."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def build_optimizers(model: nn.Module, kind: str, weight_decay: float) -> list[Optimizer]:
    """Optimizers that together own every trainable parameter once; the learning rate is set each update.

    ``muon``: torch.optim.Muon (arXiv 2502.16982; updates scaled to AdamW's RMS, so that one learning rate
    serves both) on the two-dimensional weights inside the blocks, AdamW on embeddings, head, norms, biases.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
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


def set_learning_rate(optimizers: list[Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
