"""Policy gradient from rewards: group-relative advantages and the clipped surrogate."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives.divergence import at_least_float32

Normalise = Literal["std", "none"]


def group_advantages(
    rewards: Tensor, groups: Tensor, *, normalise: Normalise = "std", eps: float = 1e-4
) -> Tensor:
    """Advantage of each episode against its group: ``[N], [N] -> [N]``, without gradient.

    ``groups`` holds any integers; episodes of one task that share a number are a group, in any order.
    ``std``: (r - mean) / (std + eps) of GRPO (arXiv 2402.03300), with the sample standard deviation (ddof 1)
    that its implementations use; ``none``: r - mean, as in Dr. GRPO (arXiv 2503.20783). A group whose rewards
    are all equal, and so a group of one, gets exactly 0.

    Raises AlignmentError where the shapes differ, ConfigError for another ``normalise``.
    """
    if normalise not in ("std", "none"):
        raise ConfigError(f"normalise is {normalise!r}; known are 'std' (GRPO) and 'none' (Dr. GRPO).")
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise AlignmentError(
            f"group_advantages: rewards {list(rewards.shape)} and groups {list(groups.shape)} must be [N]."
        )
    rewards = at_least_float32(rewards.detach())
    _, group, size = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(size))
    centred = rewards - (zeros.index_add(0, group, rewards) / size)[group]
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    # Rounding of the mean must not turn equal rewards into an advantage, which dividing by eps would blow up.
    centred = centred.masked_fill((highest == lowest)[group], 0.0)
    if normalise == "none":
        return centred
    variance = zeros.index_add(0, group, centred.square()) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)[group]


class Surrogate(NamedTuple):
    """`ppo_surrogate` of n tokens."""

    loss: Tensor
    """``[n]``, to be minimised, differentiable in the current log-probs."""
    ratio: Tensor
    """``[n]``, pi / pi_behaviour of each token, detached."""
    clipped: Tensor
    """``[n]`` bool: clipping is active, so this token has no gradient; its mean is the clip fraction."""


def ppo_surrogate(
    logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """PPO's clipped surrogate per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), nothing averaged.

    All ``[n]``. r = exp(logprobs - behaviour_logprobs) is the ratio to the probabilities the token was
    *sampled* with, so both must be taken at the same temperature. Advantages and behaviour log-probs are
    detached. Positive advantages are clipped above, negative ones below (arXiv 1707.06347); clip_high >
    clip_low is DAPO's clip-higher (arXiv 2503.14476), infinity switches a side off. At r = 1 the gradient is
    REINFORCE's, -A grad log pi.

    Raises AlignmentError where the shapes differ, ConfigError for a negative clip.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ConfigError(
            f"clip_low is {clip_low} and clip_high {clip_high}; distances from ratio 1 are at least 0."
        )
    if not logprobs.shape == behaviour_logprobs.shape == advantages.shape:
        raise AlignmentError(
            f"ppo_surrogate: logprobs {list(logprobs.shape)}, behaviour_logprobs "
            f"{list(behaviour_logprobs.shape)} and advantages {list(advantages.shape)} must have one shape."
        )
    advantages = at_least_float32(advantages.detach())
    ratio = (at_least_float32(logprobs) - at_least_float32(behaviour_logprobs.detach())).exp()
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    loss = -advantages * torch.where(clipped, ratio.detach().clamp(1 - clip_low, 1 + clip_high), ratio)
    return Surrogate(loss, ratio.detach(), clipped)
