"""A folder of log-probs that were taken once.

``index.json`` says whose they are: fingerprints of the teacher's weights and of the chat, temperature, top k.
The rest are shards. A row of tokens is found by the hash of its ids and of the places of its action tokens,
so that what is read belongs to exactly these tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.errors import CheckpointError, ConfigError

INDEX = "index.json"
FORMAT = 1  # of the folder


class StaleCache(ConfigError):
    """A cache that holds the log-probs of something else."""


@dataclass(frozen=True, slots=True)
class Index:
    """Whose log-probs a cache holds: fingerprints of the ``teacher`` (where one is wanted, None: whoever) and
    of the ``chat`` whose tokens it scored, the ``temperature``, and how many of the teacher's most probable
    tokens there are (``k``)."""

    teacher: str | None
    chat: str
    temperature: float
    k: int
    format: int = FORMAT


class Cache:
    """The log-probs in ``folder``. Raises CheckpointError for an index or a shard that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.places: dict[bytes, tuple[Path, int, int]] = {}  # of each row: tokens [start, stop) of a shard
        for shard in self._shards():
            self._find(shard)

    def missing(self, packed: Packed) -> Tensor:
        """The action tokens that it does not know (bool [N])."""
        known = [key in self.places for key, _, _ in rows_of(packed)]
        return ~torch.tensor(known, dtype=torch.bool)[packed.row]

    def add(self, packed: Packed, chosen: Tensor, values: Mapping[str, Tensor]) -> None:
        """Keep the rows of the action tokens where ``chosen`` (bool [N]) holds; ``values`` [N, ...] are of
        all. The shard is there whole or not at all."""
        rows = [row for row in rows_of(packed) if bool(chosen[row[1] : row[2]].any())]
        keys = torch.frombuffer(bytearray(b"".join(key for key, _, _ in rows)), dtype=torch.uint8)
        tensors = {
            "keys": keys.view(-1, 32),
            "lengths": torch.tensor([stop - start for _, start, stop in rows]),
            **{n: torch.cat([value[start:stop] for _, start, stop in rows]) for n, value in values.items()},
        }
        number = max((int(shard.stem.removeprefix("shard-")) for shard in self._shards()), default=-1) + 1
        shard = self.folder / f"shard-{number:06d}.safetensors"
        _write(shard, lambda part: save_file(tensors, part))
        self._find(shard)

    def read(self, key: bytes, name: str) -> Tensor:
        """A row's values [n, ...]."""
        shard, start, stop = self.places[key]
        with safe_open(shard, framework="pt") as file:
            found: Tensor = file.get_slice(name)[start:stop]
        return found

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    def _find(self, shard: Path) -> None:
        """Learn which rows a shard holds."""
        try:
            with safe_open(shard, framework="pt") as file:
                keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths").tolist()
                size = file.get_slice("logprobs").get_shape()[0]
        except Exception as error:  # whatever a broken file makes safetensors raise
            raise CheckpointError(
                f"{shard} cannot be read ({error}). Remove this file: with `of` in the config what it held is"
                " asked for again."
            ) from None
        if sum(lengths) != size:
            raise CheckpointError(f"{shard} has {size} log-probs, its rows have {sum(lengths)}. Remove it.")
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            self.places[key.numpy().tobytes()] = (shard, start, start + length)
            start += length


def open_cache(folder: Path, wanted: Index) -> Cache:
    """The cache in ``folder``, which is begun where there is none.

    Raises StaleCache for a cache of another teacher, chat or temperature or with fewer log-probs than are
    ``wanted``, and ConfigError where there is none and nobody to ask.
    """
    if not (folder / INDEX).is_file() and wanted.teacher is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(wanted), indent=1) + "\n"
        _write(folder / INDEX, lambda part: part.write_text(text, encoding="utf-8"))
    cache = Cache(folder)
    found, problem = cache.index, None
    if wanted.teacher is not None and found.teacher != wanted.teacher:
        problem = "is stale: its log-probs are of other weights than `of` has"
    elif found.chat != wanted.chat:
        problem = (
            "is stale: its tokens are of another chat (template, settings, tokenizer) than the student's"
        )
    elif found.temperature != wanted.temperature:
        problem = f"is at temperature {found.temperature:g}, rollout.temperature is {wanted.temperature:g}"
    elif found.k < wanted.k:
        problem = f"holds the teacher's top {found.k}, and the loss needs its top {wanted.k}"
    if problem is not None:
        raise StaleCache(
            f"The cache {folder} {problem}. Name another folder, or remove this one, to be filled anew."
        )
    return cache


def read_index(folder: Path) -> Index:
    """Raises CheckpointError for a folder without one, or of another version."""
    try:
        index = Index(**json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is no index of a cache ({error}). To make a cache, name with `of` the teacher"
            " whose log-probs it is to hold."
        ) from None
    if index.format != FORMAT:
        raise CheckpointError(
            f"{folder} is a cache of format {index.format}, and this version reads {FORMAT}."
        )
    return index


def rows_of(packed: Packed) -> list[tuple[bytes, int, int]]:
    """Of each row: the hash of its ids and of the places of its action tokens, and which action tokens of the
    packed table, [start, stop), are its."""
    counts = torch.bincount(packed.row, minlength=len(packed.rows)).tolist()
    rows, start = [], 0
    for ids, count in zip(packed.rows, counts, strict=True):
        stop = start + count
        digest = hashlib.sha256(ids.numpy().tobytes())
        digest.update(packed.position[start:stop].numpy().tobytes())
        rows.append((digest.digest(), start, stop))
        start = stop
    return rows


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Beside its place, then renamed."""
    part = file.with_name(f".{file.name}.part")
    write(part)
    os.replace(part, file)
