"""How a trained model's weights reach the servers that sample from it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from peft.tuners import lora
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from opd_agents.plugins import need
from opd_agents.policies.adapters import NAME
from opd_agents.policies.vllm_client import VllmClient

WEIGHTS = "model.safetensors"


@torch.no_grad()
def served_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a checkpoint of ``model``, an adapter added in (in the dtype of its base), and the head
    by its own name also where the embeddings are its weights: a server that reloads would keep the old one.
    """
    state = {
        name.replace(".base_layer.", "."): weight
        for name, weight in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, lora.Linear):
            key = f"{name}.weight"
            state[key] = state[key] + module.get_delta_weight(NAME)
    given: dict[str, Tensor] = revert_weight_conversion(model, state)
    return given


class Reload:
    """By a safetensors file in ``folder``, which the servers must read by the same path."""

    def __init__(self, client: VllmClient, model: PreTrainedModel, folder: Path) -> None:
        """Raises ConfigError for servers that cannot reload."""
        self.client, self.model, self.folder = client, model, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        client.check_route("/collective_rpc", "the environment variable VLLM_SERVER_DEV_MODE=1")

    def send(self) -> None:
        weights, seen = served_weights(self.model), set[int]()
        for name, weight in weights.items():
            shared = weight.data_ptr() in seen  # a safetensors file refuses that
            weights[name] = weight.clone() if shared else weight.contiguous()
            seen.add(weight.data_ptr())
        new = self.folder / f"{WEIGHTS}.new"
        save_file(weights, new)
        os.replace(new, self.folder / WEIGHTS)
        path = str(self.folder.resolve())
        self.client.post_to_each(
            "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}
        )


class Nccl:
    """From GPU to GPU by vLLM's weight-transfer API. Its own code sends, so this process needs vLLM, too.

    Written to the API of vLLM 0.32 and not yet run on GPUs; the probe after every update tells if it fails.
    """

    def __init__(self, client: VllmClient, model: PreTrainedModel) -> None:
        """Raises MissingPart without vLLM, ConfigError for servers that take no weights."""
        engine: Any = need("vllm.distributed.weight_transfer.nccl_engine", "vllm", "sampler.weights: nccl")
        backend = """--weight-transfer-config '{"backend": "nccl"}' and VLLM_SERVER_DEV_MODE=1"""
        client.check_route("/init_weight_transfer_engine", backend)
        self._senders = []
        for url in client.urls:
            info = engine.NCCLTrainerInitInfo(
                rank=0, master_address=_address_towards(url), master_port=_free_port(),
                world_size=1 + client.get(url, "/get_world_size")["world_size"],
            )  # fmt: skip
            sender = engine.NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=_Control(client, url), source=_Source(model)
            )
            self._senders.append(sender)

    def send(self) -> None:
        for sender in self._senders:
            sender.send_weights()


class _Control:
    """What vLLM's sender asks of one server."""

    def __init__(self, client: VllmClient, url: str) -> None:
        self._post = partial(client.post, url)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self) -> None:
        self._post("/finish_weight_update", {})


class _Weight(NamedTuple):
    """What a server is told of a weight before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Source:
    """The weights of ``model``, as vLLM's sender reads them: first what there will be, then each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def metadata(self) -> list[_Weight]:
        return [_Weight(name, weight.dtype, tuple(weight.shape)) for name, weight in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from served_weights(self._model).items()


def _address_towards(url: str) -> str:
    """Of this machine, as the host of ``url`` can reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((urlsplit(url).hostname, 9))
        return str(way.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])
