"""Two policies side by side, several seeds, groups of tasks, and gates."""

import pytest
from rolling import trajectory, turn

from opd_agents.errors import ConfigError, UnknownName
from opd_agents.evaluation.breakdown import breakdown, shortest_solutions, without_known_bad
from opd_agents.evaluation.comparing import Entry, Played, compare, comparisons, seeds
from opd_agents.evaluation.gates import check, parse_gate
from opd_agents.evaluation.rates import bootstrap, mcnemar, over_seeds, wilson
from opd_agents.evaluation.suites import Suite
from opd_agents.types import Outcome, Task, ToolCall


def won(task, *outcomes, turns=1, **fields):
    """Samples of a task, by whether each succeeded."""
    return [
        trajectory(
            [turn([1], [2], **fields)] * turns, task=Task(str(task), "test"),
            outcome=Outcome.SUCCESS if outcome else Outcome.FAILURE,
        )
        for outcome in outcomes
    ]  # fmt: skip


def played(outcomes):
    """Samples by task; greedy is the first of them."""
    sampled = [t for task, samples in outcomes.items() for t in won(task, *samples)]
    return Played(sampled, [won(task, samples[0])[0] for task, samples in outcomes.items()], {})


def test_two_policies_are_compared_task_by_task():
    first = played({0: [1, 1], 1: [0, 0], 2: [0, 1], 3: [1, 0], 9: [1, 1]})
    second = played({0: [1, 1], 1: [1, 1], 2: [1, 1], 3: [0, 0], 4: [1, 1]})
    row = compare(first, second)
    differences = [0.0, 1.0, 0.5, -0.5]  # of the four that both played
    assert (row["tasks"], row["difference"]) == (4, 0.25)
    assert row["interval"] == bootstrap(differences, [1] * 4)
    assert row["mcnemar"] == {"baseline_only": 1, "other_only": 2, "p": mcnemar(1, 2)}
    assert row["greedy"]["difference"] == 0.25 and row["greedy"]["mcnemar"]["other_only"] == 2
    assert compare(second, first)["difference"] == -0.25
    assert compare(first, first)["interval"] == [0.0, 0.0]


def test_a_pair_is_surer_than_its_parts():
    """Tasks that are hard for both cancel: the interval of the difference is narrower than either's own."""
    first = played({i: [i % 2 == 0] for i in range(60)})
    second = played({i: [i % 2 == 0 or i % 15 == 1] for i in range(60)})
    row = compare(first, second)
    low, high = wilson(30, 60)
    assert row["difference"] > 0 and row["interval"][1] - row["interval"][0] < 0.6 * (high - low)


def test_every_policy_is_compared_with_the_first_and_seeds_with_their_own():
    single = [Entry(name, {None: name}) for name in ("a", "b", "c")]
    everyone = {name: played({0: [1], 1: [0]}) for name in "abc"}
    assert [(r["policy"], r["baseline"]) for r in comparisons(single, everyone)] == [("b", "a"), ("c", "a")]
    many = [Entry("x", {0: "a", 1: "b"}), Entry("y", {1: "c", 2: "d"})]
    found = comparisons(many, everyone | {"d": everyone["a"]})
    assert [(r["policy"], r["baseline"]) for r in found] == [("c", "b")]  # no seed 2 of x


def test_seeds_are_averaged_with_t_intervals():
    def row(success, recovery=0.5):
        given = {"success": success, "success_greedy": 0.1, "reward": 0.0, "turns": 3, "invalid_calls": 0}
        return given | {"recovery": recovery}

    entries = [
        Entry("x", {0: "x0", 1: "x1"}), Entry("y", {0: "y0", 1: "y1"}), Entry("expert", {None: "expert"})
    ]  # fmt: skip
    rows = {"x0": row(0.2), "x1": row(0.4), "y0": row(0.5), "y1": row(0.9, None), "expert": row(1.0)}
    first, second = seeds(entries, rows)
    assert (first["policy"], first["seeds"], first["success"]) == ("x", [0, 1], over_seeds([0.2, 0.4]))
    assert "difference" not in first and first["recovery"] == over_seeds([0.5, 0.5])
    assert second["difference"] == over_seeds([0.5 - 0.2, 0.9 - 0.4]) and "recovery" not in second


DESK = "opd_agents/OrderDesk-v0"
SUITE = Suite.model_validate(
    {
        "name": "two",
        "environments": [
            {"id": DESK, "options": {}, "known_bad": ["3"]},
            {"id": DESK, "options": {"level": "hard"}, "difficulty": "hopeless"},
        ],
    }
)


