"""From per-token losses to one number, with denominators over the whole update batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives.divergence import at_least_float32

Denominator = Literal["token", "turn", "episode", "constant"]


def token_coefficients(
    weights: Tensor, turns: Tensor, episodes: Tensor, denominator: Denominator, constant: float | None = None
) -> Tensor:
    """Coefficients c with loss = sum_t c_t l_t: ``[n], [n], [n] -> [n]``, without gradient.

    Call it once for the *whole* update batch; micro-batches then take their slices of c and sum, and any way
    of splitting gives the same gradient. ``turns`` and ``episodes`` are integers; a turn is known by the pair
    (episode, turn), so turns may be counted within each episode or across the batch.

    - ``token``: mean over tokens, w_t / n (DAPO, arXiv 2503.14476);
    - ``turn``: mean over turns of each turn's mean over its tokens;
    - ``episode``: mean over episodes of each episode's mean over its tokens (GRPO, arXiv 2402.03300);
    - ``constant``: w_t / constant (Dr. GRPO, arXiv 2503.20783, divides by a length budget).

    Means are over tokens, turns and episodes of non-zero weight: a token of weight 0 counts in no
    denominator, nor does a turn or an episode of such tokens only. They count and do not sum weights, so a
    weight of 0.5 halves the token's part instead of being normalised away. All weights zero gives all
    coefficients zero, which trains nothing: the caller decides whether that is an error.

    Raises AlignmentError where the shapes differ, ConfigError for another denominator, or where ``constant``
    is missing, not positive, or given without its denominator.
    """
    if denominator not in get_args(Denominator):
        raise ConfigError(f"denominator is {denominator!r}; known are {', '.join(get_args(Denominator))}.")
    if (denominator == "constant") != (constant is not None) or (constant is not None and not constant > 0):
        raise ConfigError(
            f"denominator {denominator!r} with constant={constant}: 'constant' needs one > 0, others none."
        )
    if weights.ndim != 1 or not weights.shape == turns.shape == episodes.shape:
        raise AlignmentError(
            f"token_coefficients: weights {list(weights.shape)}, turns {list(turns.shape)} and episodes "
            f"{list(episodes.shape)} must all be [n]."
        )
    weights = at_least_float32(weights.detach())
    if constant is not None:
        return weights / constant
    if denominator == "token":
        unit = torch.zeros_like(episodes)
    elif denominator == "turn":
        unit = torch.unique(torch.stack([episodes, turns], 1), dim=0, return_inverse=True)[1]
    else:
        unit = torch.unique(episodes, return_inverse=True)[1]
    return weights / _tokens_times_units(unit, weights != 0)


def _tokens_times_units(unit: Tensor, counted: Tensor) -> Tensor:
    """For each token: counted tokens of its unit, times the number of units that have any; at least 1."""
    tokens = torch.bincount(unit[counted], minlength=len(unit))
    return (tokens[unit] * (tokens > 0).sum()).clamp(min=1)
