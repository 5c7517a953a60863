"""Loading, building and saving Hugging Face models together with the chat they speak."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opd_agents.chat import Chat
from opd_agents.errors import CheckpointError

transformers_logging.disable_progress_bar()  # one bar a file would bury the run's own

CHAT_FILE = "opd_agents_chat.json"  # the chat settings that a checkpoint was trained with


def load_model(path: str, dtype: str) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout). Raises CheckpointError."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unloadable("model", path, error) from None
    return model.eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable("tokenizer", path, error) from None


def build_model(
    model_type: str, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
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
        model = AutoModelForCausalLM.from_config(config)
    return model.eval()


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


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Every id that the tokenizer can give must have an embedding."""
    size = len(_embeddings(model))
    if len(tokenizer) > size:
        raise CheckpointError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and the model only {size}; "
            "use the tokenizer that the model was trained with."
        )


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Last hidden states [B, T, H] of right-padded rows (int64 [B, T]): padding stands behind every
    real token, so the causal mask alone hides it."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def head(model: PreTrainedModel) -> nn.Module:
    """The projection from hidden states [..., H] to logits [..., V]."""
    return model.get_output_embeddings()


def forward_flops(model: PreTrainedModel, tokens: int, context: float) -> int:
    """FLOPs of a forward pass over ``tokens`` tokens whose mean context is ``context`` tokens.

    2 per weight used in a matrix product (all matrices; the embedding table only as the head) plus
    4 * layers * (heads * head width) * context per token for attention. A backward pass counts twice this. A
    whole number, so that sums are exact and do not depend on where a run was resumed.
    """
    config = model.config
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name
    )
    if config.tie_word_embeddings:
        matrices += _embeddings(model).numel()
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    attention = 4 * config.num_hidden_layers * width * context
    return round(tokens * (2 * matrices + attention))


def _embeddings(model: PreTrainedModel) -> Tensor:
    return next(model.get_input_embeddings().parameters())


def _unloadable(what: str, path: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    where = repr(path) if Path(path).exists() else f"{path!r}, which is no folder here, from the hub"
    return CheckpointError(f"Cannot load a {what} from {where}: {lines[0]}")
