"""How a divergence is measured: over which candidate tokens, by which estimator, to which target.

Arguments are log-probs over the whole vocabulary, at the measure's temperatures (`log_distribution` applies
them to logits); one row is one action token. As everywhere, q is the student and p the teacher, values are in
nats, nothing is averaged, and the gradient goes to the student only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError, ConfigError, UnknownName
from opd_agents.objectives.divergence import Kind, check_kind, contributions, total
from opd_agents.objectives.estimators import (
    ESTIMATED,
    Estimator,
    Ratio,
    estimate,
    log_rest,
    log_rest_of_head,
    normalised,
    of_tokens,
    per_candidate,
)

Signal = Literal["full", "student_top_k", "teacher_top_k", "sampled"]
Tail = Literal["bucket", "sampled", "none"]
Renormalise = Literal["none", "teacher", "both"]


@dataclass(frozen=True, slots=True)
class Measure:
    """A divergence, and from what of the two distributions it is computed.

    - ``divergence``, ``beta``, ``alpha``: as in `opd_agents.objectives.divergence`.
    - ``geometric`` g: the target is p q^g / Z instead of p, q detached (Veto, arXiv 2601.07155).
    - ``clip``: the most that one candidate token adds (see `contributions`), in nats; from above only, so
      that a divergence may become negative (OPSD, arXiv 2601.18734). A capped term has no gradient, an
      infinite one becomes finite.
    - ``signal``: the candidates. ``full``: all tokens. ``student_top_k``, ``teacher_top_k``: the ``k`` most
      probable tokens of the one or the other (all where the vocabulary has fewer), a choice that is not
      differentiated. ``sampled``: the action token.
    - ``tail`` of a top-k signal. ``bucket``: all other tokens are one more candidate, with their whole mass;
      k = V gives the full value. ``sampled``: where the action token is not among the k its term, divided by
      the probability that it was sampled with, is added; in expectation over the action token the value and
      the gradient are those of the full divergence. ``none``: a partial sum, which may be negative.
    - ``renormalise``, with ``tail: none``: the ``teacher``, or ``both``, sum to 1 over the k.
    - ``estimator``. ``direct``: the terms as they are, of the action token divided by the probability that it
      was sampled with, so that the expected value and gradient are those of the full divergence, for every
      kind (for reverse_kl this is k1 with a live ratio). ``per_candidate`` (THUNLP, arXiv 2604.13016), of
      reverse_kl: -sum_v sg(w(v) A(v)) log q(v), A = log p - log q, w = q over the candidates, summing to 1.
      Over the full vocabulary, or with ``renormalise: both``, its gradient is exactly that of ``direct``,
      otherwise a surrogate's; its *value* is no divergence. ``clip`` bounds each -w A from above.
      ``k1``, ``k2``, ``k3``, of signal sampled, with d = log p - log q and a ``ratio`` r = q / behaviour:
      r (-d), r d^2 / 2 and r (e^d - 1 - d), only in the pairs whose expected gradient is that of
      ``divergence`` (`ESTIMATED`). The expected value is the reverse KL for k1 and k3 when the behaviour is
      what sampled; k2's is E_q[d^2] / 2.
    - ``temperature_student``, ``temperature_teacher``: of the softmaxes that gave the log-probs.

    Raises ConfigError for a combination that means nothing, UnknownName for an unknown word.
    """

    divergence: Kind
    beta: float = 0.5
    alpha: float = 0.1
    geometric: float = 0.0
    clip: float | None = None
    signal: Signal = "full"
    k: int | None = None
    tail: Tail | None = None
    renormalise: Renormalise = "none"
    estimator: Estimator = "direct"
    ratio: Ratio | None = None
    temperature_student: float = 1.0
    temperature_teacher: float = 1.0

    def __post_init__(self) -> None:
        check_kind(self.divergence, self.beta, self.alpha)
        _check_words(self)
        _check_support(self)
        _check_estimator(self)


def measured(log_q: Tensor, log_p: Tensor, measure: Measure, action_ids: Tensor, behaviour: Tensor) -> Tensor:
    """The measure ``[n]`` where all of the teacher's distribution is known, for every signal.

    ``log_q``, ``log_p`` ``[n, V]`` normalised log-probs, -inf allowed; ``action_ids [n]`` integers;
    ``behaviour [n]`` log-probs that the action tokens were sampled with, detached (the current log q where
    none was), read by signal and tail ``sampled`` only. Where the measure is infinite, because q or p lacks a
    token that it must have, or because the behaviour could not have sampled the action token, ``inf`` with a
    gradient of zero in that row.

    Raises AlignmentError where shapes differ.
    """
    _check_shapes(log_q, action_ids, behaviour, log_p=(log_p, log_q.shape))
    log_p = log_p.detach()
    target = _geometric(log_p, log_q, measure.geometric)
    if measure.signal == "full":
        return _summed(log_q, target, measure)
    if measure.signal == "sampled":
        return _sampled(
            of_tokens(log_q, action_ids), of_tokens(target, action_ids), behaviour.detach(), measure
        )
    chooser = log_q.detach() if measure.signal == "student_top_k" else log_p
    ids = chooser.topk(min(_k(measure), chooser.shape[-1])).indices
    head, rest = target.gather(-1, ids), None
    if measure.tail == "bucket":
        rest = log_rest(target, ids)
    return _top_k(log_q, ids, head, rest, of_tokens(target, action_ids), measure, action_ids, behaviour)


def measured_top_k(
    log_q: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_p_sampled: Tensor,
    measure: Measure,
    action_ids: Tensor,
    behaviour: Tensor,
) -> Tensor:
    """The measure ``[n]`` where only the teacher's own k most probable tokens are known.

    ``log_q [n, V]``, ``action_ids [n]`` and ``behaviour [n]`` as in `measured`; ``ids [n, k]`` all different
    in a row, their ``log_p [n, k]`` and ``log_p_sampled [n]`` of the action token, over the teacher's whole
    vocabulary and in at least float32 (`token_terms` checks its targets). Signals teacher_top_k and sampled.
    In a bucket the teacher's remaining mass is 1 - sum p, floored at the rounding error of such log-probs (a
    mass below is not known from them), and exactly 0 for k = V.

    Raises ConfigError for another signal, and for a geometric target that is not renormalised over the k (its
    normaliser is not known); AlignmentError where shapes differ.
    """
    if measure.signal == "sampled":
        return measured_sampled(of_tokens(log_q, action_ids), log_p_sampled, behaviour, measure)
    if measure.signal != "teacher_top_k":
        raise ConfigError(
            f"signal {measure.signal} is not known of a teacher that gives its top k only. Use a teacher "
            "that gives hidden states, or signal teacher_top_k or sampled."
        )
    if measure.geometric and measure.renormalise == "none":
        raise ConfigError(
            "geometric: the normaliser of the target is not known from the teacher's top k. Set "
            "`renormalise` to teacher or both, or use a teacher that gives hidden states."
        )
    shape = (*log_q.shape[:-1], min(_k(measure), log_q.shape[-1]))
    _check_shapes(
        log_q, action_ids, behaviour, ids=(ids, shape), log_p=(log_p, shape),
        log_p_sampled=(log_p_sampled, shape[:-1]),
    )  # fmt: skip
    head = _geometric(log_p.detach(), log_q.gather(-1, ids), measure.geometric)
    rest = log_rest_of_head(head, log_q.shape[-1]) if measure.tail == "bucket" else None
    return _top_k(log_q, ids, head, rest, log_p_sampled.detach(), measure, action_ids, behaviour)


def measured_sampled(logprob: Tensor, teacher_logprob: Tensor, behaviour: Tensor, measure: Measure) -> Tensor:
    """The measure ``[n]`` where only log p of the action token is known: signal sampled.

    ``logprob``, ``teacher_logprob`` and ``behaviour`` ``[n]``: log-probs of the action token under the
    student (differentiated), the teacher, and the policy that sampled it; see `measured`.

    Raises ConfigError for another signal and for a geometric target (its normaliser is not known);
    AlignmentError where shapes differ.
    """
    if measure.signal != "sampled" or measure.geometric:
        what = "a geometric target" if measure.signal == "sampled" else f"signal {measure.signal}"
        raise ConfigError(
            f"{what} needs more of the teacher than the log-prob of the sampled token. Use a teacher that "
            "gives hidden states, or signal sampled with `geometric: 0`."
        )
    if not logprob.shape == teacher_logprob.shape == behaviour.shape:
        raise AlignmentError(
            f"measured_sampled: {list(logprob.shape)} of the student, {list(teacher_logprob.shape)}"
            f" of the teacher and {list(behaviour.shape)} of the behaviour must be of the same tokens."
        )
    return _sampled(logprob, teacher_logprob.detach(), behaviour.detach(), measure)


def _top_k(
    log_q: Tensor,
    ids: Tensor,
    head_p: Tensor,
    rest_p: Tensor | None,
    log_p_sampled: Tensor,
    measure: Measure,
    action_ids: Tensor,
    behaviour: Tensor,
) -> Tensor:
    """The measure over the candidates ``ids [n, k]``, with the tail that it names."""
    head_q = log_q.gather(-1, ids)
    if measure.renormalise != "none":
        head_p = normalised(head_p)
    if measure.renormalise == "both":
        head_q = normalised(head_q)
    if rest_p is not None:
        head_q = torch.cat([head_q, log_rest(log_q, ids)[:, None]], -1)
        head_p = torch.cat([head_p, rest_p[:, None]], -1)
    head = _summed(head_q, head_p, measure)
    if measure.tail != "sampled":
        return head
    rows = (ids != action_ids[:, None]).all(-1).nonzero().squeeze(-1)
    log_q_sampled = of_tokens(log_q, action_ids)[rows]
    outside = _sampled(log_q_sampled, log_p_sampled[rows], behaviour.detach()[rows], measure)
    tail = torch.zeros_like(head).index_add(0, rows, outside.to(head.dtype))
    return total(torch.stack([head, tail], -1))


def _summed(log_q: Tensor, log_p: Tensor, measure: Measure) -> Tensor:
    """The terms of all candidates ``[n, candidates] -> [n]``."""
    if measure.estimator == "per_candidate":
        return per_candidate(log_q, log_p, measure.clip)
    terms = contributions(log_q, log_p, measure.divergence, measure.beta, measure.alpha)
    return total(terms if measure.clip is None else terms.clamp(max=measure.clip))


def _sampled(log_q: Tensor, log_p: Tensor, behaviour: Tensor, measure: Measure) -> Tensor:
    """The action token's term divided by its probability under the behaviour, all ``[n]``."""
    # A ratio that overflows would be NaN in the gradient even of a token that counts for nothing.
    largest = 0.9 * math.log(torch.finfo(log_q.dtype).max)
    impossible = (behaviour == -math.inf) | (torch.maximum(log_q.detach(), log_p) - behaviour > largest)
    behaviour = behaviour.masked_fill(impossible, 0.0)
    log_q, log_p = log_q - behaviour, log_p - behaviour  # the terms are homogeneous in (p, q)
    if measure.estimator == "direct":
        terms = contributions(log_q, log_p, measure.divergence, measure.beta, measure.alpha)
    else:
        terms = estimate(log_q, log_p, measure.estimator, live=measure.ratio == "live")
    if measure.clip is not None:
        terms = torch.minimum(terms, measure.clip * (-behaviour).exp())
    return terms.masked_fill(impossible, math.inf)


