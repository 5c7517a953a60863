"""Advantages: from the rewards of episodes, and from how much likelier a reference finds each token.

All are detached: an advantage says how much a token counts and is never differentiated. Those of one
component are added up, gated, by its caller.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from opd_agents.errors import ConfigError
from opd_agents.objectives.divergence import at_least_float32
from opd_agents.objectives.inputs import check_rows

Baseline = Literal["group", "leave_one_out", "none"]
Normalise = Literal["std", "batch_std", "none"]


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    baseline: Baseline = "group",
    normalise: Normalise = "std",
    eps: float = 1e-4,
) -> Tensor:
    """Advantage (r - baseline) / scale of each episode: ``[N], [N] -> [N]``, without gradient.

    ``groups`` holds any integers; episodes of one task that share a number are a group, in any order.
    ``baseline``: the ``group``'s mean (GRPO, arXiv 2402.03300); the mean of the *other* episodes of the group
    (``leave_one_out``, RLOO, arXiv 2402.14740), which is n / (n - 1) times as far away in a group of n; or
    ``none`` (REINFORCE). ``normalise`` divides by the standard deviation + eps of the group's rewards
    (``std``, GRPO) or of all N (``batch_std``), with ddof 1 as implementations have it; ``none`` by nothing
    (Dr. GRPO, arXiv 2503.20783).

    With a baseline, a group whose rewards are all equal, and so a group of one, gets exactly 0. Without one
    such a group would be divided by eps, so ``none`` goes with ``normalise="none"`` alone.

    Raises AlignmentError where the shapes differ or a reward is not finite, ConfigError for another
    ``baseline`` or ``normalise``, or the pair above.
    """
    for key, value, known in (("baseline", baseline, Baseline), ("normalise", normalise, Normalise)):
        if value not in get_args(known):
            raise ConfigError(f"{key} is {value!r}; known are {', '.join(get_args(known))}.")
    if baseline == "none" and normalise != "none":
        raise ConfigError(
            f"baseline 'none' with normalise {normalise!r} divides a reward by the spread of others, which is"
            " 0 where they agree; take normalise 'none', or a baseline."
        )
    check_rows("group_advantages", rewards=rewards, groups=groups)
    rewards = at_least_float32(rewards.detach())
    if baseline == "none":
        return rewards
    _, group, size = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(size))
    centred = rewards - (zeros.index_add(0, group, rewards) / size)[group]
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    # Rounding of the mean must not turn equal rewards into an advantage, which dividing by eps would blow up.
    centred = centred.masked_fill((highest == lowest)[group], 0.0)
    others = (size - 1).clamp(min=1)
    variance = zeros.index_add(0, group, centred.square()) / others
    advantages = centred * size[group] / others[group] if baseline == "leave_one_out" else centred
    if normalise == "std":
        return advantages / (variance.sqrt() + eps)[group]
    return advantages / (rewards.std() + eps) if normalise == "batch_std" and len(rewards) > 1 else advantages


def reference_advantages(
    d: Tensor,
    episodes: Tensor,
    *,
    discount: float = 0.0,
    include_now: bool = True,
    length_normalise: bool = False,
    clip: float | None = None,
    kl: Tensor | None = None,
) -> Tensor:
    """Return of each sampled token's d = log p - log q (nats): ``[N], [N] -> [N]``, without gradient.

    p is the reference, q the student that sampled; rows of one of the ``episodes`` (integers) are in time
    order. First |d| is cut to ``clip``; then, over the rows k of the token's episode from its own, t, on,

        A_t = d_t + kl_t + sum_{k > t} discount^(k - t) d_k.

    ``discount`` 0 estimates the gradient of the reverse KL(q || p) at every visited state, the states being
    given (on-policy distillation); 1 that of the reverse KL of whole sequences. ``include_now=False`` drops
    d_t, as the long-term part of MiniLLM (arXiv 2306.08543) does beside an exact loss for the token itself.
    ``length_normalise`` divides by the number of rows that are left, the own row counted like its d; where
    none is left A_t is 0.

    ``kl`` is KL(q || p) at each row's state: -E_q[d_t], so it is the closed-form baseline of the own d and
    makes that part's mean over tokens exactly 0 (if unclipped). What a baseline adds must be known before the
    token is drawn, or the gradient is biased. The later states follow from the token: their own KLs would
    cancel all that it causes, so they are not added. The length that is left follows from it too: there is no
    closed form of d_t over it, and ``kl`` with ``length_normalise`` is refused.

    Sums are float64, whatever the dtype of d. Raises AlignmentError where shapes differ or a value is not
    finite (a clip bounds an infinite d), ConfigError for a discount outside [0, 1], a clip that is not
    positive, ``include_now=False`` with discount 0, and a ``kl`` that has nothing to be the baseline of.
    """
    if not 0 <= discount <= 1 or (clip is not None and not clip > 0):
        raise ConfigError(f"discount is {discount} and clip {clip}: discount is in [0, 1], clip above 0.")
    if not include_now and discount == 0:
        raise ConfigError("include_now=False with discount 0 leaves no d at all; take a discount above 0.")
    if kl is not None and (length_normalise or not include_now):
        raise ConfigError(
            "the closed-form baseline is that of a token's own d, undivided: take include_now=True and"
            " length_normalise=False with it, or no baseline."
        )
    d = d.detach() if clip is None else d.detach().clamp(-clip, clip)
    check_rows("reference_advantages", d=d, episodes=episodes)
    advantages = _returns(d, episodes, discount, include_now, length_normalise)
    if kl is not None:
        check_rows("reference_advantages", d=d, kl=kl)
        advantages = advantages + kl.detach()
    return advantages


def _returns(d: Tensor, episodes: Tensor, discount: float, include_now: bool, mean: bool) -> Tensor:
    """Discounted sums over the rest of each episode; Horner's scheme from the end never divides by
    discount^t, and a loop over plain numbers takes milliseconds beside a forward pass."""
    following: dict[int, tuple[float, int]] = {}  # of each episode: return and rows from the row below on
    returns = []
    for own, episode in zip(reversed(d.tolist()), reversed(episodes.tolist()), strict=True):
        later, left = following.get(episode, (0.0, 0))
        following[episode] = (own + discount * later, left + 1)
        total, rows = (own + discount * later, left + 1) if include_now else (discount * later, left)
        returns.append(total / max(rows, 1) if mean else total)
    return torch.tensor(returns[::-1], dtype=d.dtype, device=d.device)


def whitened(advantages: Tensor, weights: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(A - mean) / (std + eps) over the tokens of non-zero weight, 0 on others: ``[N], [N] -> [N]``.

    Weights only choose. The standard deviation has ddof 1; equal advantages, and so a single one, give
    exactly 0, as no token at all does. Without gradient. Values of weight 0 are not looked at.

    Raises AlignmentError where shapes differ or a value that counts is not finite.
    """
    counted = weights != 0
    check_rows("whitened", counted, weights=weights, advantages=advantages)
    result, chosen = torch.zeros_like(advantages), advantages.detach()[counted]
    if len(chosen) and bool(chosen.min() < chosen.max()):
        result[counted] = (chosen - chosen.mean()) / (chosen.std() + eps)
    return result
