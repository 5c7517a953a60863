"""The weights and gates of a config as factors of the action tokens of the packed table, without gradient.

The formulas are in `opd_agents.objectives.weights`; here stands what each kind is given. All means, scales
and shares are over the tokens that the component selects. Where an episode's own beginning or history is
meant (``prefix``, ``first_only``, trust by ``perplexity``), all of its action tokens count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from opd_agents.config import Scheduled
from opd_agents.config.weights import (
    Accepted,
    ActionAgreement,
    Agreement,
    BeliefRevision,
    Depth,
    GroupFailed,
    KLCollapse,
    LikelihoodShift,
    OutcomeWeight,
    PassRate,
    Perplexity,
    Prefix,
    TeacherEntropy,
    TopTokens,
    Trust,
    TurnDisagreement,
    TurnDivergence,
    VerbalScore,
    VerdictWeight,
    Weight,
    WithoutTokens,
)
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import ReferenceTerms, weights
from opd_agents.objectives.inputs import check_rows
from opd_agents.types import Verdict

At: TypeAlias = Callable[[Scheduled], float]
"""A coefficient's value at this step."""


@dataclass(frozen=True, slots=True)
class WeightInputs:
    """What weights are made of, without gradient: N action tokens of E episodes, nats, at the policy that
    sampled.

    ``target``, ``turn`` (numbered over the batch, in order of time) and ``episode`` are int64 [N],
    ``selected`` is bool [N]: the tokens that the component sees. ``logprob`` and ``entropy`` [N] are the
    student's, ``references`` has what each reference says, and of those that say it of whole spans of tokens,
    in equal shares, ``spans`` the span of each token (int64 [N], in order of time). Of episodes: ``group``
    int64 [E] (-1: of none), ``success`` bool [E], and ``counted`` bool [E], the student's own rollouts, which
    a group's success rate is of. ``end_ids`` end a turn; ``token_id`` of a text raises ConfigError where it
    is not one token. ``score`` [N] is a judge's of the token's action, 0 to 9 (NaN: none), ``verdict`` int64
    [N] the place of its verdict in `Verdict` (-1: none), ``agreement`` [N] the share of another's samples at
    the action's state that are this action (NaN: it was not asked there).

    Raises AlignmentError where shapes differ or a log-prob or an entropy is in half precision.
    """

    target: Tensor
    turn: Tensor
    episode: Tensor
    selected: Tensor
    logprob: Tensor
    entropy: Tensor
    references: Mapping[str, ReferenceTerms]
    spans: Mapping[str, Tensor]
    group: Tensor
    success: Tensor
    counted: Tensor
    end_ids: frozenset[int]
    token_id: Callable[[str], int]
    score: Tensor
    verdict: Tensor
    agreement: Tensor

    def __post_init__(self) -> None:
        rows = {"target": self.target, "turn": self.turn, "episode": self.episode, "selected": self.selected}
        rows |= {"logprob": self.logprob, "entropy": self.entropy}
        rows |= {"score": self.score, "verdict": self.verdict, "agreement": self.agreement}
        for name, terms in self.references.items():
            columns = zip(terms._fields, terms, strict=True)
            rows |= {f"{field} of {name}": column for field, column in columns if column is not None}
        check_rows("weights", torch.zeros(len(self.target), dtype=torch.bool), **rows)
        if not self.group.shape == self.success.shape == self.counted.shape:
            raise AlignmentError(
                f"weights: group {list(self.group.shape)}, success {list(self.success.shape)} and counted"
                f" {list(self.counted.shape)} must be [E], one entry per episode."
            )

    def only(self, chosen: Tensor) -> WeightInputs:
        """The tokens where ``chosen`` (bool [N]) holds; the episodes keep their numbers."""
        references = {
            name: ReferenceTerms(*(None if column is None else column[chosen] for column in terms))  # type: ignore[arg-type]
            for name, terms in self.references.items()
        }
        return dataclasses.replace(
            self, target=self.target[chosen], turn=self.turn[chosen], episode=self.episode[chosen],
            selected=self.selected[chosen], logprob=self.logprob[chosen], entropy=self.entropy[chosen],
            references=references, spans={name: spans[chosen] for name, spans in self.spans.items()},
            score=self.score[chosen], verdict=self.verdict[chosen], agreement=self.agreement[chosen],
        )  # fmt: skip

    def gap(self, reference: str) -> Tensor:
        """d = log p - log q of the sampled tokens, [N]; AlignmentError where it is not finite."""
        return _finite(d=self.of(reference).logprob - self.logprob)

    def full(self, reference: str, field: Literal["kl", "entropy", "rank"]) -> Tensor:
        """What only a reference's whole next-token distribution tells, [N], finite."""
        terms = self.of(reference)
        values = {"kl": terms.kl, "entropy": terms.entropy, "rank": terms.rank}[field]
        if values is None:
            raise ConfigError(
                f"a weight needs the {field} of `{reference}`, which gives single log-probs and not its whole"
                " next-token distribution; take a teacher that runs here (kind local or self)"
            )
        return _finite(**{field: values})

    def of(self, reference: str) -> ReferenceTerms:
        if reference not in self.references:
            raise ConfigError(
                f"a weight looks at `{reference}`, which has not scored the tokens; known are"
                f" {', '.join(self.references) or 'none'}"
            )
        return self.references[reference]


