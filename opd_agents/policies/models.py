"""Loading, building and saving Hugging Face models together with the chat they speak."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opd_agents.chat import Chat
from opd_agents.errors import AlignmentError, CheckpointError
from opd_agents.policies.adapters import ADAPTER_FILE, adapter_base, idle_weights, merged
from opd_agents.policies.attention import layer_windows

transformers_logging.disable_progress_bar()  # one bar a file would bury the run's own

CHAT_FILE = "opd_agents_chat.json"  # the chat settings that a checkpoint was trained with


def load_model(path: str, dtype: str) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout), on the GPU of this process where there is one.
    Raises CheckpointError, also for weights that the files lack: transformers would draw them at random."""
    _check_exists("model", path)
    if (base := adapter_base(path)) is not None:
        _check_base(base, path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise _unloadable("model", path, error) from None
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"The checkpoint {path!r} lacks {len(lacking)} weights of a {type(model).__name__}, among them "
            f"{lacking[0]}. Save or download it anew, or correct the model type in its config.json."
        )
    prepared: PreTrainedModel = model.eval().to(local_device())
    return prepared


def load_merged(path: str, dtype: str) -> PreTrainedModel:
    """The same as a whole model: the adapter of an adapter's folder is added into its base."""
    base = adapter_base(path)
    if base is None:
        return load_model(path, dtype)
    _check_base(base, path)
    return merged(load_model(base, dtype), path)


def _check_base(base: str, path: str) -> None:
    try:
        _check_exists("model", base)
    except CheckpointError:
        raise CheckpointError(
            f"{path} is an adapter, and its base model {base!r} is not there. Put the base back, or write "
            f"where it is now into base_model_name_or_path of {path}/{ADAPTER_FILE}."
        ) from None


def local_device() -> torch.device:
    """The GPU that belongs to this process (torchrun's LOCAL_RANK), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    _check_exists("tokenizer", path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable("tokenizer", path, error) from None


def build_model(
    model_type: str,
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: str = "float32",
) -> PreTrainedModel:
    """A randomly initialised model with the tokenizer's vocabulary."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().to(local_device())


def load_chat(
    path: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None
) -> Chat:
    """The chat of a checkpoint: ``settings`` (template, kwargs, system) or those it was saved with."""
    saved = Path(path) / CHAT_FILE
    if settings is None:
        settings = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    return Chat(tokenizer, **settings)


def save_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> None:
    """Hugging Face layout (config, safetensors, tokenizer) plus the chat settings."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / CHAT_FILE).write_text(json.dumps(dict(settings), indent=1, sort_keys=True), encoding="utf-8")


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Cut the model's logits off behind the tokenizer's last id; every id must have an embedding.

    Checkpoints pad their heads, and models of one family differently (Qwen2.5 0.5B to 151936 rows, 7B to
    152064). The rows of padding belong to no token: nobody may sample them, and without them student and
    teacher have distributions over one vocabulary. Weights and checkpoints keep their shape.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    projection = model.get_output_embeddings()
    rows = min(len(_embeddings(model)), len(projection.weight))
    if size > rows:
        raise CheckpointError(
            f"{path}: the tokenizer has {size} tokens and the model only {rows}; "
            "use the tokenizer that the model was trained with."
        )
    if len(projection.weight) > size:
        projection.register_forward_hook(partial(_first_logits, size))


def _first_logits(size: int, module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    return logits[..., :size]


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Last hidden states [B, T, H], on the model's device, of right-padded rows (int64 [B, T]): padding
    stands behind every real token, so the causal mask alone hides it."""
    return model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state


@dataclass(frozen=True, slots=True)
class Head:
    """From hidden states [..., H] to logits [..., V] as the model makes them: its projection with the bias,
    then a factor (Granite, Cohere) and a soft cap (Gemma 2)."""

    projection: nn.Module
    factor: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.projection(hidden)
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def head(model: PreTrainedModel) -> Head:
    """The model's own head; :func:`check_projection` finds out whether it is complete."""
    config = model.config.get_text_config()
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(model.get_output_embeddings(), factor, getattr(config, "final_logit_softcapping", None))


def check_projection(model: PreTrainedModel, dtype: str) -> None:
    """The head on the last hidden states must give ``model(...).logits``. Raises AlignmentError."""
    ids = torch.arange(min(16, len(_embeddings(model))), device=model.device)[None]
    with torch.no_grad():
        ours = head(model)(hidden_states(model, ids)).float()
        gap = float((ours - model(input_ids=ids).logits.float()).abs().max())
    if not gap <= (1e-4 if dtype == "float32" else 0.1):
        raise AlignmentError(
            f"{type(model).__name__}: the head on the last hidden states differs by {gap:.3g} from the "
            "model's own logits, so token losses would be of another model. Its forward pass changes logits "
            "in a way that is not known here; take a model of another architecture."
        )


def forward_flops(model: PreTrainedModel, tokens: int, context: float) -> int:
    """FLOPs of a forward pass over ``tokens`` tokens whose mean context is ``context`` tokens.

    2 per weight that a token meets in a matrix product (of experts the share that are chosen for it; the
    embedding table only as the head) plus 4 * heads * head width * context per token and layer for attention,
    a sliding window being the longest context of its layer. An adapter counts while it is on. A whole number,
    so that sums are exact and do not depend on where a run was resumed.
    """
    config, idle = model.config.get_text_config(), idle_weights(model)
    matrices = _met_weights(model, [p for p in model.parameters() if id(p) not in idle])
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    windows = [window for _, window in layer_windows(model)]
    attention = 4 * windows.count(None) * width * context
    attention += sum(4 * width * min(context, window) for window in windows if window is not None)
    return round(tokens * (2 * matrices + attention))


def backward_flops(model: PreTrainedModel, tokens: int, context: float) -> int:
    """FLOPs of the backward pass to such a forward pass: twice as many, as every product has two gradients,
    but a frozen weight has none of its own."""
    frozen = _met_weights(model, [p for p in model.parameters() if not p.requires_grad])
    return 2 * forward_flops(model, tokens, context) - 2 * tokens * frozen


def _met_weights(model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> int:
    """How many of these weights a token meets in matrix products."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = sum(p.numel() for p in parameters if p.ndim == 2 and id(p) not in tables)
    experts = [p for p in parameters if p.ndim == 3]  # [experts, out, in]
    if experts:
        chosen = model.config.get_text_config().num_experts_per_tok
        matrices += sum(p.numel() // len(p) for p in experts) * chosen
    projection = model.get_output_embeddings().weight
    tied = id(projection) in tables and any(p is projection for p in parameters)
    return matrices + (projection.numel() if tied else 0)


def _embeddings(model: PreTrainedModel) -> Tensor:
    return next(model.get_input_embeddings().parameters())


def _check_exists(what: str, path: str) -> None:
    """Fail at once for what is neither here, nor in the hub's cache, nor known to the hub: transformers would
    ask a hub that cannot be reached again and again, for most of a minute."""
    try:
        if Path(path).exists() or any(
            isinstance(try_to_load_from_cache(path, name), str)
            for name in ("config.json", "adapter_config.json")
        ):
            return
        HfApi().model_info(path, timeout=10)
    except Exception as error:  # of the hub's client, whose HTTP library differs between its versions
        raise _unloadable(what, path, error) from None


def _unloadable(what: str, path: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    where = repr(path) if Path(path).exists() else f"{path!r}, which is no folder here, from the hub"
    return CheckpointError(f"Cannot load a {what} from {where}: {lines[0]}")
