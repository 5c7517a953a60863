"""Weights and gates: how much a token counts, by its episode, its turn, or what the models say of it.

Everything here is without gradient and over the n tokens given (the caller passes those that count): tensors
``[n]`` of one table, whose turns are numbered over the whole batch, in order of time within an episode. All
results are at least float32 and at least 0. In nats: ``d`` = log p - log q of the sampled token, p a
reference and q the student; ``kl`` = KL(q || p) and the entropies of whole distributions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opd_agents.errors import ConfigError
from opd_agents.objectives.divergence import at_least_float32

OUTLIERS = 0.98  # the quantile at which `soft_or_scores` clips entropies
SURE = 0.01  # a belief begins at least so far from 0 and from 1, whose log-odds no evidence moves


def scaled(values: Tensor) -> Tensor:
    """Values moved and stretched to [0, 1]: ``[n] -> [n]``; all 0 where they are all equal."""
    values = at_least_float32(values.detach())
    if not len(values) or values.min() == values.max():
        return torch.zeros_like(values)
    return (values - values.min()) / (values.max() - values.min())


def soft_or(a: Tensor, b: Tensor) -> Tensor:
    """a + b - a b = 1 - (1 - a)(1 - b), of values in [0, 1]: high where either is."""
    return a + b - a * b


def soft_or_scores(entropy: Tensor, kl: Tensor) -> Tensor:
    """How much each token can teach, in [0, 1] (TIP, arXiv 2604.14084): ``[n], [n] -> [n]``.

    The soft-or of the student's entropy, clipped at its 98th percentile over the tokens given, and of KL(q ||
    p), each scaled to [0, 1] over the tokens given.
    """
    if len(entropy):
        entropy = entropy.clamp(max=at_least_float32(entropy).quantile(OUTLIERS))
    return soft_or(scaled(entropy), scaled(kl))


def top_share(scores: Tensor, episodes: Tensor, share: float) -> Tensor:
    """1 on the floor(share * L), but at least one, tokens of highest score of each episode of L tokens, 0 on
    others: ``[n], [n] -> [n]``. Of equal scores the earlier token comes first."""
    order = scores.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = places(episodes[order])
    _, episode, length = torch.unique(episodes, return_inverse=True, return_counts=True)
    kept = (length.double() * share + 1e-9).floor().clamp(min=1)  # 0.29 * 100 is a hair below 29
    return (rank < kept[episode]).to(at_least_float32(scores).dtype)


def pass_rates(success: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
    """Share of its group's counted episodes that succeeded, for each of E episodes: bool ``[E]``, int64
    ``[E]`` (-1: of no group), bool ``[E]`` -> float64 ``[E]``; NaN where no episode of the group counts."""
    _, group = torch.unique(groups, return_inverse=True)
    zeros = torch.zeros(len(groups), dtype=torch.float64)
    total = zeros.index_add(0, group, counted.double())
    rates = zeros.index_add(0, group, (counted & success).double()) / total
    return rates[group].masked_fill(groups < 0, torch.nan)


def perplexity_weights(
    logprob: Tensor, episodes: Tensor, groups: Tensor, *, prefer: Literal["high", "low"], temperature: float
) -> Tensor:
    """Softmax over the episodes of a group of +-log perplexity / temperature, times their number (SCOPE,
    arXiv 2604.10688): ``[n], [n]``, groups int64 ``[E]`` -> ``[n]``, one value per episode.

    Log perplexity is minus the mean ``logprob`` of the episode's tokens given. The weight grows with it where
    ``high`` is preferred, falls where ``low`` is, and has mean 1 over the group's episodes that have tokens
    here. An episode of no group (-1) weighs 1.
    """
    means, unit, own = unit_means(-logprob, episodes)
    logits = means / (temperature if prefer == "high" else -temperature)
    group = torch.where(groups[own] < 0, -1 - own, groups[own])  # without one: a group of its own
    _, group = torch.unique(group, return_inverse=True)
    zeros = torch.zeros_like(logits)
    logits = logits - zeros.scatter_reduce(0, group, logits, "amax", include_self=False)[group]
    mean = zeros.index_add(0, group, logits.exp()) / torch.bincount(group, minlength=len(zeros)).clamp(min=1)
    return (logits.exp() / mean[group])[unit]


def without_tokens(target: Tensor, episodes: Tensor, ids: frozenset[int], *, first_only: bool) -> Tensor:
    """0 on tokens that are one of ``ids``, or with ``first_only`` on the first such token of each episode; 1
    on others: int64 ``[n], [n] -> [n]``."""
    found = torch.isin(target, torch.tensor(sorted(ids), dtype=target.dtype))
    if first_only:
        places_found = found.nonzero().squeeze(1)
        found[places_found] = places(episodes[places_found]) == 0
    return (~found).float()


def likelihood_shift(d: Tensor, advantage: Tensor, *, strength: float, clip: float) -> Tensor:
    """(1 - strength) + strength * clip(exp(sign(A) d), 1 - clip, 1 + clip): ``[n], [n] -> [n]`` (RLSD, arXiv
    2604.03128). More of a positive advantage, and less of a negative one, where p finds the token likelier.

    Raises ConfigError for a strength above 1, which would extrapolate.
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"likelihood_shift: strength is {strength}; take 0 (no shift) to 1 (all of it).")
    shift = (advantage.detach().sign() * d.detach()).exp().clamp(1 - clip, 1 + clip)
    return 1 - strength + strength * at_least_float32(shift)


