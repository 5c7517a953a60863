"""The rule from the figures of a sample to what to do first, on figures by hand; and their intervals."""

import dataclasses
import json
from typing import Any

import pytest

from opd_agents.correction.evidence import Arm
from opd_agents.evaluation.rates import bootstrap
from opd_agents.intervals import Mean, interval, mean, paired
from opd_agents.recommending import Choice, Depth, Figures, answer, plain, recommend


def sure(value: float) -> Mean:
    return Mean(value, value, value)


def depth(first: int, last: int, **fields: Any) -> Depth:
    known: dict[str, Any] = {"kl": sure(0.3), "refused": Arm(2, 40), "agreement": Arm(24, 40)}
    known |= {"continued": Arm(30, 40), "student": Arm(16, 40), "alone": Arm(36, 40)}
    return Depth(first, last, **known | fields)


GOOD = Figures(
    student=Arm(16, 40), teacher=Arm(36, 40), better=Mean(0.5, 0.3, 0.65), kl=sure(0.3), log_ratio=sure(0.3),
    overlap=sure(0.9), perplexity=sure(1.8), own_perplexity=sure(1.3), agreement=Arm(24, 40),
    own_agreement=Arm(26, 40), turns=sure(5.0), teacher_turns=sure(4.0), tokens=sure(60.0),
    depths=(depth(1, 1), depth(2, 2), depth(3, 4)), astray=depth(2, 4),
)  # fmt: skip
ALIKE: dict[str, Any] = {"better": Mean(0.0, -0.03, 0.03), "kl": sure(0.002)}
ONE_TURN: dict[str, Any] = {
    "turns": sure(1.0),
    "teacher_turns": sure(1.0),
    "depths": (depth(1, 1),),
    "astray": None,
}
LOST = depth(2, 4, continued=Arm(4, 40))


@pytest.mark.parametrize(
    ("changes", "choice", "words"),
    [
        ({}, Choice.OPD_THEN_RL, "ends at the teacher's 90%"),
        ({"teacher": Arm(40, 40)}, Choice.OPD, "nothing that was found speaks against it"),
        ({"is_student": True}, Choice.SELF_DISTILLATION, "told more"),
        (ALIKE, Choice.RL, "a reward can build on"),
        (ALIKE | {"student": Arm(39, 40)}, Choice.HARDER_TASKS, "solves these tasks"),
        (ALIKE | {"student": Arm(0, 40)}, Choice.SELF_DISTILLATION, "no success that a reward"),
        ({"overlap": sure(0.2)}, Choice.SFT, "patterns"),
        ({"log_ratio": sure(1.7)}, Choice.SFT, "patterns"),
        ({"agreement": Arm(0, 40)}, Choice.SFT, "patterns"),
        (ONE_TURN, Choice.SFT, "too short"),
        (ONE_TURN | {"tokens": sure(4000.0)}, Choice.OPD_THEN_RL, "unknown: reliable"),
        ({"astray": LOST}, Choice.SFT, "the way"),
        ({"depths": (depth(1, 1), depth(2, 2), LOST)}, Choice.OPD_THEN_RL, "lost at turns 2-4"),
    ],
)  # fmt: skip
def test_each_rule(changes: dict[str, Any], choice: Choice, words: str) -> None:
    found = recommend(dataclasses.replace(GOOD, **changes))
    assert found.choice is choice and words in found.reason
    assert found.open == ()


def test_rules_in_their_order() -> None:
    """No gap goes before all else; what only later answers lack is not asked of them."""
    worst = dataclasses.replace(GOOD, **ALIKE, overlap=sure(0.1), astray=LOST)
    assert recommend(worst).choice is Choice.RL
    found = answer(worst)
    assert (found.gap.holds, found.compatible.holds, found.horizon.holds, found.reliable.holds) == (
        False, False, True, False,
    )  # fmt: skip


def test_intervals_that_cross_a_threshold_leave_it_open() -> None:
    doubtful = dataclasses.replace(
        GOOD,
        better=Mean(0.1, -0.1, 0.3),
        overlap=Mean(0.55, 0.4, 0.7),
        astray=depth(2, 4, continued=Arm(20, 40)),
    )
    assert recommend(doubtful).open == ("gap", "compatible", "reliable")
    assert recommend(
        dataclasses.replace(doubtful, kl=sure(0.3), turns=sure(1.0), teacher_turns=None)
    ).open == ("gap",)  # too short for sure, whatever the others
    no_better = dataclasses.replace(GOOD, better=Mean(0.0, -0.2, 0.2))
    assert recommend(no_better).choice is Choice.RL and recommend(no_better).open == ("gap",)


def test_what_could_not_be_asked_is_no_answer() -> None:
    """A teacher that tells log-probs only; one that only acts, in words that never repeat, and cannot go
    back."""
    scores = dataclasses.replace(
        GOOD, teacher=Arm(), better=None, kl=None, overlap=None, agreement=Arm(), own_agreement=Arm(),
        teacher_turns=None, astray=None, no_states="the teacher does not act",
    )  # fmt: skip
    told = answer(scores)
    assert told.gap.holds and "does not act" in told.gap.says
    assert told.compatible.holds and told.reliable.holds is None and "does not act" in told.reliable.says
    assert recommend(scores).choice is Choice.OPD and "unknown: reliable" in recommend(scores).reason
    acts = dataclasses.replace(
        GOOD, kl=None, log_ratio=None, overlap=None, perplexity=None, own_agreement=Arm(1, 40),
        agreement=Arm(0, 40), astray=None, no_states="no way back",
    )  # fmt: skip
    assert answer(acts).compatible.holds is None and answer(acts).gap.holds
    assert "unknown: compatible, reliable" in recommend(acts).reason


def test_as_json() -> None:
    row = json.loads(json.dumps(plain(dataclasses.replace(GOOD, kl=sure(float("inf")))), allow_nan=False))
    assert row["kl"] == {"value": None, "low": None, "high": None}
    assert row["student"] == {"wins": 16, "played": 40, "share": 0.4, "interval": [*interval(Arm(16, 40))]}
    assert row["depths"][2]["last"] == 4 and plain(Arm())["interval"] is None


def test_a_mean_of_episodes() -> None:
    """A pile of tokens in one episode is one observation."""
    values, size = [1.0, 2.0, 4.0, 7.0], 30
    found = mean([size * value for value in values], [size] * 4)
    assert [found.value, found.low, found.high] == [3.5, *bootstrap(values, [1] * 4)]
    assert found.low < 2 and found.high > 5
    assert mean([2.0], [4]).value == 0.5 and mean([2.0], [4]).low == -float("inf")
    assert mean([float("inf"), 1.0], [1, 1]).low == float("inf")


def test_a_paired_difference_is_newcombes() -> None:
    """His table II (Statistics in Medicine 17, 1998), method 10: (a, b, c, d) of 50 pairs."""

    def of(a: int, b: int, c: int, d: int) -> list[float]:
        pairs = [(True, True)] * a + [(True, False)] * b + [(False, True)] * c + [(False, False)] * d
        found = paired(pairs)
        return [round(found.value, 4), round(found.low, 4), round(found.high, 4)]

    assert of(36, 12, 2, 0) == [0.2, 0.0569, 0.3404]
    assert of(54, 0, 0, 0) == [0.0, -0.0664, 0.0664]
    assert of(0, 30, 0, 0) == [1.0, 0.8395, 1.0]
