"""How much memory a run will hold, from the shapes of its models: also of models on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from opd_agents.config import RunConfig
from opd_agents.config.serving import VllmSampling
from opd_agents.objectives.terms import CHUNK_ELEMENTS
from opd_agents.optimizers import build_optimizers
from opd_agents.policies.attention import layer_windows

FLOAT32 = 4  # bytes
CHUNKS = 4  # float32 copies of one chunk's logits: both models', their log-softmax, the gradient


def memory(
    config: RunConfig,
    student: PreTrainedModel,
    teachers: Sequence[PreTrainedModel],
    discriminator: nn.Module | None = None,
    resting: Sequence[int] = (),
) -> dict[str, int]:
    """Bytes by part, of one process that shards nothing. ``teachers`` are the models beside the student, and
    a ``discriminator`` counts with all that its own updates keep. ``resting``: of those teachers that are
    offloaded, what comes and goes of each; it has the room that the activations of an update have later.

    Exact for weights, gradients and the optimizer's state. ``activations`` of one micro-batch are estimated
    from the shapes of the weights, without attention scores, which a fused kernel does not keep. ``cache`` is
    that of all episodes of a step at the longest context that they may have. A sampler or a teacher on a
    server is not counted.
    """
    own = {id(p) for p in student.parameters()}
    beside = (p for teacher in teachers for p in teacher.parameters() if id(p) not in own)
    reads = [] if discriminator is None else [p for p in discriminator.parameters() if id(p) not in own]
    learns = {} if discriminator is None else _updates(config, discriminator)
    activations = _activations(config, student)
    coming = max(0, max(resting, default=0) - activations)
    parts = {
        "student": _bytes(student.parameters()),
        "teachers": _bytes({id(p): p for p in beside}.values()) - sum(resting) + coming,
        "discriminator": _bytes(reads) + sum(learns.values()),
        **_updates(config, student),
        "activations": activations,
        "logits": CHUNKS * FLOAT32 * CHUNK_ELEMENTS,
        "cache": _cache(config, student),
    }
    return {name: size for name, size in parts.items() if size}


def _updates(config: RunConfig, model: nn.Module) -> dict[str, int]:
    """What stands beside a model's weights to train those that are not frozen."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    copied = [p for p in trained.values() if torch.finfo(p.dtype).bits < 32]
    return {
        "masters": FLOAT32 * sum(p.numel() for p in copied),
        "gradients": FLOAT32 * sum(p.numel() for p in trained.values()) + _bytes(copied),
        "optimizer": _optimizer(config, trained),
    }


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _optimizer(config: RunConfig, trained: dict[str, nn.Parameter]) -> int:
    """Muon keeps one float32 average of a matrix, AdamW two of whatever it changes."""
    moments = {"Muon": 1, "AdamW": 2}
    return sum(
        FLOAT32 * moments[type(optimizer).__name__] * sum(p.numel() for p in group["params"])
        for optimizer in build_optimizers(trained, config.trainer.optimizer, 0.0)
        for group in optimizer.param_groups
    )


def _activations(config: RunConfig, student: PreTrainedModel) -> int:
    """Of every matrix of a layer the vector that goes in and the one that comes out, a token; with gradient
    checkpointing of one layer, and of the others what goes in."""
    tables = {
        id(p) for module in student.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    tables |= {id(p) for p in student.get_output_embeddings().parameters()}
    shape = student.config.get_text_config()
    inside = [p for p in student.parameters() if id(p) not in tables]
    values = sum(sum(p.shape) for p in inside if p.ndim == 2)
    values += sum(shape.num_experts_per_tok * sum(p.shape[1:]) for p in inside if p.ndim == 3)
    if config.trainer.gradient_checkpointing:
        layers = len(layer_windows(student))
        values = values // layers + layers * shape.hidden_size
    return config.trainer.micro_batch_tokens * values * student.dtype.itemsize


def _cache(config: RunConfig, student: PreTrainedModel) -> int:
    rollout, shape = config.rollout, student.config.get_text_config()
    if "student" not in rollout.actors or isinstance(config.sampler, VllmSampling):
        return 0
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    token = 2 * heads * head * student.dtype.itemsize
    most = rollout.max_context_tokens
    longest = [min(most, window or most) for _, window in layer_windows(student)]
    return rollout.episodes_per_step * token * sum(longest)
