"""Evidence for repairs: posteriors against scipy and simulation, and the rule that decides."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from opd_agents.correction.evidence import Arm, Evidence, decide, false_verdicts, probability_better


@pytest.mark.parametrize("one", [Arm(0, 0), Arm(0, 4), Arm(3, 4), Arm(16, 16), Arm(5, 32)])
@pytest.mark.parametrize("other", [Arm(0, 0), Arm(4, 4), Arm(1, 8), Arm(20, 32)])
def test_the_probability_is_the_integral_of_the_posteriors(one: Arm, other: Arm) -> None:
    p, q = (beta(1 + arm.wins, 1 + arm.played - arm.wins) for arm in (one, other))
    integral, _ = quad(lambda x: p.pdf(x) * q.cdf(x), 0, 1)
    assert probability_better(one, other) == pytest.approx(integral, abs=1e-7)
    assert probability_better(one, other) + probability_better(other, one) == pytest.approx(1.0)


def test_nothing_played_says_nothing() -> None:
    assert all(probability_better(Arm(0, n), Arm(0, n)) == 0.5 for n in range(17))
    assert Arm().share is None and Evidence(Arm(), {"own": Arm()}).gain is None


def test_a_repair_has_to_beat_its_strongest_rival() -> None:
    found = Evidence(Arm(4, 4), {"own": Arm(0, 4), "retry": Arm(3, 4)})
    assert found.better == probability_better(Arm(4, 4), Arm(3, 4))
    assert found.gain == 0.25


@pytest.mark.parametrize(
    ("repair", "rival", "last", "verdict"),
    [
        (Arm(4, 4), Arm(0, 4), False, "accepted"),
        (Arm(3, 4), Arm(1, 4), False, "open"),
        (Arm(3, 4), Arm(1, 4), True, "rejected"),  # what is not proved at the last look
        (Arm(0, 4), Arm(2, 4), False, "rejected"),
        (Arm(2, 4), Arm(2, 4), False, "open"),  # even: not below .5
        (Arm(0, 4), Arm(0, 4), False, "rejected"),  # even, too, but it never helped
    ],
)
def test_the_rule(repair: Arm, rival: Arm, last: bool, verdict: str) -> None:
    assert decide(Evidence(repair, {"own": rival}), accept=0.975, stop=0.5, last=last) == verdict


def test_a_gain_of_two_in_four_is_a_probability_of_85_percent() -> None:
    """One look at four rollouts an arm, accepted at .85, is the rule "at least two more of four"."""
    for wins in range(5):
        for other in range(5):
            found = Evidence(Arm(wins, 4), {"own": Arm(other, 4)})
            verdict = decide(found, accept=0.85, stop=0.5, last=True)
            assert (verdict == "accepted") == (wins - other >= 2)


def test_useless_repairs_pass_seldom() -> None:
    """Three looks at equal success rates: false acceptance stays a small share (it is not .025, as looking
    more often gives chance more chances)."""
    random = np.random.default_rng(0)
    passed = 0
    for _ in range(2000):
        rate = random.uniform()
        draws = random.uniform(size=(2, 16)) < rate
        for look in (4, 8, 16):
            arms = [Arm(int(row[:look].sum()), look) for row in draws]
            verdict = decide(Evidence(arms[0], {"own": arms[1]}), accept=0.975, stop=0.5, last=look == 16)
            if verdict != "open":
                break
        passed += verdict == "accepted"
    assert 0.005 < passed / 2000 < 0.05


def test_an_audit_counts_what_was_judged_wrong() -> None:
    good, bad, even = (Evidence(Arm(wins, 32), {"own": Arm(10, 32)}) for wins in (30, 2, 11))
    assert false_verdicts([(True, good), (True, bad), (True, even)]) == (1, 0)
    assert false_verdicts([(False, good), (False, bad), (False, even)]) == (0, 1)
