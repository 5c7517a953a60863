"""Loading, building and saving Hugging Face models together with the chat they speak."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opd_agents.chat import Chat
from opd_agents.config import ChatSettings
from opd_agents.errors import AlignmentError, CheckpointError, ConfigError
from opd_agents.policies.adapters import ADAPTER_FILE, adapter_base, idle_weights, merged
from opd_agents.policies.attention import layer_windows

transformers_logging.disable_progress_bar()  # one bar a file would bury the run's own

CHAT_FILE = "opd_agents_chat.json"  # the chat settings that a checkpoint was trained with
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names of safetensors, names of torch


def load_model(path: str, dtype: str, device: torch.device | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout), on ``device`` (None: the GPU of this process,
    where there is one). Raises CheckpointError, also for weights that the files lack (transformers would draw
    them at random) or that are quantised, and for models that are not of text alone or not of attention
    alone."""
    _check_exists("model", path)
    if (base := adapter_base(path)) is not None:
        check_base(base, path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever a broken file makes transformers, peft and safetensors raise
        raise _unloadable("model", path, error) from None
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"The checkpoint {path!r} lacks {len(lacking)} weights of a {type(model).__name__}, among them "
            f"{lacking[0]}. Save or download it anew, or correct the model type in its config.json."
        )
    if others := sorted(found["mismatched_keys"]):
        name, saved, wanted = others[0]
        raise CheckpointError(
            f"The checkpoint {path!r} has {len(others)} weights of other shapes than its config.json, or its "
            f"adapter's base, gives a {type(model).__name__}: {name} {tuple(saved)}, not {tuple(wanted)}."
        )
    _check_kind(model, path, dtype)
    prepared: PreTrainedModel = model.eval().to(local_device() if device is None else device)
    return prepared


def _check_kind(model: PreTrainedModel, path: str, dtype: str) -> None:
    what = f"{path}: {type(model).__name__}"
    if model.config.get_text_config() is not model.config:
        raise CheckpointError(
            f"{what} reads more than text. Save its language model alone, as a causal language model with a "
            "config of its own, and take that."
        )
    layer_windows(model)  # for its errors
    kinds = {parameter.dtype for parameter in model.parameters()}  # some models keep some of them in float32
    if other := kinds - {torch.float32, getattr(torch, dtype)}:
        raise CheckpointError(
            f"{what} has quantised weights ({', '.join(sorted(map(str, other)))}), which cannot be trained. "
            "Take the checkpoint that was not quantised."
        )


def load_merged(path: str, dtype: str) -> PreTrainedModel:
    """The same as a whole model: the adapter of an adapter's folder is added into its base."""
    base = adapter_base(path)
    if base is None:
        return load_model(path, dtype)
    check_base(base, path)
    model = load_model(base, dtype)
    try:
        return merged(model, path)
    except Exception as error:  # of peft and safetensors
        raise _unloadable("model", path, error) from None


def load_outline(path: str) -> PreTrainedModel:
    """The model without its weights (on torch's device `meta`), from its config.json: what FLOPs are counted
    of where others run it. Raises CheckpointError."""
    path = adapter_base(path) or path
    _check_exists("model", path)
    try:
        with torch.device("meta"):
            outline: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except Exception as error:  # whatever a broken file makes transformers raise
        raise _unloadable("model", path, error) from None
    return outline


def saved_dtype(folder: Path) -> str | None:
    """Of the weights of a checkpoint, or of an adapter, which has the dtype that its base was used in; None
    without safetensors. Raises CheckpointError for a broken file, and for other dtypes than ``DTYPES``."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                return DTYPES[weights.get_slice(next(iter(weights.keys()))).get_dtype()]
        except Exception as error:
            raise _unloadable("model", str(folder), error) from None
    return None


def check_base(base: str, path: str) -> None:
    """Raise CheckpointError where the base of the adapter ``path`` is not there."""
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a broken file makes transformers and tokenizers raise
        raise _unloadable("tokenizer", path, error) from None
    if not tokenizer.encode("a", add_special_tokens=False):  # transformers makes up one that is empty
        raise CheckpointError(f"{path} holds no tokenizer: its vocabulary (tokenizer.json) is missing.")
    return tokenizer


def build_model(
    model_type: str,
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: str = "float32",
) -> PreTrainedModel:
    """A randomly initialised model with the tokenizer's vocabulary. Raises ConfigError."""
    try:
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
    except Exception as error:  # of transformers: whatever a wrong field makes it raise
        raise ConfigError(f"student.build: no model of type {model_type!r} of it: {_short(error)}") from None
    return model.eval().to(local_device())


def load_chat(
    path: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None
) -> Chat:
    """The chat of a checkpoint: ``settings`` (template, kwargs, system) or those it was saved with. An action
    ends also where the checkpoint's generation_config.json says. Raises UserError."""
    settings = chat_settings(path) if settings is None else settings
    return Chat(tokenizer, **settings, ends=_generation_ends(path))


def chat_settings(path: str) -> dict[str, Any]:
    """What a checkpoint was saved with; empty where nothing was. Raises CheckpointError."""
    saved = Path(path) / CHAT_FILE
    if not saved.is_file():
        return {}
    try:
        return ChatSettings.model_validate_json(saved.read_bytes()).model_dump()
    except ValueError:
        raise CheckpointError(
            f"{saved} holds no settings of a chat. Put it back as it was saved, or remove it and give "
            "them in the section `chat` of the config."
        ) from None


def _generation_ends(path: str) -> list[int | None]:
    """Llama 3 and Qwen name several ids that end a turn, and the tokenizer only one of them."""
    try:
        found = GenerationConfig.from_pretrained(adapter_base(path) or path).eos_token_id
    except OSError:  # it has none
        return []
    return found if isinstance(found, list) else [found]


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
        gap = float((ours - model(input_ids=ids, use_cache=False).logits.float()).abs().max())
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


def n_parameters(model: PreTrainedModel) -> int:
    """How many weights it holds, embeddings included."""
    return sum(map(_held, model.parameters()))


def backward_flops(model: PreTrainedModel, tokens: int, context: float) -> int:
    """FLOPs of the backward pass to such a forward pass: twice as many, as every product has two gradients,
    but a frozen weight has none of its own."""
    frozen = _met_weights(model, [p for p in model.parameters() if not p.requires_grad])
    return 2 * forward_flops(model, tokens, context) - 2 * tokens * frozen


def _met_weights(model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> int:
    """How many of these weights a token meets in matrix products."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = sum(_held(p) for p in parameters if p.ndim == 2 and id(p) not in tables)
    experts = [p for p in parameters if p.ndim == 3]  # [experts, out, in]
    if experts:
        chosen = model.config.get_text_config().num_experts_per_tok
        matrices += sum(_held(p) // len(p) for p in experts) * chosen
    projection = model.get_output_embeddings()
    if projection is None:  # layers without a head
        return matrices
    tied = id(projection.weight) in tables and any(p is projection.weight for p in parameters)
    return matrices + (projection.weight.numel() if tied else 0)


def _held(weight: nn.Parameter) -> int:
    """How many weights it holds: of 4 bits two to a byte (:mod:`opd_agents.policies.quantised`)."""
    return weight.numel() * (2 if weight.dtype is torch.uint8 else 1)


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
    where = repr(path) if Path(path).exists() else f"{path!r}, which is no folder here, from the hub"
    return CheckpointError(f"Cannot load a {what} from {where}: {_short(error)}")


def _short(error: Exception) -> str:
    """Its message, or what kind it is, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
