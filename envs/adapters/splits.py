"""Splits of what has none of its own: every key belongs to one of three, always the same."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "validation", "test")
_TENTHS = ("train",) * 7 + ("validation",) + ("test",) * 2


def split_of(key: str) -> str:
    """The split of a key: seven tenths of all keys are "train", one is "validation", two are "test"."""
    return _TENTHS[int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) % 10]
