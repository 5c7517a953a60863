"""The weights of a config on the packed table: what each key does, whom it looks at, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from opd_agents.config import Scheduled
from opd_agents.config.base import Ramp
from opd_agents.config.weights import Weight
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import ReferenceTerms, weights
from opd_agents.weighting import WeightInputs, factor

PARSE: TypeAdapter[Weight] = TypeAdapter(Weight)
# Episodes 0 (turns 0, 1), 1 (turns 2, 3, 4) and 2 (turn 5): groups 0, 0 and 1; only episode 1 succeeds.
TURN = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5])
EPISODE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
TARGET = torch.tensor([7, 2, 7, 2, 9, 7, 2, 9, 3, 7, 3])
SELECTED = torch.tensor([True] * 3 + [False] + [True] * 4 + [False] + [True] * 2)
N = len(TURN)

EVERY_KIND: list[dict[str, Any]] = [
    {"kind": "outcome", "success": 0.25, "otherwise": 0.75},
    {"kind": "group_failed"},
    {"kind": "pass_rate", "alpha": 2.0},
    {"kind": "perplexity", "prefer": "high"},
    {"kind": "perplexity", "of": "teacher", "prefer": "low", "temperature": 0.5},
    {"kind": "top_tokens"},
    {"kind": "top_tokens", "score": "entropy"},
    {"kind": "top_tokens", "score": "divergence"},
    {"kind": "teacher_entropy"},
    {"kind": "accepted", "k": 2},
    {"kind": "without_tokens", "tokens": ["end", "seven"]},
    {"kind": "without_tokens", "tokens": ["end", "seven"], "first_only": True},
    {"kind": "prefix", "tokens": 2},
    {"kind": "prefix", "turns": 1},
    {"kind": "depth", "by_turn": [1.0, 0.5]},
    {"kind": "sigmoid"},
    {"kind": "likelihood_shift"},
    {"kind": "belief_revision"},
    {"kind": "turn_divergence", "form": "published"},
    {"kind": "turn_divergence", "form": "running"},
    {"kind": "turn_disagreement"},
    {"kind": "trust", "measure": "entropy"},
    {"kind": "trust", "measure": "perplexity"},
    {"kind": "kl_collapse", "floor": 0.9},
    {"kind": "verbal_score", "at_least": 5},
    {"kind": "verdict", "skip": 0.25},
    {"kind": "agreement"},
    {"kind": "agreement", "inverted": True, "unasked": 0.5},
]


def name_of(fields: dict[str, Any]) -> str:
    return "-".join(map(str, fields.values()))


def random(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def token_id(text: str) -> int:
    if text != "seven":
        raise ConfigError(f"{text!r} is no single token")
    return 7


def made(**changes: Any) -> WeightInputs:
    teacher = ReferenceTerms(-2 * random(1), random(2), 2 * random(3), torch.arange(N) % 4)
    inputs = WeightInputs(
        TARGET, TURN, EPISODE, SELECTED, -2 * random(4), random(5), {"teacher": teacher}, {},
        group=torch.tensor([0, 0, 1]), success=torch.tensor([False, True, False]),
        counted=torch.tensor([True, True, True]), end_ids=frozenset({2, 3}), token_id=token_id,
        score=torch.tensor([9.0, 5, 4, 0, math.nan])[TURN % 5], verdict=torch.tensor([0, 1, 2, -1])[TURN % 4],
        agreement=torch.tensor([0.0, 0.25, 1, math.nan])[TURN % 4],
    )  # fmt: skip
    return dataclasses.replace(inputs, **changes)


def teacher_with(**changes: Any) -> dict[str, ReferenceTerms]:
    return {"teacher": made().references["teacher"]._replace(**changes)}


def constant(value: Scheduled) -> float:
    assert isinstance(value, float | int)
    return float(value)


def of(
    fields: dict[str, Any], inputs: WeightInputs | None = None, at: Callable[[Scheduled], float] = constant
) -> Tensor:
    return factor(PARSE.validate_python(fields), made() if inputs is None else inputs, at, random(6) - 0.5)


def test_every_kind_of_the_config_is_here() -> None:
    kinds = PARSE.json_schema()["discriminator"]["mapping"]
    assert {fields["kind"] for fields in EVERY_KIND} == kinds.keys()


@pytest.mark.parametrize("fields", EVERY_KIND, ids=name_of)
def test_a_token_that_is_not_selected_has_0_and_changes_nothing(fields: dict[str, Any]) -> None:
    found, inputs = of(fields), made()
    assert found.shape == (N,) and found.dtype == torch.float64
    assert (found[~SELECTED] == 0).all() and (found >= 0).all() and (found[SELECTED] > 0).any()
    nan = torch.where(SELECTED, 0.0, math.nan)
    if fields.get("measure") == "perplexity":  # looks at all of an episode's history
        nan[:] = 0
    terms = inputs.references["teacher"]
    assert terms.kl is not None and terms.entropy is not None and terms.rank is not None
    spoilt = {
        "teacher": ReferenceTerms(terms.logprob + nan, terms.kl + nan, terms.entropy + nan, terms.rank + nan)
    }
    other = of(fields, made(references=spoilt, logprob=inputs.logprob + nan, entropy=inputs.entropy + nan))
    torch.testing.assert_close(other, found, rtol=0, atol=0)


@pytest.mark.parametrize("fields", EVERY_KIND, ids=name_of)
def test_nothing_selected_gives_zeros(fields: dict[str, Any]) -> None:
    assert of(fields, made(selected=torch.zeros(N, dtype=torch.bool))).tolist() == [0.0] * N


@pytest.mark.parametrize("fields", EVERY_KIND, ids=name_of)
def test_float32_is_kept(fields: dict[str, Any]) -> None:
    double, terms = made(), made().references["teacher"]
    single = ReferenceTerms(*(None if x is None else x.float() for x in terms))  # type: ignore[arg-type]
    inputs = made(
        logprob=double.logprob.float(), entropy=double.entropy.float(), references={"teacher": single}
    )
    found = of(fields, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), of(fields), rtol=1e-5, atol=1e-6)


def assert_factor(
    fields: dict[str, Any], expected: Sequence[float], inputs: WeightInputs | None = None
) -> None:
    """The factor of the selected tokens."""
    assert of(fields, inputs)[SELECTED].tolist() == pytest.approx(expected, rel=1e-6)


def test_outcome() -> None:
    assert_factor({"kind": "outcome", "success": 0.5, "otherwise": 2.0}, [2, 2, 2, 0.5, 0.5, 0.5, 0.5, 2, 2])


def test_group_failed_and_pass_rate_go_by_counted_episodes() -> None:
    assert_factor({"kind": "group_failed"}, [0] * 7 + [1] * 2)
    assert_factor({"kind": "pass_rate"}, [0.25] * 7 + [0] * 2)
    assert_factor({"kind": "pass_rate", "alpha": 0.0, "beta": 2.0}, [0.25] * 7 + [1] * 2)
    # a demonstration's success is not the student's; of a group without rollouts nothing is known
    inputs = made(counted=torch.tensor([True, False, False]))
    assert_factor({"kind": "group_failed"}, [1] * 7 + [0] * 2, inputs)
    assert_factor({"kind": "pass_rate", "alpha": 0.0}, [1] * 7 + [0] * 2, inputs)
    assert_factor({"kind": "group_failed"}, [0] * 9, made(group=torch.tensor([-1, -1, -1])))


def test_perplexity_of_the_student_or_a_reference_over_selected_tokens() -> None:
    own, theirs = made().logprob, made().references["teacher"].logprob
    for name, logprob, prefer, sign in (("student", own, "high", -1), ("teacher", theirs, "low", 1)):
        means = torch.stack([logprob[SELECTED & EPISODE.eq(e)].mean() for e in (0, 1)])
        soft = 2 * (sign * means / 0.5).softmax(0)
        expected = [float(soft[e]) for e in (0, 0, 0, 1, 1, 1, 1)] + [1.0, 1.0]
        assert_factor({"kind": "perplexity", "of": name, "prefer": prefer, "temperature": 0.5}, expected)


def test_perplexity_compares_the_selected_episodes_of_a_group_alone() -> None:
    only = made(selected=SELECTED & (EPISODE != 1))
    found = of({"kind": "perplexity", "prefer": "high"}, only)
    assert found[only.selected].tolist() == [1.0] * 5


def test_top_tokens_by_each_score() -> None:
    inputs, kl = made(), made().references["teacher"].kl
    assert kl is not None
    scores = {
        "entropy": inputs.entropy[SELECTED],
        "divergence": kl[SELECTED],
        "soft_or": weights.soft_or_scores(inputs.entropy[SELECTED], kl[SELECTED]),
    }
    for score, values in scores.items():
        expected = weights.top_share(values, EPISODE[SELECTED], 0.5).tolist()
        assert sum(expected) == 1 + 2 + 1  # floor(3 / 2) + floor(4 / 2) + floor(2 / 2)
        assert_factor({"kind": "top_tokens", "score": score, "share": 0.5}, expected)
    assert len({tuple(weights.top_share(v, EPISODE[SELECTED], 0.5).tolist()) for v in scores.values()}) > 1
    assert_factor({"kind": "top_tokens", "share": 1.0}, [1] * 9)


def test_teacher_entropy_and_acceptance() -> None:
    entropy = torch.linspace(0, 1, N, dtype=torch.float64)
    inputs = made(references=teacher_with(entropy=entropy))
    assert_factor({"kind": "teacher_entropy", "above": 0.6}, [0] * 6 + [1] * 3, inputs)  # 0.6 is not above
    assert_factor({"kind": "accepted", "k": 2, "otherwise": 0.1}, [1, 1, 0.1, 1, 1, 0.1, 0.1, 1, 0.1])


def test_without_tokens_counts_firsts_over_the_whole_episode() -> None:
    assert_factor({"kind": "without_tokens", "tokens": ["end"]}, [1, 0, 1, 1, 1, 0, 1, 1, 0])
    both = {"kind": "without_tokens", "tokens": ["seven", "end"], "first_only": True}
    assert_factor(both, [0, 0, 1, 1, 0, 0, 1, 0, 0])
    late = made(selected=SELECTED & (torch.arange(N) > 1))  # the first 7 and the first end are not selected
    assert of(both, late)[2] == 1
    with pytest.raises(ConfigError, match="'eight' is no single token"):
        of({"kind": "without_tokens", "tokens": ["eight"]})


def test_trust_by_depth_holds_on_at_its_last_value() -> None:
    assert_factor({"kind": "depth", "by_turn": [1.0, 0.5, 0.25]}, [1, 1, 0.5, 1, 1, 0.5, 0.25, 1, 1])
    assert_factor({"kind": "depth", "by_turn": [1.0, 0.5]}, [1, 1, 0.5, 1, 1, 0.5, 0.5, 1, 1])


def test_prefix_of_tokens_or_turns_of_the_episode() -> None:
    assert_factor({"kind": "prefix", "tokens": 2}, [1, 1, 0, 1, 1, 0, 0, 1, 1])
    assert_factor({"kind": "prefix", "turns": 2}, [1, 1, 1, 1, 1, 1, 0, 1, 1])
    assert_factor({"kind": "prefix", "tokens": 0}, [0] * 9)
    assert_factor({"kind": "prefix", "tokens": 2.9}, [1, 1, 0, 1, 1, 0, 0, 1, 1])
    late = made(selected=SELECTED & (torch.arange(N) > 1))
    assert of({"kind": "prefix", "tokens": 2}, late)[2] == 0  # it is the third token, selected first or not


def test_scheduled_values_are_asked_for() -> None:
    ramp = Ramp(kind="linear", start=1, end=3)

    def later(value: Scheduled) -> float:
        return 2.0 if value == ramp else constant(value)

    fields = {"kind": "prefix", "tokens": ramp.model_dump()}
    torch.testing.assert_close(of(fields, at=later), of({"kind": "prefix", "tokens": 2}))
    half = Ramp(kind="linear", start=0.5, end=0)
    shift = {"kind": "likelihood_shift", "strength": half.model_dump()}
    assert (of(shift, at=lambda value: 0.0)[SELECTED] == 1).all()


def test_sigmoid_and_likelihood_shift_of_d() -> None:
    d = (made().references["teacher"].logprob - made().logprob)[SELECTED]
    assert_factor({"kind": "sigmoid", "slope": 3.0}, torch.sigmoid(3 * d).tolist())
    advantage = (random(6) - 0.5)[SELECTED]
    shift = 0.7 + 0.3 * (advantage.sign() * d).exp().clamp(0.9, 1.1)
    assert_factor({"kind": "likelihood_shift", "strength": 0.3, "clip": 0.1}, shift.tolist())
    with pytest.raises(ConfigError, match="a gate of `rewards`"):
        factor(PARSE.validate_python({"kind": "likelihood_shift"}), made(), constant)


def test_turn_weights_see_selected_tokens() -> None:
    inputs, terms = made(), made().references["teacher"]
    assert terms.kl is not None
    d, turns, episodes = (terms.logprob - inputs.logprob)[SELECTED], TURN[SELECTED], EPISODE[SELECTED]
    published = weights.turn_divergence(d, turns, episodes, form="published", cap=0.5)
    assert_factor({"kind": "turn_divergence", "form": "published", "cap": 0.5}, published.tolist())
    disagreement = weights.turn_disagreement(d, inputs.entropy[SELECTED], turns)
    assert_factor({"kind": "turn_disagreement"}, disagreement.tolist())


def test_trust_by_the_references_entropy_on_the_turn() -> None:
    entropy = torch.arange(N, dtype=torch.float64)
    expected = [math.exp(-x / 2) for x in (0.5, 0.5, 2, 4.5, 4.5, 6, 7, 9.5, 9.5)]
    inputs = made(references=teacher_with(entropy=entropy))
    assert_factor({"kind": "trust", "measure": "entropy", "scale": 2.0}, expected, inputs)


def test_trust_by_the_perplexity_of_the_whole_history() -> None:
    logprob = -torch.arange(N, dtype=torch.float64)
    expected = [math.exp(-x / 4) for x in (0, 0, 0.5, 0, 0, 4.5, 5, 0, 0)]
    inputs = made(references=teacher_with(logprob=logprob))
    assert_factor({"kind": "trust", "measure": "perplexity", "scale": 4.0}, expected, inputs)
    last = made(references=teacher_with(logprob=logprob), selected=torch.arange(N) == 7)
    found = of({"kind": "trust", "measure": "perplexity", "scale": 4.0}, last)
    assert float(found[7]) == pytest.approx(math.exp(-5 / 4))  # tokens that are not selected are history too


def test_kl_collapse_spares_successes() -> None:
    kl = torch.tensor([1, 1, 0.01, 1, 1, 1, 0.01, 1, 1, 1, 1], dtype=torch.float64)
    inputs = made(references=teacher_with(kl=kl))
    assert_factor({"kind": "kl_collapse"}, [1, 1, 0, 1, 1, 1, 1, 1, 1], inputs)
    failed = dataclasses.replace(inputs, success=torch.tensor([False] * 3))
    assert_factor({"kind": "kl_collapse"}, [1, 1, 0, 1, 1, 0, 0, 1, 1], failed)


@pytest.mark.parametrize(
    "fields",
    [f for f in EVERY_KIND if f["kind"] in ("top_tokens", "teacher_entropy", "accepted", "kl_collapse")],
    ids=name_of,
)
def test_a_reference_of_single_log_probs_is_refused_where_all_of_it_is_needed(fields: dict[str, Any]) -> None:
    sampled = made(references={"teacher": ReferenceTerms(random(1), None, None, None)})
    if fields.get("score") == "entropy":  # the student's own
        of(fields, sampled)
        return
    with pytest.raises(ConfigError, match="whole next-token distribution"):
        of(fields, sampled)


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match="`base`, which has not scored the tokens; known are teacher"):
        of({"kind": "sigmoid", "reference": "base"})


def reads_the_reference(fields: dict[str, Any]) -> bool:
    """All but the kinds by outcome, judge, place and token, the student's own terms and the rank."""
    others = {"outcome", "group_failed", "pass_rate", "without_tokens", "prefix", "depth", "accepted"}
    others |= {"verbal_score", "verdict", "agreement"}
    own = fields.get("score") == "entropy" or (fields["kind"] == "perplexity" and "of" not in fields)
    return fields["kind"] not in others and not own


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    bad = torch.where(torch.arange(N) == 4, value, 0.5).double()
    spoilt = made(references=teacher_with(logprob=bad, kl=bad, entropy=bad))
    reading = [fields for fields in EVERY_KIND if reads_the_reference(fields)]
    assert len(reading) == 13
    for fields in reading:
        with pytest.raises(AlignmentError, match="not finite in 1 of"):
            of(fields, spoilt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(AlignmentError, match="logprob is torch"):
        made(logprob=random(4, dtype))
    with pytest.raises(AlignmentError, match="kl of teacher is torch"):
        made(references=teacher_with(kl=random(4, dtype)))


def test_tables_of_other_lengths_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"all must be \[N\]"):
        made(entropy=torch.zeros(N - 1))
    with pytest.raises(AlignmentError, match=r"must be \[E\]"):
        made(success=torch.tensor([True]))


def test_episodes_without_tokens_count_in_their_group() -> None:
    inputs = made(
        group=torch.tensor([0, 0, 1, 1]), success=torch.tensor([False, True, False, True]),
        counted=torch.tensor([True, True, True, True]),
    )  # fmt: skip
    assert_factor({"kind": "group_failed"}, [0] * 9, inputs)
    assert_factor({"kind": "pass_rate"}, [0.25] * 9, inputs)