def belief_revision(
    d: Tensor,
    advantage: Tensor,
    turns: Tensor,
    episodes: Tensor,
    prior: Tensor,
    *,
    decay: float,
    strength: float,
    clip: float,
) -> Tensor:
    """(1 - strength) + strength * clip(1 + clip z, 1 - clip, 1 + clip), one value per turn: five ``[n]`` ->
    ``[n]`` (AgentOPSD, arXiv 2608.05987). More of an advantage on turns that speak for how it turned out.

    A turn's evidence is its sum of d; evidence so far, c_k = decay c_(k-1) + e_k, moves the belief
    sigmoid(logit(prior) + c_k), and z is the turn's change of it times sign(advantage), standardised over the
    turns of the episode (population deviation; 0 where all are equal). ``prior``, in [0, 1], is one value per
    episode, ``advantage`` has one sign per turn.
    """
    means, unit, own = unit_means(d, turns)
    evidence = means * torch.bincount(unit)
    episode = _of_units(episodes, unit, own)
    start, direction = prior.clamp(SURE, 1 - SURE).logit(), advantage.detach().sign()
    odds, sign = (_of_units(values, unit, own) for values in (start, direction))
    known: dict[int, float] = {}
    before, after = torch.empty_like(evidence), torch.empty_like(evidence)
    for turn, (number, found) in enumerate(zip(episode.tolist(), evidence.tolist(), strict=True)):
        before[turn] = known.get(number, 0.0)
        known[number] = decay * known.get(number, 0.0) + found
        after[turn] = known[number]
    revised = sign * ((odds + after).sigmoid() - (odds + before).sigmoid())
    mean, of, _ = unit_means(revised, episode)
    centred = revised - mean[of]
    deviation = unit_means(centred.square(), episode).means.sqrt()[of]
    z = torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))
    return (1 - strength + strength * (1 + clip * z).clamp(1 - clip, 1 + clip))[unit]


def turn_divergence(
    d: Tensor, turns: Tensor, episodes: Tensor, *, form: Literal["published", "running"], cap: float
) -> Tensor:
    """Falling where turns diverge more than those before: ``[n], [n], [n] -> [n]``, at most 1 + cap (SOD,
    arXiv 2605.07725).

    With d_k the mean |d| of an episode's k-th turn, ``published``: the product of d_u / d_(u+1) over u < k,
    which telescopes to d_1 / d_k, so that all hangs on the first turn; ``running``: the mean of d_u before
    over d_k. A first turn has 1, and so has 0 / 0.
    """
    means, unit, own = unit_means(d.abs(), turns)
    episode = _of_units(episodes, unit, own)
    before = _sums_before(means, episode) / places(episode) if form == "running" else _first(means, episode)
    ratio = torch.where((before == means) | (places(episode) == 0), torch.ones_like(means), before / means)
    return ratio.clamp(max=1 + cap)[unit]


