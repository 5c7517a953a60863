"""Rates and intervals against enumeration, scipy, and cases worked by hand."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from rolling import trajectory, turn

from opd_agents.evaluation import summarise
from opd_agents.evaluation.metrics import first_error, repeated_calls
from opd_agents.evaluation.rates import bootstrap, mcnemar, over_seeds, pass_all, pass_at, wilson
from opd_agents.types import Outcome, Task, ToolCall

Z = 1.959963984540054
WON, LOST = Outcome.SUCCESS, Outcome.FAILURE


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (10, 10), (171, 200), (1, 1)])
def test_the_wilson_interval_is_the_formulas(wins, n):
    p, spread = wins / n, Z * math.sqrt(wins / n * (1 - wins / n) / n + Z * Z / (4 * n * n))
    centre, scale = p + Z * Z / (2 * n), 1 + Z * Z / n
    assert wilson(wins, n) == pytest.approx([(centre - spread) / scale, (centre + spread) / scale], abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_and_pass_all_k_are_shares_of_the_subsets_of_samples(n):
    for wins, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * wins + [False] * (n - wins)
        subsets = list(itertools.combinations(samples, k))
        assert pass_at(k, n, wins) == pytest.approx(sum(map(any, subsets)) / len(subsets))
        assert pass_all(k, n, wins) == pytest.approx(sum(map(all, subsets)) / len(subsets))
        drawn = scipy.stats.hypergeom(n, wins, k)
        assert pass_at(k, n, wins) == pytest.approx(1 - drawn.pmf(0))
        assert pass_all(k, n, wins) == pytest.approx(drawn.pmf(k))


def test_the_bootstrap_over_tasks_is_scipys():
    values = np.random.default_rng(0).binomial(4, 0.3, size=60) / 4
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap(values.tolist(), [1] * 60) == pytest.approx(list(theirs), abs=0.01)
    assert bootstrap(values.tolist(), [1] * 60) == bootstrap(values.tolist(), [1] * 60)


def test_the_bootstrap_takes_a_task_with_all_its_samples():
    """Where all samples of a task go alike, more of them are no more evidence; Wilson's takes them so."""
    wins = [1] * 15 + [0] * 15
    once, often = bootstrap(wins, [1] * 30), bootstrap([10 * w for w in wins], [10] * 30)
    assert once == often == pytest.approx(wilson(15, 30), abs=0.03)
    low, high = wilson(150, 300)
    assert high - low < 0.4 * (often[1] - often[0])
    assert bootstrap([3, 0], [3, 1]) == [0.0, 1.0]  # a mean over episodes: tasks weigh what they were played


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (2, 9), (12, 1)])
def test_mcnemars_test_is_the_exact_binomial(first, second):
    n = first + second
    tail = sum(math.comb(n, i) for i in range(min(first, second) + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_over_seeds_is_the_t_interval():
    values = [0.61, 0.7, 0.66, 0.58, 0.71]
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert over_seeds(values) == {"mean": pytest.approx(0.652), "interval": pytest.approx(list(theirs))}
    assert over_seeds([0.4]) == {"mean": 0.4, "interval": None}


def test_figures_are_means_per_sampled_episode():
    good, bad = turn([1], [2, 3]), turn([1], [2], parse_error="no JSON")
    refused = turn([1], [2], tool_error="no such order")
    tasks = [Task(str(i), "test") for i in range(2)]
    sampled = [
        trajectory([good, bad], outcome=WON, reward=1.0, task=tasks[0]),
        trajectory([refused, bad, good], outcome=LOST, reward=0.5, task=tasks[0]),
        trajectory([], outcome=Outcome.ERROR, error="broken", task=tasks[1]),
        trajectory([good], outcome=Outcome.UNFINISHED, task=tasks[1]),
    ]
    row = summarise(sampled, [trajectory([good], outcome=WON, task=tasks[0]), sampled[3]])
    assert row == {
        "episodes": 4, "tasks": 2, "success": 0.25, "interval": wilson(1, 4),
        "interval_tasks": bootstrap([1, 0], [2, 2]), "success_greedy": 0.5, "interval_greedy": wilson(1, 2),
        "pass_at": {"1": 0.25, "2": 0.5}, "pass_all": {"1": 0.25, "2": 0.0}, "reward": 0.375, "turns": 1.5,
        "invalid_calls": 0.5, "refused_calls": 0.25, "repeated_calls": 0.0, "with_error": 2,
        "first_error_turn": 1.5, "recovery": 0.5, "interval_recovery": wilson(1, 2), "errors": 1,
        "unfinished": 1, "tokens_per_episode": (3 + 4 + 0 + 2) / 4, "tokens_per_success": 9.0,
    }  # fmt: skip


def test_what_is_not_defined_is_none():
    row = summarise([trajectory([turn([1], [2])])], [trajectory([], outcome=WON)])
    assert (row["recovery"], row["first_error_turn"], row["tokens_per_success"]) == (None, None, None)
    assert row["pass_at"] == {"1": 0.0} and row["pass_all"] == {"1": 0.0}


def test_pass_at_k_goes_up_to_the_fewest_samples_of_a_task():
    def episodes(task, *outcomes):
        return [trajectory([], task=Task(task, "test"), outcome=outcome) for outcome in outcomes]

    sampled = episodes("0", *[WON] * 3, *[LOST] * 3) + episodes("1", *[LOST] * 8)
    row = summarise(sampled, sampled)
    assert list(row["pass_at"]) == ["1", "2", "4", "6"]
    assert row["pass_at"]["2"] == pytest.approx((1 - 3 / 15) / 2)
    assert row["pass_all"]["2"] == pytest.approx(3 / 15 / 2)


def test_a_call_is_repeated_where_the_same_was_done_in_the_same_state():
    def call(state, order, parse_error=None):
        calls = () if parse_error else (ToolCall("get_order", {"id": order}),)
        return turn([1], [2], state_digest=state, calls=calls, parse_error=parse_error)

    turns = [call("a", 1), call("a", 2), call("b", 1), call("a", 1), call("a", 1), call("a", 1, "no JSON")]
    assert repeated_calls(trajectory(turns)) == 2
    assert first_error(trajectory(turns)) == 6 and first_error(trajectory(turns[:5])) is None
