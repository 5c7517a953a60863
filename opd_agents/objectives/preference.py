"""Losses on pairs of sequences: one that is to become likelier, one that is to become less likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives.inputs import check_rows

Form = Literal["dpo", "spin", "orpo"]
ANCHORED = frozenset[Form](("dpo", "spin"))  # measured from a reference; the others by mean log-probs


class PreferenceSlopes(NamedTuple):
    """``slopes`` [N]: d(mean loss of the pairs) / d(what was given: a log-prob of every token, a score of
    every sequence); ``losses`` [P]. Detached."""

    slopes: Tensor
    losses: Tensor


def preference_loss(
    form: Form,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float | None = None,
    chosen_reference: Tensor | None = None,
    rejected_reference: Tensor | None = None,
) -> Tensor:
    """Loss of each pair of sequences: ``[P], [P] -> [P]`` nats, nothing averaged, the references detached.

    - ``dpo``: -log sigmoid(beta ((c - c_ref) - (r - r_ref))) of *summed* log-probs (arXiv 2305.18290);
    - ``spin``: the same function; what differs is who is compared. Chosen are the data, rejected what the
      policy of the round before wrote, which is the reference too (arXiv 2401.01335, logistic loss);
    - ``orpo``: -log sigmoid(log odds(c) - log odds(r)), odds = P / (1 - P), P the exponential of the *mean*
      log-prob: the odds-ratio term alone, without the likelihood of the chosen that the paper adds to it and
      without its factor lambda (arXiv 2403.07691). A P that rounds to 1 is taken one step of the dtype below.

    Equal margins (chosen = rejected, or the policy = its reference) give log 2. Computed in at least float32;
    exact to rounding for margins of any size and for P near 0 and near 1.

    Raises ConfigError for another form, or where ``beta`` (> 0) or the references are missing or of no use;
    AlignmentError where shapes differ, log-probs are in half precision or not finite.
    """
    if form not in get_args(Form):
        raise ConfigError(f"preference form is {form!r}; known are {', '.join(get_args(Form))}.")
    if form not in ANCHORED:
        if not (beta is None and chosen_reference is None and rejected_reference is None):
            raise ConfigError(f"preference form {form!r} has neither a beta nor a reference; leave them out.")
        check_rows("preference_loss", chosen=chosen, rejected=rejected)
        return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    if beta is None or not 0 < beta < math.inf or chosen_reference is None or rejected_reference is None:
        raise ConfigError(
            f"preference form {form!r} with beta={beta} needs beta > 0 and the log-probs of a reference."
        )
    check_rows(
        "preference_loss", chosen=chosen, rejected=rejected,
        chosen_reference=chosen_reference, rejected_reference=rejected_reference,
    )  # fmt: skip
    gained = chosen - chosen_reference.detach()
    return -logsigmoid(beta * (gained - (rejected - rejected_reference.detach())))


def _log_odds(logprob: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P <= 0. What rounds to 0 is moved off it, with its gradient kept."""
    below_zero = logprob.detach().clamp(max=-torch.finfo(logprob.dtype).eps)
    logprob = logprob + (below_zero - logprob.detach())
    return logprob - torch.log(-torch.expm1(logprob))  # 1 - P to its last digit, which counts as P nears 1