def factor(
    weight: Weight,
    inputs: WeightInputs,
    at: At,
    advantage: Tensor | None = None,
) -> Tensor:
    """What ``weight`` multiplies every action token by: [N], 0 where the component does not look.

    ``at`` gives a scheduled value at this step, ``advantage`` [N] is that of the reward which a
    ``likelihood_shift`` or a ``belief_revision`` gates. Raises ConfigError where a reference does not tell
    what the weight needs, or there is no advantage; AlignmentError where what it reads of a selected token is
    not finite.
    """
    chosen = inputs.selected
    own = inputs.only(chosen)
    match weight:
        case LikelihoodShift() | BeliefRevision():
            if advantage is None:
                raise ConfigError(f"{weight.kind} follows a reward's advantage: a gate of `rewards` alone")
            values = _of_advantage(weight, own, _finite(advantage=advantage[chosen]), at)
        case OutcomeWeight() | GroupFailed() | PassRate() | Perplexity():
            values = _of_episodes(weight, own)
        case TurnDivergence() | TurnDisagreement() | KLCollapse():
            values = _of_turns(weight, own)
        case Trust():
            values = _trust(weight, inputs)
        case WithoutTokens() | Prefix() | Depth():
            values = _of_places(weight, inputs, at)[chosen]
        case VerbalScore():
            values = (own.score >= weight.at_least).float().where(~own.score.isnan(), weight.unjudged)
        case VerdictWeight():
            by_verdict = [*(vars(weight)[verdict] for verdict in Verdict), weight.unjudged]
            values = torch.tensor(by_verdict)[own.verdict]
        case ActionAgreement():
            share = 1 - own.agreement if weight.inverted else own.agreement
            values = share.where(~share.isnan(), weight.unasked)
        case _:
            values = _of_tokens(weight, own)
    result = torch.zeros(len(chosen), dtype=torch.promote_types(inputs.logprob.dtype, torch.float32))
    result[chosen] = values.to(result.dtype)
    return result


def _of_advantage(
    weight: LikelihoodShift | BeliefRevision, own: WeightInputs, advantage: Tensor, at: At
) -> Tensor:
    d = own.gap(weight.reference)
    if isinstance(weight, LikelihoodShift):
        return weights.likelihood_shift(d, advantage, strength=at(weight.strength), clip=weight.clip)
    rates = weights.pass_rates(own.success, own.group, own.counted)[own.episode]
    return weights.belief_revision(
        d, advantage, own.turn, own.episode, rates.nan_to_num(0.5), decay=weight.decay,
        strength=weight.strength, clip=weight.clip,
    )  # fmt: skip


