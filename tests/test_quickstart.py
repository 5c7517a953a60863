"""The quickstart's second stage, from the shipped student and teacher: it learns, and no part is inert."""

import json
from pathlib import Path

import pytest

from opd_agents.config import load_config
from opd_agents.report.groups import read_groups
from opd_agents.report.inert import parts
from opd_agents.trainer import train

pytestmark = pytest.mark.timeout(900)  # minutes of training, more on a busy machine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nearly the first half of `orderdesk_opd`, which measures every second step."""
    folder = tmp_path_factory.mktemp("opd") / "run"
    settings = ("trainer.steps=8", "evaluation=null", f"output={folder}")
    return train(load_config("orderdesk_opd", *settings))


def test_no_part_is_inert(run: Path) -> None:
    """Accepted repairs, groups with an advantage, and at least 5 % of the gradient for each component."""
    found = [part for group in read_groups([run]) for part in parts(group)]
    assert {"Corrections", "Rewards"} <= {part.name for part in found}
    assert sum(part.name.startswith("Component") for part in found) == 3
    assert not [part for part in found if part.inert]


def test_the_divergence_falls_and_corrections_keep_their_budget(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["distill/kl"] < 0.75 * rows[0]["distill/kl"]
    assert 0 < rows[-1]["correction/token_share"] <= 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])  # 0 is what `make quickstart` runs
def test_the_quickstart_reaches_its_aims(seed: int, tmp_path: Path) -> None:
    from opd_agents import quickstart

    report = quickstart.run(tmp_path / "quickstart", seed, compare=False)
    summary = json.loads((report.parent / "summary.json").read_text())
    before, after = (summary["policies"][name] for name in ("student_before", "student_after"))
    assert summary["policies"]["teacher"]["success"] >= 0.9
    assert 0.15 <= before["success"] <= 0.5
    assert after["success"] >= 0.8
    assert after["success_greedy"] >= 0.9
    assert after["interval"][0] > before["interval"][1]
