"""benchmarks/failure_modes.py: the worlds in which the modes occur, and what becomes of its claims."""

import math
import sys
from collections import Counter
from pathlib import Path

import pytest

from opd_agents.alarms import read_alarms
from opd_agents.config import load_config
from opd_agents.envs.actions import format_calls
from opd_agents.envs.lockchain import KEY_OF
from opd_agents.errors import UserError
from opd_agents.testing import check_agent_env
from opd_agents.trainer import train
from opd_agents.types import ToolCall

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import failure_modes
from failure_modes_worlds import CANDIDATES, ODDS, SlippingChain, Vault
from sweep import load_sweep


def vault(task: int, fits: int = 2) -> Vault:
    env = Vault(fits=fits)
    env.reset(options={"split": "train", "task_id": str(task)})
    return env


def test_the_chain_keeps_the_contract() -> None:  # the Vault cannot: its prompts say nothing of the task
    check_agent_env(SlippingChain())


@pytest.mark.parametrize("fits", [1, 2])
def test_a_key_fits_as_often_as_its_odds_and_the_expert_turns_it_as_often(fits: int) -> None:
    fitting, shown, n = Counter[int](), Counter[int](), 3000
    for task in range(n):
        state = vault(task, fits).state
        for sign, keys, key in zip(state["signs"], state["open_to"], state["shown"], strict=True):
            assert len(set(keys)) == fits and key in keys
            fitting.update(CANDIDATES[sign].index(one) for one in keys)
            shown[CANDIDATES[sign].index(key)] += 1
    for place, odds in enumerate(ODDS):
        error = 4 * math.sqrt(odds / (2 * n))
        assert abs(fitting[place] / (2 * n) - fits * odds) < error * fits
        assert abs(shown[place] / (2 * n) - odds) < error


def test_several_ways_open_a_vault_and_nothing_is_told_on_the_way() -> None:
    env = vault(3)
    ways = [(one, other) for one in env.state["open_to"][0] for other in env.state["open_to"][1]]
    assert len(ways) == 4
    for way in [*ways, ("x", ways[0][1])]:
        env = vault(3)
        signs = env.state["signs"]
        assert env.step(way[0])[0].endswith(f"dial {signs[1]}")
        _, reward, ended, _, _ = env.step(way[1])
        assert ended and reward == float(way in ways)


def test_a_slipping_lock_jams_under_the_right_key_and_the_expert_frees_it() -> None:
    slips = turns = 0
    for task in range(60):
        env = SlippingChain(slip=0.1)
        env.reset(seed=task, options={"split": "train", "task_id": str(task)})
        while not env.over:
            on_track = env.get_state()["freed"] is None
            right = format_calls([ToolCall("turn_key", {"key": KEY_OF[env._sign()]})])
            assert env.expert_action() == right
            told, *_ = env.step(right)
            turns, slips = turns + on_track, slips + (on_track and "jam" in told)
    assert 0.05 < slips / turns < 0.16
    with pytest.raises(UserError, match="fits 1 or 2"):
        Vault(fits=3)


def test_the_runs_of_a_mode_differ_in_the_remedy_alone_and_every_claim_has_its_runs() -> None:
    sweep, cells = load_sweep(failure_modes.SWEEP)
    labels = {cell.label for cell in cells}
    assert len(sweep.seeds) == 5
    for _, one, other in failure_modes.ABOVE.values():
        assert {one, other.partition(",")[0]} <= labels
    assert set(failure_modes.RINGS.values()) <= labels
    first = {cell.label: cell.config.model_dump() for cell in cells if cell.seed == sweep.seeds[0]}
    for label, config in first.items():
        world = label.partition("_")[0]
        assert config["environments"] == first[f"{world}_start"]["environments"]
        arms = [other for name, other in first.items() if name.startswith(world) and "_start" not in name]
        same = [{key: other[key] for key in ("chat", "student", "trainer", "evaluation")} for other in arms]
        assert same.count(same[0]) == len(same) and same[0]["trainer"]["steps"] == 30


def test_claims_are_of_paired_seeds() -> None:
    arms = {"one": {seed: {"success": 0.8 + 0.01 * seed} for seed in range(5)}}
    arms["other"] = {seed: {"success": 0.5 + 0.01 * seed} for seed in range(5)}
    found = failure_modes.claim(arms, "success", "one", "other")
    assert found["verdict"] == "reproduced" and found["mean"] == pytest.approx(0.3)
    assert failure_modes.claim(arms, "success", "other", "one")["verdict"] == "contradicted"


@pytest.mark.slow
def test_a_reward_alone_collapses_the_vault_and_its_alarm_rings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start, run = (str(failure_modes.HERE / f"failure_modes_vault_{name}.yaml") for name in ("start", "run"))
    train(load_config(start, "trainer.steps=8", "output=start"))
    train(load_config(run, "method=grpo", "student.model=start", "output=run"))
    assert "diversity_collapse" in {alarm.name for alarm in read_alarms(tmp_path / "run")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_teacher_of_the_track_alone_leads_off_it_and_its_alarms_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failure_modes.teachers(Path("runs/failure_modes"))
    start, student = load_sweep(failure_modes.SWEEP)[1][:2]  # those of the first seed
    assert (start.label, student.label) == ("slip_start", "slip_opd")
    train(start.config)
    train(student.config)
    rung = {alarm.name for alarm in read_alarms(student.folder)}
    assert {"derailed_turns", "flawed_prefix"} <= rung