def _of_tokens(weight: TopTokens | TeacherEntropy | Accepted | Agreement, own: WeightInputs) -> Tensor:
    match weight:
        case TopTokens(score="entropy"):
            return weights.top_share(_finite(entropy=own.entropy), own.episode, weight.share)
        case TopTokens(score="divergence"):
            return weights.top_share(own.full(weight.reference, "kl"), own.episode, weight.share)
        case TopTokens():
            scores = weights.soft_or_scores(_finite(entropy=own.entropy), own.full(weight.reference, "kl"))
            return weights.top_share(scores, own.episode, weight.share)
        case TeacherEntropy():
            return (own.full(weight.reference, "entropy") > weight.above).float()
        case Accepted():
            accepted = own.full(weight.reference, "rank") < weight.k
            return torch.where(accepted, 1.0, weight.otherwise)
        case Agreement():
            return torch.sigmoid(weight.slope * own.gap(weight.reference))


def _of_episodes(weight: OutcomeWeight | GroupFailed | PassRate | Perplexity, own: WeightInputs) -> Tensor:
    rates = weights.pass_rates(own.success, own.group, own.counted)
    match weight:
        case OutcomeWeight():
            return torch.where(own.success, weight.success, weight.otherwise)[own.episode]
        case GroupFailed():
            return (rates == 0).float()[own.episode]
        case PassRate():  # of an episode whose group's rate nobody knows: 0
            return (rates**weight.alpha * (1 - rates) ** weight.beta).where(~rates.isnan(), 0.0)[own.episode]
        case Perplexity():
            student = weight.of == "student"
            logprob = own.logprob if student else own.of(weight.of).logprob
            return weights.perplexity_weights(
                _finite(logprob=logprob), own.episode, own.group, prefer=weight.prefer,
                temperature=weight.temperature,
            )  # fmt: skip


def _of_turns(weight: TurnDivergence | TurnDisagreement | KLCollapse, own: WeightInputs) -> Tensor:
    match weight:
        case TurnDivergence():
            return weights.turn_divergence(
                own.gap(weight.reference), own.turn, own.episode, form=weight.form, cap=weight.cap
            )
        case TurnDisagreement():
            return weights.turn_disagreement(
                own.gap(weight.reference), _finite(entropy=own.entropy), own.turn
            )
        case KLCollapse():
            kept = weights.kl_collapse(
                own.full(weight.reference, "kl"), own.turn, own.episode, floor=weight.floor
            )
            return torch.where(own.success[own.episode], 1.0, kept)


def _trust(weight: Trust, inputs: WeightInputs) -> Tensor:
    """Of the selected tokens; by perplexity from all tokens of their episodes' earlier turns."""
    if weight.measure == "entropy":
        own = inputs.only(inputs.selected)
        means, unit, _ = weights.unit_means(own.full(weight.reference, "entropy"), own.turn)
        return (-means / weight.scale).exp()[unit]
    seen = torch.isin(inputs.episode, inputs.episode[inputs.selected])
    whole = inputs.only(seen)
    surprise = -_finite(logprob=whole.of(weight.reference).logprob)
    means = weights.history_means(surprise, whole.turn, whole.episode)
    return (-means / weight.scale).exp()[whole.selected]


def _of_places(weight: WithoutTokens | Prefix | Depth, inputs: WeightInputs, at: At) -> Tensor:
    match weight:
        case Depth(by_turn=by_turn):
            place = weights.turn_places(inputs.turn, inputs.episode).clamp(max=len(by_turn) - 1)
            return torch.tensor(by_turn, dtype=torch.float32)[place.long()]
        case Prefix(tokens=None, turns=turns) if turns is not None:
            return (weights.turn_places(inputs.turn, inputs.episode) + 1 <= at(turns)).float()
        case Prefix(tokens=tokens) if tokens is not None:
            return (weights.places(inputs.episode) + 1 <= at(tokens)).float()
        case WithoutTokens():
            result = torch.ones(len(inputs.target))
            for text in weight.tokens:
                ids = inputs.end_ids if text == "end" else frozenset({inputs.token_id(text)})
                result *= weights.without_tokens(
                    inputs.target, inputs.episode, ids, first_only=weight.first_only
                )
            return result
    raise AssertionError("a prefix is of `tokens` or of `turns`")


def _finite(**values: Tensor) -> Tensor:
    """The one tensor given, by name."""
    check_rows("weights", None, **values)
    (only,) = values.values()
    return only
