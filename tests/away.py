"""A second device that every machine has: tensors that say they are on it and compute on the CPU.

Operations that mix it with the CPU are refused as CUDA refuses them, so a test finds a tensor that was made
or left on the wrong device. Torch calls it "meta", the one device that needs no backend; here it has values.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AWAY, CPU = torch.device("meta"), torch.device("cpu")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
MOVING = {"to", "_to_copy", "copy_"}


class Away(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Away":
        assert inner.device == CPU and not isinstance(inner, Away)
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=AWAY
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Data(TorchFunctionMode):
    """``torch.tensor`` and ``tolist`` copy data below the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist:
            return _inner(args[0]).tolist()
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    devices = [torch.device(leaf) for leaf in leaves if isinstance(leaf, torch.device)]
    assert not any(t.device == AWAY and not isinstance(t, Away) for t in tensors), f"{name}: lost its values"
    away = any(isinstance(t, Away) for t in tensors)
    if away and name not in MOVING:  # an index, and a number, may come from the CPU
        checked = tensors[:1] if name in INDEXING else [t for t in tensors if t.ndim]
        if not all(isinstance(t, Away) for t in checked):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    here = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    goes_away = devices[-1] == AWAY if devices else away
    return tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, here) if goes_away else here


def _inner(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return CPU
    return leaf.inner if isinstance(leaf, Away) else leaf


@contextmanager
def away() -> Iterator[None]:
    """Within it the second device may be used."""
    with _Data(), _Factories():
        yield


def sent(model: Any) -> Any:
    """A copy of the model on the second device; its eager kernels ask for no device."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    tied = {id(p): nn.Parameter(Away(p.detach()), requires_grad=p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = tied[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Away(buffer)
    return model
