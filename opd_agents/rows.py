"""Rows of the user's data: a JSONL file, or a `datasets` dataset that was saved to disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_agents.errors import DataError

DEFAULT_SPLIT = "train"  # of a row that names none
SIDES = ("chosen", "rejected")  # of a preference


@dataclass(frozen=True)
class Rows(Sequence[Mapping[str, Any]]):
    """The rows of one split, read when they are asked for; ``where(i)`` names file and row for a person."""

    path: Path
    split: str
    source: Any = field(repr=False)  # JSONL: None; else the datasets.Dataset
    places: Sequence[int] = field(repr=False)  # JSONL: the byte where the row's line starts; else its index
    numbers: Sequence[int] = field(repr=False)  # JSONL: lines counted from 1; else rows counted from 0

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.source is not None:
            return _without_none(self.source[self.places[index]])
        with self.path.open("rb") as file:
            file.seek(self.places[index])
            return _parse(file.readline(), self.where(index))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self.source is not None:
            yield from map(_without_none, self.source.select(self.places))
            return
        with self.path.open("rb") as file:  # once, not for every row
            for index, place in enumerate(self.places):
                file.seek(place)
                yield _parse(file.readline(), self.where(index))

    def where(self, index: int) -> str:
        """``data.jsonl, line 17``, as an editor counts; of a dataset ``folder, split 'train', row 16``."""
        if self.source is None:
            return f"{self.path}, line {self.numbers[index]}"
        return f"{self.path}, split {self.split!r}, row {self.numbers[index]} (counted from 0)"


class Pairs(Rows):
    """Rows of preferences, each read as two with ``prompt`` and ``completion``: what is chosen, a success,
    then what is rejected, a failure of the same ``id``. Without ``prompt`` that is what both begin with."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return super().__getitem__(index)
        return self._sides(index // 2, super().__getitem__(index // 2))[index % 2]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for number, row in enumerate(super().__iter__()):
            yield from self._sides(number, row)

    def where(self, index: int) -> str:
        return f"{super().where(index // 2)}, {SIDES[index % 2]}"

    def _sides(self, number: int, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        chosen, rejected = (row.get(side, ()) for side in SIDES)
        if not all(isinstance(side, list) and side for side in (chosen, rejected)):
            raise DataError(
                f"{super().where(number)}: `chosen` and `rejected` must be lists of messages, as in the first"
                " row; preferences and conversations are read from files of their own."
            )
        begin = 0 if row.get("prompt") else shared(chosen, rejected)
        common = {key: row[key] for key in row.keys() - {*SIDES, "success", "reward"}}
        common |= {"id": row.get("id", str(number)), "prompt": row.get("prompt") or chosen[:begin]}
        return [
            common | {"completion": side[begin:], "success": side is chosen} for side in (chosen, rejected)
        ]


def sided(rows: Rows) -> Rows:
    """As :class:`Pairs`, where the first row is a preference."""
    is_pair = any(side in next(iter(rows)) for side in SIDES)
    return Pairs(rows.path, rows.split, rows.source, rows.places, rows.numbers) if is_pair else rows


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    both = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def read_rows(path: str | Path, split: str | None = None) -> Rows:
    """The rows of ``split``; None asks for the only one. Raises DataError as :func:`read_splits`, and for a
    split that the data does not have."""
    splits = read_splits(path)
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        found = ", ".join(f"{name!r} ({len(rows)} rows)" for name, rows in splits.items())
        asked = "more than one split; name one" if split is None else f"no split {split!r}"
        raise DataError(f"{path}: {asked}. It has {found}; a row without the field `split` is in 'train'.")
    return splits[split]


def read_splits(path: str | Path) -> dict[str, Rows]:
    """Every split with its rows, none of them empty.

    ``path`` is a JSONL file, or a folder written by ``save_to_disk`` of the library `datasets` (Dataset or
    DatasetDict). A row's field ``split`` says which split it is in; without it 'train', in a DatasetDict the
    dictionary's. Arrow fills what a row lacks with null, so nulls of a dataset's mappings are dropped. Raises
    DataError for what cannot be read, a line that is no JSON object, and data without rows.
    """
    path = Path(path)
    if path.is_dir():
        splits = _dataset_splits(path)
    elif path.is_file():
        splits = _jsonl_splits(path)
    else:
        raise DataError(
            f"{path}: no such file. Give a JSONL file, or a folder written by datasets' save_to_disk."
        )
    if not splits:
        raise DataError(f"{path}: there is no row in it.")
    return splits


def _jsonl_splits(path: Path) -> dict[str, Rows]:
    places: dict[str, tuple[list[int], list[int]]] = {}
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                starts, numbers = places.setdefault(_split_of(_parse(line, where), where), ([], []))
                starts.append(place)
                numbers.append(number)
            place += len(line)
    return {split: Rows(path, split, None, *found) for split, found in places.items()}


def _dataset_splits(path: Path) -> dict[str, Rows]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path} is a folder: `pip install datasets` to read it, or give JSONL.") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # its errors are of many kinds, pyarrow's among them
        raise DataError(
            f"{path}: not a dataset that `datasets` reads ({error}). Give JSONL, or write it by save_to_disk."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        whole = {
            name: Rows(path, str(name), one, range(len(one)), range(len(one))) for name, one in loaded.items()
        }
        return {str(name): rows for name, rows in whole.items() if len(rows)}
    if "split" not in loaded.column_names:
        every = range(len(loaded))
        return {DEFAULT_SPLIT: Rows(path, DEFAULT_SPLIT, loaded, every, every)} if every else {}
    indices: dict[str, list[int]] = {}
    for number, split in enumerate(loaded["split"]):
        indices.setdefault(_split_of({"split": split}, f"{path}, row {number}"), []).append(number)
    return {split: Rows(path, split, loaded, found, found) for split, found in indices.items()}


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}). JSONL holds one JSON object on every line.") from error
    if b"\\ud" in line.lower():  # pairs of them are one character, a lone one is none
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {error.object[error.start]!r} is half a character; take it out."
            ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {shown(row)} is no JSON object. JSONL holds one on every line.")
    return row


def _split_of(row: Mapping[str, Any], where: str) -> str:
    split = row.get("split")
    if split is None:
        return DEFAULT_SPLIT
    if not isinstance(split, str) or not re.fullmatch(r"\S+", split):
        raise DataError(f'{where}: `split` is {shown(split)}; it must be a name such as "train".')
    return split


def shown(value: Any) -> str:
    """A value for a message: its JSON, the end of a long one cut off."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