def _geometric(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log of p q^weight, normalised over the last axis; q is detached."""
    return (log_p + weight * log_q.detach()).log_softmax(-1) if weight else log_p


def _k(measure: Measure) -> int:
    if measure.k is None:
        raise AssertionError("a top-k signal always has its k")
    return measure.k


def _check_words(measure: Measure) -> None:
    words = {
        "signal": (measure.signal, Signal),
        "tail": (measure.tail or "none", Tail),
        "renormalise": (measure.renormalise, Renormalise),
        "estimator": (measure.estimator, Estimator),
        "ratio": (measure.ratio or "live", Ratio),
    }
    for kind, (word, known) in words.items():
        if word not in get_args(known):
            raise UnknownName(kind, word, get_args(known), "help(opd_agents.objectives.Measure)")


def _check_support(measure: Measure) -> None:
    top_k = measure.signal in ("student_top_k", "teacher_top_k")
    if top_k and (measure.k is None or measure.k < 1 or measure.tail is None):
        raise ConfigError(f"signal {measure.signal} needs a `k` of at least 1 and a `tail`.")
    if measure.renormalise != "none" and not (top_k and measure.tail == "none"):
        raise ConfigError("`renormalise` is for a top-k signal with `tail: none`.")
    if measure.clip is not None and not measure.clip > 0:
        raise ConfigError(f"`clip` is {measure.clip}, but must be above 0 nats (None: no clip).")
    if not 0 <= measure.geometric < math.inf:
        raise ConfigError(f"`geometric` is {measure.geometric}, but must be finite and at least 0.")


def _check_estimator(measure: Measure) -> None:
    estimator, ratio = measure.estimator, measure.ratio
    if estimator in ("direct", "per_candidate"):
        if ratio is not None:
            raise ConfigError(f"`ratio` is of the estimators k1, k2 and k3, not of {estimator}.")
        no_rest = measure.signal != "sampled" and measure.tail in (None, "none")
        if estimator == "per_candidate" and not (measure.divergence == "reverse_kl" and no_rest):
            raise ConfigError(
                "estimator per_candidate is of reverse_kl, over all tokens or a top k with `tail: none`."
            )
    elif measure.signal != "sampled":
        raise ConfigError(f"estimator {estimator} is of signal sampled, not {measure.signal}.")
    elif ESTIMATED.get((estimator, ratio)) != measure.divergence:
        raise ConfigError(
            f"estimator {estimator} with ratio {ratio} has not the gradient of {measure.divergence}. For the "
            "reverse KL take k1 or k3 live or k2 detached, for the forward one k3 detached."
        )


def _check_shapes(
    log_q: Tensor, action_ids: Tensor, behaviour: Tensor, **given: tuple[Tensor, torch.Size | tuple[int, ...]]
) -> None:
    rows = log_q.shape[:-1]
    for name, (tensor, shape) in {
        **given, "action_ids": (action_ids, rows), "behaviour": (behaviour, rows)
    }.items():  # fmt: skip
        if tuple(tensor.shape) != tuple(shape):
            raise AlignmentError(
                f"measure: {name} has shape {list(tensor.shape)}, but the student's log-probs "
                f"{list(log_q.shape)} need {list(shape)}."
            )
