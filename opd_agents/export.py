"""A trained model as a plain Hugging Face folder, for whatever loads one."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open

from opd_agents.errors import CheckpointError
from opd_agents.policies.models import CHAT_FILE, load_merged, load_tokenizer
from opd_agents.runs import best_checkpoint, latest_checkpoint, write_folder

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names of safetensors, names of torch


def export(source: str | Path, to: str | Path, *, best: bool = False, dtype: str | None = None) -> Path:
    """Write the weights of ``source`` to a new folder ``to``: config, safetensors, the tokenizer with its
    chat template, and the chat's settings. An adapter becomes part of its base. Returns the checkpoint taken.

    ``source`` is a checkpoint, or a run folder, of which the newest checkpoint is taken, or with ``best``
    the weights with the best evaluation. They keep their ``dtype`` unless one is given (float32, bfloat16).
    Raises CheckpointError for a source without weights and for a folder in use.
    """
    folder, place = Path(source), Path(to)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise CheckpointError(f"{place} is there already and not empty: export to a new folder.")
    checkpoint = best_checkpoint(folder) if best else latest_checkpoint(folder)
    tokenizer = load_tokenizer(str(checkpoint))
    model = load_merged(str(checkpoint), dtype or _saved_dtype(checkpoint))

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (checkpoint / CHAT_FILE).is_file():
            shutil.copy(checkpoint / CHAT_FILE, folder)

    place.parent.mkdir(parents=True, exist_ok=True)
    write_folder(place, write)
    return checkpoint


def _saved_dtype(checkpoint: Path) -> str:
    """Of the weights of a checkpoint, or of an adapter, which has the dtype that its base was used in."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{checkpoint} holds no *.safetensors, so its weights' dtype is unknown: give --dtype."
        )
    with safe_open(files[0], framework="pt") as weights:
        return DTYPES[weights.get_slice(next(iter(weights.keys()))).get_dtype()]
