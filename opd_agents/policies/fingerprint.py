"""Whose weights these are: a fingerprint of a checkpoint, without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

from opd_agents.errors import CheckpointError
from opd_agents.policies.adapters import ADAPTER_FILE, adapter_base
from opd_agents.policies.models import check_base

WEIGHTS = {".safetensors", ".bin"}


def fingerprint(path: str) -> str:
    """Of a folder the sha256 of its weights and their config, of an adapter with its base's; of a model of
    the hub its id and revision. Reads all weights, about a second a gigabyte. Raises CheckpointError where
    there are none."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{_revision(path)}"
    digest = hashlib.sha256()
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    if not files:
        raise CheckpointError(f"{folder} holds no weights.")
    for file in [*files, *(folder / name for name in ("config.json", ADAPTER_FILE))]:
        if file.is_file():
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    if (base := adapter_base(path)) is not None:
        check_base(base, path)
        digest.update(fingerprint(base).encode())
    return digest.hexdigest()


def _revision(path: str) -> str:
    """The one that is here, else the hub's newest."""
    for name in ("config.json", ADAPTER_FILE):
        if isinstance(found := try_to_load_from_cache(path, name), str):
            return Path(found).parent.name
    try:
        return str(HfApi().model_info(path, timeout=10).sha)
    except Exception as error:  # of the hub's client, whose HTTP library differs between its versions
        raise CheckpointError(f"{path!r} is no folder here and cannot be had from the hub: {error}") from None
