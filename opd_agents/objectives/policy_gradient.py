"""Policy gradients: ratios of probabilities, and the clipped surrogate of a detached advantage.

A ratio is ``[n]``, one entry per sampled token, in [0, inf), and differentiable in ``logprob``, the current
log-prob of the token (nats); whatever else it is made of is detached. The names: pi the current policy, old
the one that the ratio compares with. Both must be taken at the same temperature.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opd_agents.errors import ConfigError
from opd_agents.objectives.inputs import check_rows

Mismatch = Literal["tis", "icepop"]
LARGEST = 80.0  # nats: exp of it is still finite in float32. A ratio saturates there and loses its gradient.


def token_ratio(logprob: Tensor, old: Tensor) -> Tensor:
    """pi / pi_old of each token (PPO, arXiv 1707.06347): ``[n], [n] -> [n]``; gradient r grad log pi."""
    check_rows("token_ratio", logprob=logprob, old=old)
    return _exp(logprob - old.detach())


def unit_ratio(logprob: Tensor, unit_log_ratio: Tensor) -> Tensor:
    """The ratio s of a token's whole unit, as a ratio of the token: ``[n], [n] -> [n]``.

    Value s = exp(unit_log_ratio), gradient s grad log pi of the token alone: GSPO-token (arXiv 2507.18071).
    With the unit's own mean log-ratio (:func:`unit_log_ratios`) at the *current* policy, the mean over the
    unit's tokens has exactly the gradient of s, so that of GSPO, wherever the log-probs are recomputed.
    """
    check_rows("unit_ratio", logprob=logprob, unit_log_ratio=unit_log_ratio)
    return _exp(unit_log_ratio.detach() + (logprob - logprob.detach()))


def trrd_ratio(logprob: Tensor, old: Tensor, reference_logprob: Tensor, alpha: float) -> Tensor:
    """rho = (pi / pi_old)^alpha (pi / p)^(1 - alpha), p a reference: ``[n], [n], [n] -> [n]``.

    TRRD of RLAD (arXiv 2602.22495). Both denominators are detached and pi is not, so grad rho = rho grad log
    pi. ``alpha`` 1 is :func:`token_ratio` (the paper's formula; its text says 0). At pi = pi_old it is not 1
    but exp(-(1 - alpha) d) with d = log p - log pi: where |d| is large the token starts out clipped.

    Raises ConfigError for alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"trrd_alpha is {alpha}, but is a share: 0 <= alpha <= 1.")
    check_rows("trrd_ratio", logprob=logprob, old=old, reference_logprob=reference_logprob)
    return _exp(logprob - alpha * old.detach() - (1 - alpha) * reference_logprob.detach())


def shaped_ratio(logprob: Tensor, shaping: float) -> Tensor:
    """f = pi / (pi + shaping), without any old policy: ``[n] -> [n]``.

    LUFFY's (arXiv 2504.14945) for tokens that another policy wrote: its gradient shaping pi / (pi +
    shaping)^2 grad log pi is largest at pi = shaping and fades for tokens that are certain already.

    Raises ConfigError for a shaping that is not positive.
    """
    if not 0 < shaping < math.inf:
        raise ConfigError(f"shaping is {shaping}, but must be a probability above 0, such as 0.1.")
    check_rows("shaped_ratio", logprob=logprob)
    return torch.sigmoid(logprob - math.log(shaping))


def no_ratio(logprob: Tensor) -> Tensor:
    """1 with the gradient of log pi, ``[n] -> [n]``: REINFORCE, as if every batch were the policy's own."""
    check_rows("no_ratio", logprob=logprob)
    return _exp(logprob - logprob.detach())


