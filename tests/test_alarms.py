"""Runs that are broken on purpose, each seen by its alarm; a healthy one, by none."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import opd_agents as opd
from opd_agents.alarms import SIGNS, WINDOW, alarms, read_alarms
from opd_agents.config import load_config
from opd_agents.progress import progress_bar
from opd_agents.report.groups import Group
from opd_agents.report.raised import raised
from opd_agents.report.reading import Run
from opd_agents.runs import latest_checkpoint
from opd_agents.trainer import train
from opd_agents.types import Trajectory

ROOT = Path(__file__).parent.parent
ITSELF = {"kind": "self"}
UNHEARD = {"reference": "base"}  # the student as it is: d = 0
Row = dict[str, Any]


class Third(tiny.Parity):
    """A third of all texts are right, and what the tiny teacher likes to say is not."""

    def success(self) -> bool:
        return bool(self.answers) and len(self.answers[0]) % 3 == 0


opd.register("tiny/Third-v0", "test_alarms:Third")


def length(one: Trajectory) -> float:
    return float(one.n_action_tokens)


def first_of_all(one: Trajectory, *_: Any) -> list[float]:
    """An action that counts ten thousand times."""
    return [1e4 if one.uid.endswith("-0000") and number == 0 else 1.0 for number in range(len(one.turns))]


def broken(output: Path, teacher: Path, steps: int, rate: float, /, **changes: Any) -> dict[str, int]:
    """The alarms of a run of a trained student, with the step of each."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "imports": ["tiny", "test_alarms"],
        "student": {"model": str(latest_checkpoint(teacher))},
        "chat": tiny.BRIEF,
        "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {"episodes_per_step": 16, "group_size": 4, **tiny.LIMITS},
        "trainer": {"learning_rate": rate, "optimizer": "muon", "tensorboard": False, "steps": steps},
    }
    for key, value in changes.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    run = train(load_config(raw))
    rung = read_alarms(run)
    assert rung == alarms(tiny.metrics(run))
    assert all(alarm.seen and alarm.cause and alarm.remedy for alarm in rung)
    return {f"{alarm.name} {alarm.about}".strip(): alarm.step for alarm in rung}


