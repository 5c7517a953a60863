"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen base, as transformers itself holds them.

A model with an adapter stays the PreTrainedModel that it was. Its checkpoint is a folder with the adapter
alone (``adapter_config.json`` names the base), which plain transformers and peft load.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opd_agents.config import Lora
from opd_agents.errors import CheckpointError, ConfigError

ADAPTER_FILE = "adapter_config.json"
NAME = "default"  # of the one adapter, as transformers and peft call it


def add_adapter(model: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Freeze the model and give it a new adapter, which changes nothing yet (B = 0).

    Raises ConfigError for targets that no linear layer has, or that are the head.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it only divides this by the rank
        target_modules=_targets(model, lora),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, NAME)
    base = model.name_or_path
    if base and Path(base).is_dir():  # transformers reads a relative path from wherever it runs
        config.base_model_name_or_path = str(Path(base).resolve())
    model.eval()


def train_adapter(model: PreTrainedModel, lora: Lora, path: str) -> None:
    """Go on with the adapter that the checkpoint ``path`` has. Raises ConfigError if ``lora`` is another."""
    saved = model.peft_config[NAME]
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not isinstance(saved, LoraConfig):
        raise ConfigError(f"student.lora: the adapter {path} is of kind {saved.peft_type.value}, not LoRA.")
    same = (saved.r, saved.lora_alpha) == (lora.rank, lora.alpha)
    if not same or adapted != set(_targets(model, lora)):
        raise ConfigError(
            f"student.lora: rank {lora.rank}, alpha {lora.alpha:g} and targets {lora.targets} are not those "
            f"of the adapter {path} (rank {saved.r}, alpha {saved.lora_alpha:g}, {len(adapted)} layers). "
            "Give the same to train it further; for a new adapter merge this one with "
            f"`opd-agents export {path} --to DIR` and take DIR as student.model."
        )
    model.set_adapter(NAME)


def adapter_base(path: str) -> str | None:
    """The base model that an adapter's folder names; None for the folder of a whole model."""
    folder = Path(path)
    if not (folder / ADAPTER_FILE).is_file() or (folder / "config.json").is_file():
        return None
    try:
        return str(json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / ADAPTER_FILE} names no base_model_name_or_path.") from None


def merged(base: PreTrainedModel, path: str) -> PreTrainedModel:
    """``base`` with the adapter of a folder added into its weights, W + alpha / rank * B A: a whole model
    again, to be trained as any other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        warnings.filterwarnings("error", "Found missing adapter keys")  # they would stay as drawn at random
        return PeftModel.from_pretrained(base, path).merge_and_unload().requires_grad_(True)


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """The model is its frozen base in here."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def idle_weights(model: PreTrainedModel) -> set[int]:
    """The ``id`` of every adapter weight that is switched off."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and module.disable_adapters
        for name, parameter in module.named_parameters()
        if "base_layer" not in name
    }


def _targets(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The names of the linear layers to adapt: all but the head, or those that ``lora.targets`` names."""
    head = model.get_output_embeddings()
    linear = [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and ".lora_" not in name
    ]
    if lora.targets == "all-linear":
        return linear
    chosen = {
        target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in lora.targets
    }
    if missing := [target for target, names in chosen.items() if not names]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ConfigError(
            f"student.lora.targets: no linear layer below the head is called {' or '.join(missing)} in "
            f"{type(model).__name__}. It has {known} (in full for example {linear[0]}), or say all-linear."
        )
    if not chosen:
        raise ConfigError("student.lora.targets is empty: name layers, or say all-linear.")
    return sorted({name for names in chosen.values() for name in names})