def unit_log_ratios(log_ratio: Tensor, units: Tensor, weights: Tensor) -> Tensor:
    """Each token's unit's mean log-ratio: ``[N], [N], [N] -> [N]`` nats, without gradient.

    ``units`` (integers) are turns or episodes; the mean is over the unit's tokens of non-zero weight, each
    counted once, and is given to all of its tokens (GSPO, arXiv 2507.18071); a unit without such tokens has
    0. Log-ratios of weight 0 are not looked at. Call it on the whole table: a unit must not be cut.

    Raises AlignmentError where shapes differ or a log-ratio that counts is not finite.
    """
    counted = weights != 0
    check_rows("unit_log_ratios", counted, weights=weights, units=units, log_ratio=log_ratio)
    unit = torch.unique(units, return_inverse=True)[1]
    tokens = torch.bincount(unit[counted], minlength=len(unit))
    total = log_ratio.new_zeros(len(unit)).index_add(0, unit[counted], log_ratio.detach()[counted])
    return (total / tokens.clamp(min=1))[unit]


class Surrogate(NamedTuple):
    """`surrogate` of n tokens."""

    loss: Tensor
    """``[n]``, to be minimised, differentiable in the current log-probs."""
    ratio: Tensor
    """``[n]``, the ratio of each token, detached."""
    clipped: Tensor
    """``[n]`` bool: clipping is active, so this token has no gradient; its mean is the clip fraction."""


def surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float | None, clip_high: float | None
) -> Surrogate:
    """PPO's clipped surrogate per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), nothing averaged.

    All ``[n]``; ``ratio`` from one of the functions above, advantages detached. Positive advantages are
    clipped above, negative ones below (arXiv 1707.06347); clip_high > clip_low is DAPO's clip-higher (arXiv
    2503.14476); None leaves that side unclipped. At a ratio of 1 the gradient is REINFORCE's, -A grad log pi.

    Raises AlignmentError where the shapes differ or a value is not finite, ConfigError for a negative clip.
    """
    if any(clip is not None and not clip >= 0 for clip in (clip_low, clip_high)):
        raise ConfigError(
            f"clip_low is {clip_low} and clip_high {clip_high}: distances from ratio 1 are at least 0."
        )
    check_rows("surrogate", ratio=ratio, advantages=advantages)
    advantages = advantages.detach()
    low = -math.inf if clip_low is None else 1 - clip_low
    high = math.inf if clip_high is None else 1 + clip_high
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    loss = -advantages * torch.where(clipped, ratio.detach().clamp(low, high), ratio)
    return Surrogate(loss, ratio.detach(), clipped)


def mismatch_weights(
    old: Tensor, behaviour: Tensor, kind: Mismatch, *, low: float | None = None, high: float
) -> Tensor:
    """Corrections w = pi_old / pi_behaviour of tokens whose sampler's probabilities are not quite the
    trainer's: ``[n], [n] -> [n]``, without gradient; they multiply a surrogate whose ratio is to ``old``.

    ``old``: the trainer's own log-probs at the weights that sampled; ``behaviour``: the sampler's. ``tis``:
    min(w, high), truncated importance sampling; ``icepop`` (arXiv 2510.18855): w where low <= w <= high,
    otherwise 0, which takes the token out.

    Raises AlignmentError where shapes differ or a value is not finite, ConfigError for another kind, a
    missing or a useless ``low``, or bounds that are not 0 < low < high.
    """
    if kind not in ("tis", "icepop"):
        raise ConfigError(f"mismatch is {kind!r}; known are tis and icepop.")
    if (kind == "icepop") != (low is not None):
        raise ConfigError(f"mismatch {kind!r} with low={low}: icepop needs a lower bound, tis has none.")
    if not (low or 0.0) < high or (low is not None and not low > 0):
        raise ConfigError(f"mismatch {kind!r}: bounds low={low}, high={high} must be 0 < low < high.")
    check_rows("mismatch_weights", old=old, behaviour=behaviour)
    weights = _exp(old.detach() - behaviour.detach())
    if low is None:
        return weights.clamp(max=high)
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def _exp(log_ratio: Tensor) -> Tensor:
    """exp, saturated before it overflows: 0 times an infinite gradient would be NaN."""
    return log_ratio.clamp(max=LARGEST).exp()