def test_a_run_that_learns_nothing_says_why(
    tmp_path: Path, tiny_teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is its own teacher, the spans leave nothing out, a part of the advantage has no say, and the weight
    of one action drowns all others."""
    components = {
        "answer": {"kind": "distill", "select": {"spans": ["text", "call", "special"]}},
        "joint": tiny.POLICY | {"references": {"base": UNHEARD}},
        "loud": {"kind": "ce", "credit": "test_alarms:first_of_all"},
    }
    rung = broken(
        tmp_path, tiny_teacher, 2 * WINDOW, 1e-9, teacher=ITSELF, references={"base": ITSELF},
        loss={"components": components}, rollout={"max_tokens_per_turn": 1, "episodes_per_step": 64},
    )  # fmt: skip
    names = ("saturation", "mask_error answer", "lopsided_advantage joint", "one_token loud")
    assert rung == dict.fromkeys(names, WINDOW) | {"saturation": 2 * WINDOW}
    told = capfd.readouterr().err
    assert [told.count(f"Alarm: {name.split()[0]}") for name in names] == [1] * 4


def test_groups_of_equal_rewards(tmp_path: Path, tiny_teacher: Path) -> None:
    """A limit of one turn, where a task takes two."""
    found = broken(
        tmp_path, tiny_teacher, WINDOW, 1e-9, rollout={"max_turns": 1},
        loss={"components": {"verifier": tiny.POLICY}},
    )  # fmt: skip
    assert found == {"equal_rewards": WINDOW}


def test_a_sharpened_teacher(tmp_path: Path, tiny_teacher: Path) -> None:
    """The student is led to be surer of what it does already, which is wrong."""
    sharp = {"kind": "distill", "divergence": "forward_kl", "temperature_teacher": 0.02}
    rung = broken(
        tmp_path, tiny_teacher, 2 * WINDOW, 0.03, teacher=ITSELF, loss={"components": {"sharp": sharp}},
        environments=[{"id": "tiny/Third-v0"}], trainer={"updates_per_step": 6},
    )  # fmt: skip
    assert "calibration_gap" in rung


def test_a_reward_for_length(tmp_path: Path, tiny_teacher: Path) -> None:
    longer = {"kind": "policy", "rewards": {"length": {"reward": "test_alarms:length"}}}
    rung = broken(
        tmp_path, tiny_teacher, 2 * WINDOW, 0.005, loss={"components": {"longer": longer}},
        rollout={"max_tokens_per_turn": 20, "max_context_tokens": 120, "episodes_per_step": 8},
    )  # fmt: skip
    assert "length_inflation" in rung


# ---- by doctored metrics


def healthy(steps: int = 40) -> list[Row]:
    """What a run that learns leaves: success rises, KL falls, the student gets surer, errors get rare."""

    def row(step: int) -> Row:
        done = 1 - math.exp(-step / 10)
        wobble = 0.02 * math.sin(7 * step)
        return {
            "step": step, "rollout/success": 0.2 + 0.7 * done + wobble, "distill/kl": 0.6 - 0.55 * done,
            "distill/kl_astray": 0.9 - 0.7 * done, "distill/snr": 6.0 + wobble,
            "rollout/pass_at_2": 0.3 + 0.65 * done, "rollout/pass_at_8": 0.7 + 0.29 * done,
            "rollout/distinct": 1 - 0.7 * done, "rollout/astray": 0.8 - 0.7 * done,
            "rollout/recovery": 0.1 + 0.6 * done, "rollout/wrong_first": 0.3 - 0.25 * done,
            "rollout/wrong_after": 0.8 - 0.6 * done, "calibration/confidence": 0.8 + 0.18 * done,
            "calibration/ece": 0.6 - 0.5 * done, "rollout/action_tokens": 9 + wobble,
            "rollout/cut_actions": 0.01, "top_token/distill": 0.02, "selected/distill": 1.0,
            "selected/correction": 0.01 if step % 3 else 0.0, "advantage_ratio/joint": 0.5,
            "spans/distill": 0.8, "groups/total": 16, "groups/nonzero": 8 - 6 * done,
        }  # fmt: skip

    return [row(step) for step in range(1, steps + 1)]


def doctored(since: int, **figures: float) -> list[Row]:
    changed = {key.replace("__", "/"): value for key, value in figures.items()}
    return [row | (changed if row["step"] >= since else {}) for row in healthy()]


def test_a_healthy_run_raises_none(tiny_teacher: Path) -> None:
    assert alarms(healthy()) == ()
    assert read_alarms(tiny_teacher) == ()
    assert alarms([]) == () and read_alarms(tiny_teacher / "nowhere") == ()


# What was changed in the healthy run from step 21 on, and the one alarm that must ring within two windows.
BROKEN: dict[str, tuple[str, dict[str, float]]] = {
    "the student follows and fails": (
        "flawed_prefix", {"rollout__success": 0.0, "calibration__confidence": 0.8},
    ),
    "it follows behind its mistakes, in vain": (
        "flawed_prefix",
        {"rollout__success": 0.3, "rollout__recovery": 0.0, "rollout__astray": 0.4, "distill__kl_astray": 0.1}
        | {"rollout__wrong_first": 0.3, "rollout__wrong_after": 0.6, "calibration__confidence": 0.8},
    ),
    "d is noise": ("saturation", {"distill__snr": 0.5, "distill__kl": 0.005}),
    "pass@k falls while success does not": ("diversity_collapse", {"rollout__pass_at_8": 0.5}),
    "all do the same": (
        "diversity_collapse", {"rollout__pass_at_8": 0.75, "rollout__distinct": 0.1},
    ),
    "sure and no better": (
        "calibration_gap", {"rollout__success": 0.35, "calibration__confidence": 0.99},
    ),
    "one mistake spoils the rest": (
        "derailed_turns",
        {"rollout__success": 0.3, "rollout__astray": 0.5, "rollout__wrong_after": 0.9}
        | {"calibration__confidence": 0.8, "distill__kl_astray": 0.8},
    ),
    "one token is all": ("one_token", {"top_token__distill": 0.9}),
    "longer and no better": (
        "length_inflation",
        {"rollout__action_tokens": 30, "rollout__success": 0.3, "calibration__confidence": 0.8},
    ),
    "longer and cut off": ("length_inflation", {"rollout__action_tokens": 30, "rollout__cut_actions": 0.5}),
    "spans find nothing": ("mask_error", {"spans__distill": 0.0}),
    "spans find everything": ("mask_error", {"spans__distill": 1.0}),
    "one part has no say": ("lopsided_advantage", {"advantage_ratio__joint": 1e-4}),
    "the other part has none": ("lopsided_advantage", {"advantage_ratio__joint": 1e4}),
    "rewards are equal": (
        "equal_rewards",
        {"groups__nonzero": 0, "rollout__success": 0.7, "rollout__pass_at_8": 0.72, "rollout__distinct": 0.8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_seen_soon_and_nothing_else(what: str) -> None:
    name, figures = BROKEN[what]
    (alarm,) = alarms(doctored(21, **figures))
    assert alarm.name == name
    assert 21 <= alarm.step <= 20 + 2 * WINDOW
    assert re.search(r"\d", alarm.seen)


def test_every_sign_is_provoked_here_and_told_in_the_docs() -> None:
    assert {name for name, _ in BROKEN.values()} == SIGNS.keys()
    page = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    for name in SIGNS:
        assert f"`{name}`" in page, name


def test_a_component_that_never_saw_a_token() -> None:
    """One that looks for what may be missing has `2 * WINDOW` steps; one that found something, all."""
    rows = [row | {"selected/correction": 0.0} for row in healthy()]
    (alarm,) = alarms(rows)
    assert (alarm.name, alarm.about, alarm.step) == ("mask_error", "correction", 2 * WINDOW)
    assert alarm.seen == "it has selected no token in 10 steps"
    (alarm,) = alarms([row | {"correction/accepted": 0} for row in rows])
    assert alarm.seen == "it has selected no token in 10 steps, in which no repair was accepted"
    rows[3]["selected/correction"] = 0.01
    assert alarms(rows) == ()


def test_an_alarm_hangs_on_the_steps_up_to_its_own() -> None:
    """So a resumed run, which has the rows before, neither repeats nor forgets one."""
    rows = doctored(21, rollout__success=0.0, distill__snr=0.1, distill__kl=0.0)
    whole = alarms(rows)
    assert {alarm.name for alarm in whole} == {"flawed_prefix", "calibration_gap", "saturation"}
    for end in range(len(rows)):
        assert alarms(rows[:end]) == tuple(alarm for alarm in whole if alarm.step <= end)


def test_figures_that_are_not_there_raise_nothing() -> None:
    missing: Iterator[Row] = ({key: None for key in row} | {"step": row["step"]} for row in doctored(1))
    assert alarms(list(missing)) == ()
    assert alarms([{"step": row["step"]} for row in healthy()]) == ()
    rows = doctored(21, distill__snr=0.1, distill__kl=0.0)
    rows[2]["distill/snr"] = math.nan  # as a trainer has it; the file says null
    assert [alarm.name for alarm in alarms(rows)] == ["saturation"]


def test_each_is_told_once_also_after_a_resume(
    tmp_path: Path, tiny_teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny.mix(tmp_path, tiny_teacher)
    rows = [
        row | {"progress": 0.5, "tokens_per_second": 1.0}
        for row in doctored(21, distill__snr=0.1, distill__kl=0.0)
    ]
    for before, told in ((10, 1), (30, 0)):
        with progress_bar(config, before, rows[:before]) as bar:
            for row in rows[before:]:
                bar.update(row)
        assert capfd.readouterr().err.count("Alarm: saturation") == told
    with progress_bar(config, 0, [], shown=False) as bar:  # of several processes one tells
        for row in rows:
            bar.update(row)
    assert "Alarm" not in capfd.readouterr().err


def test_the_report_tells_those_of_several_seeds_together() -> None:
    metrics = (doctored(31, spans__distill=0), healthy(), doctored(21, spans__distill=0))
    runs = [Run(Path(f"seed-{i}"), "x", {}, tuple(rows), {}, (), ()) for i, rows in enumerate(metrics)]
    (one,) = raised(Group("x", tuple(runs)))
    assert (one.alarm, one.seeds) == (alarms(metrics[2])[0], "in 2 of 3 seeds")
    (alone,) = raised(Group("x", tuple(runs[:1])))
    assert (alone.alarm, alone.seeds) == (alarms(metrics[0])[0], "")
    assert raised(Group("x", tuple(runs[1:2]))) == []


def test_an_alarm_says_what_to_change() -> None:
    (alarm,) = alarms(doctored(1, top_token__distill=0.6))
    assert str(alarm).startswith("one_token of distill, step")
    assert "clip" in str(alarm) and "one token holds 60%" in str(alarm)
    assert dataclasses.asdict(alarm).keys() == {"name", "step", "seen", "cause", "remedy", "about"}


def test_a_teacher_that_tells_log_probs_only_is_judged_by_what_estimates_the_kl() -> None:
    rows = [
        {key.replace("distill/kl", "distill/log_ratio"): value for key, value in row.items()}
        for row in doctored(21, rollout__success=0.0, calibration__confidence=0.8)
    ]
    assert [alarm.name for alarm in alarms(rows)] == ["flawed_prefix"]
