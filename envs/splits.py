"""Tasks drawn at random whose content is in one split only."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SPLITS = {"train": range(2, 10), "validation": range(1), "test": range(1, 2)}  # tenths of all possible tasks
SPLIT_SIZES = {"train": 1_000_000, "validation": 10_000, "test": 10_000}


def draw_from_split(
    stream: str, split: str, task_id: str, draw: Callable[[random.Random], T], content: Callable[[T], str]
) -> T:
    """The task ``task_id``: the first one of its own random stream whose content belongs to the split.

    ``stream`` names the environment and what its tasks depend on; ``content`` is a text, equal for tasks that
    an agent could not tell apart. A content belongs to one split by its hash.
    """
    rng = random.Random(f"{stream}/{split}/{task_id}")
    while True:
        task = draw(rng)
        if _tenth(content(task)) in SPLITS[split]:
            return task


def _tenth(content: str) -> int:
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest()) % 10
