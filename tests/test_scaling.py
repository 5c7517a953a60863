"""Success against compute: planted curves found again, intervals, comparisons, and the command."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from typer.testing import CliRunner, Result

from opd_agents import cli
from opd_agents.config import FLOP_PARTS, load_config
from opd_agents.evaluation.rates import t_factor
from opd_agents.scaling.curve import Curve, Fit, Interval, Points, resamples
from opd_agents.scaling.shown import tables
from opd_agents.scaling.study import difference, ratio, study
from opd_agents.trainer import train_seeds

PLANTED = Curve(start=0.25, top=0.95, half=3e11, steepness=2.0)
SLOW = Curve(0.25, 0.95, 9e11, 2.0)
END = 1e12
SHARES = (0.15, 0.25, 0.6)


def measured(curve: Curve, seeds: int, random: np.random.Generator, noise: float = 1.0) -> list[Points]:
    """Seven evaluations of 200 episodes a seed; seeds differ in their start, their speed and their FLOPs."""
    found = []
    for _ in range(seeds):
        compute = np.linspace(0, END, 7) * (1 + 0.02 * noise * random.standard_normal())
        own = Curve(
            curve.start + 0.03 * noise * random.standard_normal(), curve.top,
            curve.half * math.exp(0.15 * noise * random.standard_normal()), curve.steepness,
        )  # fmt: skip
        rates = own.at(compute)
        found.append(Points(compute, random.binomial(200, rates) / 200 if noise else rates))
    return found


def test_a_curve_by_hand() -> None:
    curve = Curve(0.2, 0.8, 100.0, 2.0)
    assert curve.at(np.array([0.0, 100.0, 300.0])) == pytest.approx([0.2, 0.5, 0.2 + 0.6 * 0.9])
    assert curve.compute_to(0.74) == pytest.approx(300)
    assert (curve.compute_to(0.2), curve.compute_to(0.8)) == (0, math.inf)
    assert Curve(0.5, 0.1, 100.0, 1.0).compute_to(0.6) == math.inf  # it falls


def test_all_resamples_of_three_seeds_by_hand() -> None:
    counts, chances = resamples(3)
    assert len(counts) == 10 and chances.sum() == pytest.approx(1)
    known = {tuple(one): chance for one, chance in zip(counts.tolist(), chances.tolist(), strict=True)}
    assert known[3, 0, 0] == pytest.approx(1 / 27) and known[1, 1, 1] == pytest.approx(6 / 27)
    drawn, equal = resamples(8)
    assert (drawn.sum(1) == 8).all() and equal.sum() == pytest.approx(1)


def test_the_interval_of_a_level_line_is_the_t_interval_over_seeds() -> None:
    rates = [0.4, 0.5, 0.5, 0.6]
    fit = Fit([Points(np.arange(4.0), np.full(4, rate)) for rate in rates])
    half = t_factor(4) * stdev(rates)
    assert fit.success(2.0) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_a_curve_without_noise_is_found() -> None:
    fit = Fit(measured(PLANTED, 3, np.random.default_rng(0), noise=0))
    assert fit.residual < 0.005
    assert fit.curve.top == pytest.approx(PLANTED.top, abs=0.03)
    assert fit.curve.half == pytest.approx(PLANTED.half, rel=0.1)
    value, low, high = fit.compute_to(0.7)
    assert low <= value <= high and value == pytest.approx(PLANTED.compute_to(0.7), rel=0.03)
    assert fit.compute_to(0.1)[0] == 0  # where it begins
    assert fit.compute_to(0.95) == (math.inf,) * 3  # beyond what was measured


def test_seeds_that_differ_little_are_not_rounded_to_one_curve() -> None:
    seeds = [
        Points(np.linspace(0, END, 7), Curve(0.0, 1.0, 4e11 * (1 + shift), 8.0).at(np.linspace(0, END, 7)))
        for shift in (-0.02, 0.0, 0.02)
    ]
    value, low, high = Fit(seeds).compute_to(0.5)
    assert value == pytest.approx(4e11, rel=0.02) and 0.02 < (high - low) / value < 0.3


def test_intervals_hold_what_was_planted_as_often_as_they_say() -> None:
    random, repetitions = np.random.default_rng(1), 60
    held = dict.fromkeys(("success", "level", "half"), 0)
    for _ in range(repetitions):
        fit = Fit(measured(PLANTED, 3, random))
        _, low, high = fit.success(4e11)
        held["success"] += low <= PLANTED.at(4e11) <= high
        _, low, high = fit.compute_to(0.7)
        held["level"] += low <= PLANTED.compute_to(0.7) <= high
        _, low, high = fit.interval(lambda curve: math.log(curve.half))
        held["half"] += low <= math.log(PLANTED.half) <= high
    # of 95 % binomially 53 or more in all but one case of a hundred
    assert all(53 <= count <= repetitions for count in held.values()), held
    assert min(held.values()) < repetitions  # they are not all numbers


def test_arms_are_told_apart_where_they_differ_and_not_where_they_do_not() -> None:
    random = np.random.default_rng(2)
    base, same, slow = (Fit(measured(curve, 3, random)) for curve in (PLANTED, PLANTED, SLOW))
    assert not difference(same, base, END).excludes_zero
    found = difference(slow, base, 0.5 * END)
    assert found.excludes_zero and found.low < float(SLOW.at(5e11) - PLANTED.at(5e11)) < found.high
    times = ratio(slow, base, 0.5)
    assert times is not None and times.low < 3 < times.high and times.low > 1
    assert ratio(slow, base, 0.9) is None  # which the slow one does not come to
    assert ratio(slow, base, 0.1) is None  # where both begin


def folder(root: Path, seeds: Sequence[Points], **trainer: Any) -> Path:
    """Run folders as `train --seeds` leaves them, without what `scaling` does not read."""
    for seed, one in enumerate(seeds):
        run = root / f"seed-{seed}"
        run.mkdir(parents=True)
        config = {
            "name": root.name, "seed": seed, "output": str(run), "trainer": {"updates_per_step": 8} | trainer,
            "rollout": {"episodes_per_step": 64, "group_size": 8},
            "evaluation": {"suite": "orderdesk", "split": "validation", "limit": 200, "every": 1},
        }  # fmt: skip
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        rates = one.success.tolist()
        rows = [
            {"step": step, "total/flops": c, "eval/success": rates[step]}
            | {f"total/flops/{part}": share * c for part, share in zip(FLOP_PARTS, SHARES, strict=True)}
            for step, c in enumerate(one.compute.tolist())
        ][1:]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = {
            "evaluation_at_start": {"success": rates[0]}, "evaluation": {"success": rates[-1]},
            "parameters": {"student": 100, "teacher": 250},
        }  # fmt: skip
        (run / "summary.json").write_text(json.dumps(summary))
    return root


def test_a_study_says_what_differs_and_who_is_told_apart(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    base = folder(tmp_path / "base", measured(PLANTED, 3, random))
    same = folder(tmp_path / "same", measured(PLANTED, 3, random), threads=2)
    slow = folder(tmp_path / "slow", measured(SLOW, 3, random), updates_per_step=2)
    found = study([base, same, slow], levels=(0.5, 0.9))
    assert [one["changes"] for one in found["arms"]] == [
        {}, {"trainer.threads": 2}, {"trainer.updates_per_step": 2},
    ]  # fmt: skip
    first = found["arms"][0]
    assert first["shares"] == pytest.approx(dict(zip(FLOP_PARTS, SHARES, strict=True)))
    assert (first["size_ratio"], first["rollouts_per_prompt"], first["seeds"]) == (2.5, 8, 3)
    assert first["curve"]["start"][1] < PLANTED.start < first["curve"]["start"][2]
    assert [one["told_apart"] for one in found["comparisons"]] == [False, True]
    said = " ".join(found["conclusions"])
    assert "slow is below base" in said and "by any of these figures: same." in said
    assert found["arms"][2]["compute_to"]["0.9"][0] is None
    shown = tables(found)
    assert shown["arms"][0]["rollouts : teacher : updates, %"] == "15 : 25 : 60"
    unit = "GFLOP" if max(one["measured_to"] for one in found["arms"]) < 1e12 else "TFLOP"
    assert shown["curves"][2][f"{unit} to 90 %"].startswith("> ")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def scaling(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, ["scaling", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_on_trained_runs(tmp_path: Path) -> None:
    watched = {"suite": tiny.SUITE, "every": 1, "limit": 2}
    folders = []
    for name, updates in (("few", 1), ("many", 4)):
        config = load_config(
            tiny.sft(tmp_path / name, evaluation=watched), "trainer.steps=2", "trainer.checkpoint_every=2",
            f"trainer.updates_per_step={updates}",
        )  # fmt: skip
        train_seeds(config, [0, 1], probes=False)
        folders.append(tmp_path / name)
    result = scaling(*folders, "--out", tmp_path / "out", "--level", 0.6)
    assert result.exit_code == 0, result.output
    assert "trainer.updates_per_step=4" in " ".join(result.stdout.split())
    found = json.loads((tmp_path / "out" / "scaling.json").read_text())
    few, many = found["arms"]
    assert [len(rates) for _, rates in few["points"]] == [3, 3] and few["seeds"] == 2
    assert few["shares"] == {"rollout": 0, "teacher": 0, "update": 1}  # all is learned from the expert
    assert many["points"][0][0][0] == 0 < many["measured_to"] == min(c[-1] for c, _ in many["points"])
    assert "few" in (tmp_path / "out" / "scaling.md").read_text()
    assert (tmp_path / "out" / "scaling.svg").read_text().lstrip().startswith("<?xml")
    assert json.loads(scaling(*folders, "--level", 0.6, "--json").stdout) == found


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    seeds = measured(PLANTED, 2, random)
    good = folder(tmp_path / "good", seeds)
    alone = folder(tmp_path / "alone", seeds[:1])
    short = folder(tmp_path / "short", [Points(one.compute[:2], one.success[:2]) for one in seeds])
    blind = folder(tmp_path / "blind", [Points(one.compute, np.full(7, np.nan)) for one in seeds])
    running = folder(tmp_path / "running", seeds)
    (running / "seed-1" / "summary.json").unlink()
    other = folder(tmp_path / "other", seeds)
    for config in other.glob("seed-*/config.yaml"):
        config.write_text(config.read_text().replace("orderdesk", "shop"))
    cases: list[tuple[list[Any], str]] = [
        ([alone], "alone has a single seed"),
        ([short], "has 2 evaluations, and a curve needs 3"),
        ([blind], "has 0 evaluations"),
        ([running], "has not finished"),
        ([good, other], "evaluated on different tasks"),
        ([tmp_path / "nothing"], "There is no run folder"),
        ([good, "--level", "80"], "--level 80"),
    ]
    for arguments, message in cases:
        result = scaling(*arguments)
        assert result.exit_code == 2 and result.stdout == "", (message, result.output)
        assert message in " ".join(result.stderr.split())


def test_an_interval_excludes_zero_on_either_side() -> None:
    assert Interval(1, 0.5, 1.5).excludes_zero and Interval(-1, -1.5, -0.5).excludes_zero
    assert not Interval(1, -0.5, 2).excludes_zero
