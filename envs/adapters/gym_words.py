"""Words for the numbers of gymnasium's environments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# gymnasium numbers its actions and the parts of its observations: this is what its documentation calls them.
ACTIONS = {
    "Acrobot": ("left", "none", "right"),
    "Blackjack": ("stick", "hit"),
    "CartPole": ("left", "right"),
    "CliffWalking": ("up", "right", "down", "left"),
    "FrozenLake": ("left", "down", "right", "up"),
    "MountainCar": ("left", "none", "right"),
    "Taxi": ("south", "north", "east", "west", "pickup", "dropoff"),
}
FIELDS = {
    "Blackjack": ("your_sum", "dealer_shows", "usable_ace"),
    "CartPole": ("position", "velocity", "angle", "angular_velocity"),
    "MountainCar": ("position", "velocity"),
}
COLOURED = re.compile(r"\x1b\[(?:\d+;)*(\d+)m(.*?)\x1b\[0m")  # the last number is the colour
COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")


def plain(rendering: str) -> str:
    """A text rendering without terminal codes, ``[red:X]`` for a red X."""
    text = COLOURED.sub(lambda m: f"[{COLOURS[int(m[1]) % 10]}:{m[2]}]", rendering)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def numbers_of(value: Any) -> Any:
    """An observation as JSON values."""
    if isinstance(value, Mapping):
        return {key: numbers_of(item) for key, item in value.items()}
    if isinstance(value, tuple | list | np.ndarray):
        return [numbers_of(item) for item in value]
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return int(value)
    return round(float(value), 4) if isinstance(value, float | np.floating) else str(value)
