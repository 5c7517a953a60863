"""The space of observations and actions: any text."""

from __future__ import annotations

import string
from typing import Any

import gymnasium


class AnyText(gymnasium.spaces.Text):
    """Any string of at most ``max_length`` characters.

    gymnasium's ``Text`` holds only the characters of its charset (by default not even a space), and a
    charset of all of Unicode takes seconds to build and megabytes to pickle.
    """

    def __init__(self, max_length: int = 1_000_000, seed: int | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A short printable text, unless ``mask`` or ``probability`` asks for more."""
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(min(self.max_length, 64) + 1)), None)
        return super().sample(mask, probability)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"AnyText({self.max_length})"
