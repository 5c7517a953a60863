"""From per-token losses to one number, with denominators over the whole update batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives.divergence import at_least_float32

Denominator = Literal["token", "turn", "episode", "selected", "weights", "constant"]


def token_coefficients(
    weights: Tensor,
    counted: Tensor,
    turns: Tensor,
    episodes: Tensor,
    denominator: Denominator,
    constant: float | None = None,
) -> Tensor:
    """Coefficients c with loss = sum_t c_t l_t: four times ``[n] -> [n]``, without gradient.

    Call it once for the *whole* update batch; micro-batches then take their slices of c and sum, and any way
    of splitting gives the same gradient. ``counted`` (bool) are the tokens that the component selects; others
    have c = 0, whatever their weight. ``turns`` and ``episodes`` are integers; a turn is known by the pair
    (episode, turn), so turns may be counted within each episode or across the batch.

    - ``token``: mean over counted tokens, w_t / n (DAPO, arXiv 2503.14476);
    - ``turn``: mean over turns of each turn's mean over its counted tokens;
    - ``episode``: mean over episodes of each episode's mean over its counted tokens (GRPO, arXiv 2402.03300);
    - ``selected``: mean over tokens of non-zero weight, for weights that are masks (TIP, arXiv 2604.14084);
    - ``weights``: weighted mean, w_t / sum w;
    - ``constant``: w_t / constant (Dr. GRPO, arXiv 2503.20783, divides by a length budget).

    The first three count tokens and not weights: a counted token of weight 0 stays in its denominator, and a
    weight of 0.5 halves the token's part. A turn or an episode without counted tokens is none. All weights
    zero gives all coefficients zero, which trains nothing: the caller decides whether that is an error.

    Raises AlignmentError where the shapes differ, ``counted`` is not bool, a weight is not finite, or one is
    negative under ``weights``; ConfigError for another denominator, or where ``constant`` is missing, not
    positive, or given without its denominator.
    """
    _check(weights, counted, turns, episodes, denominator, constant)
    weights = torch.where(counted, at_least_float32(weights.detach()), 0.0)
    if constant is not None:
        return weights / constant
    if denominator == "selected":
        return weights / (weights != 0).sum().clamp(min=1)
    if denominator == "weights":
        total = weights.sum()
        return weights / torch.where(total > 0, total, 1.0)
    if denominator == "token":
        unit = torch.zeros_like(episodes)
    elif denominator == "turn":
        unit = torch.unique(torch.stack([episodes, turns], 1), dim=0, return_inverse=True)[1]
    else:
        unit = torch.unique(episodes, return_inverse=True)[1]
    return weights / _tokens_times_units(unit, counted)


def _tokens_times_units(unit: Tensor, counted: Tensor) -> Tensor:
    """For each token: counted tokens of its unit, times the number of units that have any; at least 1."""
    tokens = torch.bincount(unit[counted], minlength=len(unit))
    return (tokens[unit] * (tokens > 0).sum()).clamp(min=1)


def _check(
    weights: Tensor,
    counted: Tensor,
    turns: Tensor,
    episodes: Tensor,
    denominator: Denominator,
    constant: float | None,
) -> None:
    if denominator not in get_args(Denominator):
        raise ConfigError(f"denominator is {denominator!r}; known are {', '.join(get_args(Denominator))}.")
    if (denominator == "constant") != (constant is not None) or (constant is not None and not constant > 0):
        raise ConfigError(
            f"denominator {denominator!r} with constant={constant}: 'constant' needs one > 0, others none."
        )
    if weights.ndim != 1 or not weights.shape == counted.shape == turns.shape == episodes.shape:
        raise AlignmentError(
            f"token_coefficients: weights {list(weights.shape)}, counted {list(counted.shape)}, turns"
            f" {list(turns.shape)} and episodes {list(episodes.shape)} must all be [n]."
        )
    if counted.dtype != torch.bool:
        raise AlignmentError(f"token_coefficients: counted is {counted.dtype}; it must be a mask (bool).")
    if not bool(weights.isfinite().all()):
        raise AlignmentError("token_coefficients: a weight is not finite; look at the component's weights.")
    if denominator == "weights" and bool((weights < 0).any()):
        raise AlignmentError(
            "token_coefficients: a weight is negative, and `denominator: weights` would divide by a sum that"
            " may vanish; take another denominator, or a credit function without negative factors."
        )
