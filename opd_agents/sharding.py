"""The model that is updated, its parameters divided among the ranks by FSDP2.

Beside its part each rank holds the model whole, to act, to score, to evaluate and to save with: its episodes
are its own, and so is the number of its forward passes, in each of which a divided model would wait for all
ranks. FSDP2 could keep its layers gathered instead; that takes the same memory, slows every token down by its
hooks, and it notes each forward pass in lists that only a backward pass empties.

Gigabytes on each of n ranks for P billion weights, all of them trained by AdamW:

                            while acting and scoring    while updating
    bfloat16                2 P + 14 P / n              18 P / n    (part, master, two moments, gradient)
    float32                 4 P + 12 P / n              16 P / n    (part, two moments, gradient)
    adapter on bfloat16     2 P + 2 P / n               2 P / n     (part)

so 30 and 18 GB for 8 billion in bfloat16 on 8 GPUs. To that come keys and values, or activations with the
head and the layers that are gathered at the moment, 4 P / n for a second gradient where its shares are
measured, and a local teacher, which stands whole on every rank all the time, because it may act as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from opd_agents.distributed import World
from opd_agents.errors import AlignmentError, ConfigError

R = TypeVar("R")


class Trained(nn.Module):
    """A model under training, entered only as ``trained(function)``, which calls ``function(model)``.

    FSDP gathers what belongs to no layer (embedding, last norm, head) when the forward pass of this module
    begins, so all that uses the model, its head included, must run inside.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[PreTrainedModel], R]) -> R:
        return function(self.model)


def shard(model: PreTrainedModel, world: World) -> Trained:
    """The model to update: ``model`` itself in a world of one, else its parts, divided by FSDP2.

    Gradients are sums over the ranks, since denominators are global. Raises AlignmentError where a
    parameter was not divided, since its gradient would be that of this rank's rows alone, and ConfigError for
    trained weights of several dtypes, which FSDP2 does not reduce together.
    """
    if world.size == 1:
        return Trained(model)
    if len(dtypes := {str(p.dtype) for p in model.parameters() if p.requires_grad}) > 1:
        raise ConfigError(
            f"{type(model).__name__} has trained weights of {' and '.join(sorted(dtypes))}, which several "
            "processes cannot train. Set student.dtype to float32, or train an adapter (student.lora)."
        )
    weights: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    trained = Trained(copy.deepcopy(model, weights))  # shares them until each is divided, by copying a part
    if model.device.type == "cuda":
        shard_by_accelerate(trained)
    else:  # where accelerate 1.15 would quietly take DistributedDataParallel
        _shard_directly(trained, init_device_mesh("cpu", (world.size,)))
    sum_gradients(trained)
    undivided = [name for name, p in trained.model.named_parameters() if not isinstance(p, DTensor)]
    if undivided:
        raise AlignmentError(
            f"FSDP2 left {len(undivided)} parameters of {type(model).__name__} undivided ({undivided[0]} for "
            "one), so that every rank would train its own. Train this model in one process."
        )
    return trained


def sum_gradients(trained: Trained) -> None:
    """Over the ranks, where FSDP2 would average; a weight that one rank's rows do not meet counts as 0 there,
    where FSDP2 would add up those of different weights."""
    for module in trained.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the factor would be an operation of nccl alone
            module.set_reduce_scatter_unused_params(True, recurse=False)


def layer_names(model: PreTrainedModel) -> list[str]:
    """The classes of modules that transformers says must stay together on a device: the decoder layers."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(model._no_split_modules or ()))


def _shard_directly(trained: Trained, mesh: DeviceMesh) -> None:
    names, policy = layer_names(trained.model), MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in reversed(list(trained.modules())):  # what stands inside another comes first
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(trained, mesh=mesh, mp_policy=policy)


def shard_by_accelerate(trained: Trained) -> None:
    """Divide by accelerate's FSDP2 plug-in, in place."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layer_names(trained.model),
        mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,  # every rank has the weights already
    )
    accelerator = Accelerator(mixed_precision="no", fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin  # the state of the first accelerator serves all later ones too
    fsdp2_prepare_model(accelerator, trained)


@contextmanager
def updating(model: PreTrainedModel, trained: Trained) -> Iterator[None]:
    """While ``trained`` is updated, the whole ``model`` beside it gives up its memory, but for the head, with
    which a teacher's signal may be read; then it has the new weights. Nothing where they are one."""
    if trained.model is model:
        yield
        return
    kept = {id(p) for p in model.get_output_embeddings().parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.new_empty(0)
    yield
    for parameter, divided in zip(model.parameters(), trained.parameters(), strict=True):
        parameter.data = whole(divided.detach())


def trained_weights(model: PreTrainedModel, trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """The weights that updates change, whole and as they are now, by their names in ``model``; every rank
    must ask for all of them."""
    for (name, parameter), divided in zip(model.named_parameters(), trained.parameters(), strict=True):
        if parameter.requires_grad:
            yield name, whole(divided.detach())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a part; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(value: Any, *, kept: bool) -> Any:
    """A nested state with every tensor whole and on the CPU, or None in its place where it is not ``kept``;
    every rank must ask."""
    if isinstance(value, Mapping):
        return {key: whole_state(item, kept=kept) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole_state(item, kept=kept) for item in value)
    if not isinstance(value, Tensor):
        return value
    tensor = whole(value)
    return tensor.cpu() if kept else None


def load_whole_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what a world of any size saved: of each tensor this rank takes the part that is its own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {key: divided_as(parameters[number], value) for key, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def divided_as(parameter: Tensor, value: Any) -> Any:
    """``value`` divided among the ranks as ``parameter``, if their shapes are equal (a count has none)."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    local = value.to(parameter.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