def turn_disagreement(d: Tensor, entropy: Tensor, turns: Tensor) -> Tensor:
    """Soft-or of each turn's mean |d| and mean student entropy, both scaled to [0, 1] over the turns given:
    ``[n], [n], [n] -> [n]`` (T-DUR of ATOD, arXiv 2606.27814)."""
    disagreement, uncertainty = unit_means(d.abs(), turns), unit_means(entropy, turns)
    return soft_or(scaled(disagreement.means), scaled(uncertainty.means))[disagreement.unit]


def history_means(values: Tensor, turns: Tensor, episodes: Tensor) -> Tensor:
    """Mean over the tokens of all earlier turns of the episode, one value per turn; 0 on a first turn:
    ``[n], [n], [n] -> [n]``."""
    means, unit, own = unit_means(values, turns)
    episode, sizes = _of_units(episodes, unit, own), torch.bincount(unit).to(means.dtype)
    return (_sums_before(means * sizes, episode) / _sums_before(sizes, episode).clamp(min=1))[unit]


def kl_collapse(kl: Tensor, turns: Tensor, episodes: Tensor, *, floor: float) -> Tensor:
    """0 from the first turn of an episode on whose mean KL(q || p) is below ``floor`` times the mean of its
    turns before, 1 until then: ``[n], [n], [n] -> [n]``."""
    means, unit, own = unit_means(kl.clamp(min=0), turns)  # rounding leaves -1e-7 where q = p
    episode = _of_units(episodes, unit, own)
    low = means * places(episode) < floor * _sums_before(means, episode)  # never a first turn: 0 < 0
    collapsed = low | (_sums_before(low.to(means.dtype), episode) > 0)
    return (~collapsed).to(means.dtype)[unit]


def places(units: Tensor) -> Tensor:
    """How many earlier entries are of the same unit: integers ``[n]`` -> int64 ``[n]``."""
    _, unit, sizes = torch.unique(units, return_inverse=True, return_counts=True)
    order = unit.argsort(stable=True)
    result = torch.empty_like(unit)
    result[order] = torch.arange(len(unit)) - (sizes.cumsum(0) - sizes)[unit[order]]
    return result


def turn_places(turns: Tensor, episodes: Tensor) -> Tensor:
    """How many turns of its episode come before each token's: int64 ``[n], [n] -> [n]``."""
    own, unit = torch.unique(turns, return_inverse=True)
    return places(_of_units(episodes, unit, own))[unit]


class UnitMeans(NamedTuple):
    """Means over the U units (turns or episodes) that have tokens, by ascending number."""

    means: Tensor
    """``[U]``"""
    unit: Tensor
    """int64 ``[n]``: each token's unit, a place in ``means``."""
    own: Tensor
    """int64 ``[U]``: the number of each unit."""


def unit_means(values: Tensor, units: Tensor) -> UnitMeans:
    """Mean of the tokens of each unit: ``[n]``, integers ``[n]``."""
    values = at_least_float32(values.detach())
    own, unit, sizes = torch.unique(units, return_inverse=True, return_counts=True)
    return UnitMeans(values.new_zeros(len(own)).index_add(0, unit, values) / sizes, unit, own)


def _of_units(values: Tensor, unit: Tensor, own: Tensor) -> Tensor:
    """What all tokens of a unit share, once per unit: ``[n] -> [U]``."""
    return torch.empty_like(own, dtype=values.dtype).scatter(0, unit, values)


def _first(values: Tensor, units: Tensor) -> Tensor:
    """The first value of the same unit: ``[n], [n] -> [n]``."""
    _, unit = torch.unique(units, return_inverse=True)
    first = places(units) == 0
    return torch.zeros_like(values).scatter(0, unit[first], values[first])[unit]


def _sums_before(values: Tensor, units: Tensor) -> Tensor:
    """Sum of the earlier values of the same unit: ``[n], [n] -> [n]``."""
    result = torch.zeros_like(values)
    for unit in units.unique():  # not one sum over all: its rounding would leak from unit to unit
        own = (units == unit).nonzero().squeeze(1)
        result[own[1:]] = values[own[:-1]].cumsum(0)
    return result