def token_slopes(
    form: Form,
    logprob: Tensor,
    counted: Tensor,
    episodes: Tensor,
    pairs: Sequence[tuple[int, int]],
    *,
    beta: float | None = None,
    reference: Tensor | None = None,
) -> PreferenceSlopes:
    """The mean loss of ``pairs`` (chosen, rejected episode) as per-token slopes, from log-probs ``[N]``.

    sum_t slope_t log q(t), where log q is differentiated and the slopes are not, has the exact gradient of
    the mean loss, so a pair may be spread over any micro-batches; its value is not the loss, which is the
    mean of ``losses``. The log-probs must be those of the weights that are then differentiated. A sequence is
    the ``counted`` tokens (bool [N]) of its episode (``episodes`` [N]): their sum for ``dpo`` and ``spin``,
    their mean for ``orpo``. Other tokens have slope 0, and their log-probs (``reference``'s too) are not
    looked at. Without pairs nothing has a slope.

    Raises what :func:`preference_loss` does, and AlignmentError where an episode of a pair counts no token.
    """
    if not logprob.shape == counted.shape == episodes.shape:
        raise AlignmentError(
            f"token_slopes: logprob {list(logprob.shape)}, counted {list(counted.shape)} and episodes"
            f" {list(episodes.shape)} must all be [N]."
        )
    paired = episodes.new_tensor(pairs).reshape(-1, 2)
    used = counted & torch.isin(episodes, paired)
    check_rows("token_slopes", used, logprob=logprob, reference=logprob if reference is None else reference)
    tokens = torch.bincount(episodes[used], minlength=1 + max(map(max, pairs), default=-1))
    if bool((tokens[paired] == 0).any()):
        raise AlignmentError("token_slopes: an episode of a pair has no token that counts.")

    def chosen_rejected(values: Tensor) -> tuple[Tensor, Tensor]:
        sequences = values.new_zeros(len(tokens)).index_add(0, episodes[used], values[used])
        sequences = sequences if form in ANCHORED else sequences / tokens.clamp(min=1)
        return sequences[paired[:, 0]], sequences[paired[:, 1]]

    with torch.enable_grad():
        leaf = logprob.detach().requires_grad_()
        anchors = (None, None) if reference is None else chosen_rejected(reference.detach())
        losses = preference_loss(
            form, *chosen_rejected(leaf),
            beta=beta, chosen_reference=anchors[0], rejected_reference=anchors[1],
        )  # fmt: skip
        (slopes,) = torch.autograd.grad(losses.sum() / max(1, len(pairs)), leaf)
    return PreferenceSlopes(slopes, losses.detach())


def bradley_terry(scores: Tensor, pairs: Sequence[tuple[int, int]]) -> PreferenceSlopes:
    """-log sigmoid(s_chosen - s_rejected) of each of the ``pairs`` of ``scores`` [E], nats, and the slopes
    [E] of their mean: -sigmoid(-margin) / P a pair for the chosen, as much upwards for the rejected (Bradley
    and Terry, 1952; of a discriminator's scores GAD, arXiv 2511.10643).

    Only differences count, so equal scores give log 2, and slopes add up to 0. Scores of no pair are not
    looked at and have slope 0, as all have without pairs. Raises AlignmentError for a score of a pair that is
    not finite.
    """
    paired = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    used = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, paired.flatten(), True)
    check_rows("bradley_terry", used, scores=scores)
    scores = scores.detach()
    margin = scores[paired[:, 0]] - scores[paired[:, 1]]
    share = torch.sigmoid(-margin) / max(1, len(pairs))
    slopes = torch.zeros_like(scores).index_add(0, paired[:, 0], -share).index_add(0, paired[:, 1], share)
    return PreferenceSlopes(slopes, -logsigmoid(margin))


def episode_pairs(groups: Tensor, chosen: Tensor, rejected: Tensor) -> list[tuple[int, int]]:
    """All (chosen, rejected) episodes of one group, in order: int64, bool, bool ``[E]``.

    An episode of no group (-1) is in no pair, nor is one that is both chosen and rejected.
    """
    if groups.ndim != 1 or not groups.shape == chosen.shape == rejected.shape:
        raise AlignmentError(
            f"episode_pairs: groups {list(groups.shape)}, chosen {list(chosen.shape)} and rejected"
            f" {list(rejected.shape)} must all be [E]."
        )
    clear = (groups >= 0) & (chosen ^ rejected)
    better, worse = (clear & chosen)[:, None], (clear & rejected)[None, :]
    pairs = better & worse & (groups[:, None] == groups[None, :])
    return [(int(i), int(j)) for i, j in pairs.nonzero().tolist()]
