"""A trained model as a plain Hugging Face folder, for whatever loads one."""

from __future__ import annotations

import shutil
from pathlib import Path

from opd_agents.errors import CheckpointError
from opd_agents.model_card import model_card
from opd_agents.policies.models import CHAT_FILE, load_merged, load_tokenizer, saved_dtype
from opd_agents.runs import best_checkpoint, latest_checkpoint, write_folder


def export(source: str | Path, to: str | Path, *, best: bool = False, dtype: str | None = None) -> Path:
    """Write the weights of ``source`` to a new folder ``to``: config, safetensors, the tokenizer with its
    chat template, and the chat's settings; of a run also its model card. An adapter becomes part of its base.
    Returns the checkpoint taken.

    ``source`` is a checkpoint, or a run folder, of which the newest checkpoint is taken, or with ``best``
    the weights with the best evaluation. They keep their ``dtype`` unless one is given (float32, bfloat16).
    Raises CheckpointError for a source without weights and for a folder in use.
    """
    folder, place = Path(source), Path(to)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise CheckpointError(f"{place} is there already and not empty: export to a new folder.")
    checkpoint = best_checkpoint(folder) if best else latest_checkpoint(folder)
    tokenizer = load_tokenizer(str(checkpoint))
    if (kept := dtype or saved_dtype(checkpoint)) is None:
        raise CheckpointError(
            f"{checkpoint} holds no *.safetensors, so its weights' dtype is unknown: give --dtype."
        )
    card = model_card(checkpoint, place.name)
    model = load_merged(str(checkpoint), kept)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (checkpoint / CHAT_FILE).is_file():
            shutil.copy(checkpoint / CHAT_FILE, folder)
        if card is not None:
            card.save(folder / "README.md")

    place.parent.mkdir(parents=True, exist_ok=True)
    write_folder(place, write)
    return checkpoint