def test_success_by_environment_difficulty_horizon_and_tool():
    def calls(*names):
        return {"calls": tuple(ToolCall(name, {}) for name in names)}

    hard = trajectory([], env_kwargs={"level": "hard"}, task=Task("7", "test"), outcome=Outcome.UNFINISHED)
    sampled = [
        *won(0, 1, 0, turns=3, **calls("find", "find")),
        *won(1, 1, turns=9, tool_error="refused", **calls("find", "buy")),
        *won(2, 0, turns=2),
        hard,
    ]
    horizons = shortest_solutions([sampled, won(0, 1, turns=2), won(0, 0, turns=1)])
    assert {key[3]: turns for key, turns in horizons.items()} == {"0": 2, "1": 9}
    groups = breakdown(SUITE, sampled, horizons)
    assert {name: found["episodes"] for name, found in groups["environment"].items()} == {
        DESK: 4, f"{DESK} level=hard": 1
    }  # fmt: skip
    assert list(groups["difficulty"]) == ["hopeless"]  # the others have no level
    assert {name: found["success"] for name, found in groups["horizon"].items()} == {
        "2": 0.5, "9-16": 1.0, "unsolved": 0.0
    }  # fmt: skip
    assert list(groups["tool"]) == ["find", "buy"]
    find, buy = groups["tool"].values()
    assert (find["calls"], find["refused_turns"], find["episodes"]) == (2 * 6 + 9, 9, 3)
    assert (buy["calls"], buy["refused_turns"], buy["success"]) == (9, 9, 1.0)


def test_known_bad_tasks_are_left_out_beside_the_raw_score():
    sampled = [*won(0, 1, 1), *won(3, 0, 0)]
    greedy = [*won(0, 1), *won(3, 0)]
    row = without_known_bad(SUITE, sampled, greedy)
    assert row == {
        "excluded": 1, "episodes": 2, "success": 1.0, "interval": wilson(2, 2), "success_greedy": 1.0,
        "interval_greedy": wilson(1, 1),
    }  # fmt: skip
    assert without_known_bad(SUITE, won(0, 1), won(0, 1)) is None  # none of them was played


FIGURES = {
    "old": {"success": 0.5, "turns": 6.0, "interval": [0.4, 0.6], "recovery": None, "pass_at": {"4": 0.9}},
    "new": {"success": 0.48, "turns": 8.0, "interval": [0.3, 0.6], "recovery": 0.2, "pass_at": {"4": 0.8}}
    | {"difference": -0.02, "difference.low": -0.06, "difference.high": 0.02},
}


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("success >= baseline - 0.02", {"new": True}),  # exactly, in decimal digits
        ("success>baseline-0.02", {"new": False}),
        ("success >= baseline", {"new": False}),
        ("turns <= baseline + 2", {"new": True}),
        ("turns < 8", {"new": False}),
        ("interval.low >= 0.4", {"new": False}),
        ("difference.low >= -0.05", {"new": False}),
        ("pass_at.4 >= 0.8", {"new": True}),
        ("recovery >= baseline", {"new": False}),  # which is not defined
        ("interval_recovery.low >= 0", {"new": False}),  # neither is
        ("spent.cost <= 1", {"new": False}),
    ],
)
def test_gates_hold_or_not(gate, expected):
    rows = check([parse_gate(gate, 2, 4)], FIGURES)
    assert {row["policy"]: row["passed"] for row in rows} == expected


def test_one_policy_alone_is_judged_and_what_is_not_defined_fails():
    gates = [parse_gate(text, 1, 1) for text in ("turns < 8", "recovery >= 0", "success > 0.5")]
    rows = check(gates, {"old": FIGURES["old"]})
    assert [(row["policy"], row["passed"]) for row in rows] == [("old", True), ("old", False), ("old", False)]


@pytest.mark.parametrize(
    ("gate", "policies", "error", "message"),
    [
        ("success => 0.5", 1, ConfigError, "Cannot read the gate"),
        ("success >= baseline * 2", 2, ConfigError, "Cannot read the gate"),
        ("success >= 0.5; import os", 2, ConfigError, "Cannot read the gate"),
        ("sucess >= 0.5", 1, UnknownName, "'success'"),
        ("pass_at.8 >= 0.5", 1, UnknownName, r"'pass_at\.4'"),
        ("interval.lower >= 0.5", 1, UnknownName, r"'interval\.low'"),
        ("success >= baseline", 1, ConfigError, "first --policy"),
        ("difference >= 0", 1, ConfigError, "first --policy"),
    ],
)
def test_gates_that_cannot_be_used_are_refused_before_anything_runs(gate, policies, error, message):
    with pytest.raises(error, match=message):
        parse_gate(gate, policies, 4)
