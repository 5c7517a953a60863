"""Gradient checkpointing: layers keep their input only and are computed anew going backward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd_agents.errors import ConfigError
from opd_agents.policies.models import hidden_states


def prepare_recomputation(model: PreTrainedModel) -> None:
    """Once for a model that :func:`recomputed` is used on. Raises ConfigError for one that cannot."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or not layers:
        raise ConfigError(
            f"trainer.gradient_checkpointing: {type(model).__name__} has no layers that can be recomputed; "
            "set it to false and lower trainer.micro_batch_tokens instead."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers call it activation checkpointing
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # only reentrant checkpoints need that
    ids = torch.arange(16)[None]
    with torch.no_grad():
        plain = hidden_states(model, ids)
        with recomputed(model):
            again = hidden_states(model, ids)
    if not torch.allclose(plain, again, rtol=0.05, atol=0.05):  # not a matter of rounding
        raise ConfigError(
            f"trainer.gradient_checkpointing: the layers of {type(model).__name__} drop out activations "
            "while they are recomputed, so another policy would be trained than the one that acts. Set the "
            "dropout in the checkpoint's config.json to 0, or this to false."
        )


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Forward passes in here keep no activations inside the layers.

    transformers checkpoints in training mode only. The layers alone are set to it, not what is in them:
    nothing drops out, and the trained policy stays the one that sampled. Elsewhere it is off, because a
    checkpointed layer has no key-value cache.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
