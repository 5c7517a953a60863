"""Which slots of the key-value cache a query sees, by the positions of their tokens and not by their order:
rows have holes, and layers may look back over a window only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_windows(model: PreTrainedModel) -> tuple[tuple[str, int | None], ...]:
    """Of each layer its type and how many tokens it sees, the query's own included (None: all before it).

    Raises CheckpointError for layers that keep no keys and values of each token (linear attention, state
    spaces) or choose them in another way: the cache kept across turns cannot serve them.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers
    if other := sorted(set(types) - {FULL, SLIDING}):
        raise CheckpointError(
            f"{type(model).__name__} has layers of the type {', '.join(other)}. Full and sliding-window "
            "attention are supported; take a model that has no other layers."
        )
    return tuple((kind, window if kind == SLIDING else None) for kind in types)


def attention_masks(
    model: PreTrainedModel, windows: Mapping[str, int | None], slots: Tensor, positions: Tensor
) -> Tensor | dict[str, Tensor]:
    """The base model's ``attention_mask`` [B, 1, W, L], one for each layer type where there are several.

    ``slots`` (int64 [B, L]) is the position of the token in each slot of the cache, -1 for a hole;
    ``positions`` (int64 [B, W]) those of the queries. A query sees itself and what came before it.
    """
    key, query = slots[:, None, :], positions[:, :, None]
    before = (key >= 0) & (key <= query)
    masks = {
        kind: _as_expected(model, before if window is None else before & (key > query - window))
        for kind, window in windows.items()
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _as_expected(model: PreTrainedModel, seen: Tensor) -> Tensor:
    """[B, 1, W, L]: booleans, or what the eager kernels add to the scores (they would add 1 for a True)."""
    if model.config._attn_implementation != "eager":
        return seen[:, None]
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, lowest)[:, None]
