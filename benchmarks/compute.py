"""E2: the runs of compute.yaml, what each arm spent to a level of success, and what became of the claims.

    python benchmarks/compute.py [--jobs 1]
    python benchmarks/compute.py --tune      # the rates that stand in compute.yaml

Writes compute.json, .md and .svg; cells that are finished are not trained again.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from figures import keep, markdown, over_seeds, verdict
from sweep import load_sweep

from opd_agents.report.reading import Run, number, read_run
from opd_agents.runs import write_whole

SWEEP = Path(__file__).with_name("compute.yaml")
LEVELS = (0.6, 0.7, 0.8)
CLAIMED = 0.7  # the level of the claims
BY_REWARD = ("grpo", "score")
RATES = {False: (1e-3, 1.5e-3, 3e-3), True: (3e-4, 6e-4, 1e-3)}
CLAIMS = {  # a below b, or below a share of it
    "1 fresh demonstrations below fixed ones": ("sft_fresh", "sft_fixed", 1.0),
    "2 verified SCoRe below GRPO": ("score_verified", "grpo", 1.0),
    "3 verified SCoRe below the published form": ("score_verified", "score", 1.0),
    "4 verified SCoRe below student retry": ("score_verified", "student_retry", 1.0),
    "5 fresh demonstrations below verified SCoRe": ("sft_fresh", "score_verified", 1.0),
    "6 OPD below GRPO": ("opd", "grpo", 1.0),
    "7 OPD below a tenth of GRPO": ("opd", "grpo", 0.1),
    "8 OPD below fresh demonstrations": ("opd", "sft_fresh", 1.0),
    "9 OPD with GRPO below OPD": ("opd_grpo", "opd", 1.0),
    "10 OPD, then RL, below OPD": ("opd_then_rl", "opd", 1.0),
    "11 verified SCoRe below own successes": ("score_verified", "own_successes", 1.0),
    "12 own successes below GRPO": ("own_successes", "grpo", 1.0),
}
Curve = Sequence[tuple[float, float]]  # FLOPs so far, success on the validation tasks


def curve(run: Run) -> Curve:
    """From the start, at no FLOPs, over all evaluations."""
    start = number((run.summary.get("evaluation_at_start") or {}).get("success"))
    rows = [(number(row.get("total/flops")), number(row.get("eval/success"))) for row in run.metrics]
    points = [(0.0, start), *rows]
    return [(flops, success) for flops, success in points if flops is not None and success is not None]


def spent(points: Curve, level: float) -> float | None:
    """FLOPs at the first evaluation that reaches the level, interpolated from the one before; None if none
    does, NaN where the cold start was there already."""
    before = points[0]
    if before[1] >= level:
        return math.nan
    for flops, success in points[1:]:
        if success >= level:
            share = (level - before[1]) / (success - before[1])
            return before[0] + share * (flops - before[0])
        before = (flops, success)
    return None


def claim(curves: Mapping[str, Mapping[int, Curve]], a: str, b: str, share: float) -> dict[str, Any]:
    """Of the log-ratios over the seeds; an unreached level counts as all that was spent, which is too little,
    so that it may not decide for the arm that it flatters."""
    told = {arm: {seed: spent(points, CLAIMED) for seed, points in curves[arm].items()} for arm in (a, b)}

    def logarithm(arm: str, seed: int) -> float:
        flops = told[arm][seed]
        return math.log(curves[arm][seed][-1][0] if flops is None else flops)

    seeds = sorted(told[a].keys() & told[b].keys())
    found = verdict([logarithm(b, seed) + math.log(share) - logarithm(a, seed) for seed in seeds])
    winner = {"reproduced": a, "contradicted": b}.get(found["verdict"])
    if winner is not None and None in told[winner].values():
        found |= {"verdict": "undecided"}
    reached = {arm: sum(value is not None for value in told[arm].values()) for arm in (a, b)}
    return found | {"reached": reached, "share": share}


def arm(of_seeds: Mapping[int, Curve], teacher: float) -> dict[str, Any]:
    """Of each level how many seeds reached it, and the mean of the logarithms of what they spent; with the
    ``teacher``'s own training beside."""
    row: dict[str, Any] = {"seeds": len(of_seeds), "teacher": teacher}
    for level in LEVELS:
        found = [spent(points, level) for points in of_seeds.values()]
        capped = [
            points[-1][0] if f is None else f for f, points in zip(found, of_seeds.values(), strict=True)
        ]
        row[f"{level:.0%}"] = over_seeds([math.log(flops) for flops in capped]) | {
            "reached": sum(flops is not None for flops in found)
        }
    return row | {"best": over_seeds([max(success for _, success in points) for points in of_seeds.values()])}


def factor(found: Mapping[str, Any], scale: float = 1.0) -> str:
    """A mean of logarithms for a person: the geometric mean, and its interval as a factor."""
    middle = math.exp(found["mean"]) * scale
    return f"{middle:.2f}" + ("" if found["half"] is None else f" x/ {math.exp(found['half']):.2f}")


def page(result: Mapping[str, Any]) -> str:
    """The arms, then the claims."""
    rows = []
    for label, row in result["arms"].items():
        cells = {"arm": label}
        for level in (f"{level:.0%}" for level in LEVELS):
            found, seeds = row[level], row["seeds"]
            bound = "" if found["reached"] == seeds else "> "
            cells[f"TFLOP to {level}"] = f"{bound}{factor(found, 1e-12)} ({found['reached']} of {seeds})"
        claimed = row[f"{CLAIMED:.0%}"]
        bound = "" if claimed["reached"] == row["seeds"] else "> "
        with_teacher = (row["teacher"] + math.exp(claimed["mean"])) / 1e12
        cells[f"to {CLAIMED:.0%}, teacher trained"] = f"{bound}{with_teacher:.2f}" if row["teacher"] else "-"
        best = row["best"]
        cells["best %"] = f"{100 * best['mean']:.0f}" + (
            "" if best["half"] is None else f" ± {100 * best['half']:.0f}"
        )
        rows.append(cells)
    about = (
        "Compute to a level of sampled success on validation tasks: geometric mean over seeds, x/ its 95 % "
        "t-interval, and how many seeds got there; with `>` the others count as what they had spent at their "
        "last evaluation."
    )
    lines = [
        f"- {name}: **{one['verdict']}**, {one['share']:g} of b over a {factor(one)} ({one['seeds']} seeds; "
        + ", ".join(f"{arm} {n}" for arm, n in one["reached"].items())
        + " reached it)."
        for name, one in result["claims"].items()
    ]
    return markdown(about, result, rows) + "\n" + "\n".join(lines) + "\n"


def tune(jobs: int) -> None:
    """Every arm at its three rates, on a seed of its own, up to 0.4 TFLOP; prints which is best."""
    given, _ = load_sweep(SWEEP)
    runs = {"cold_start": given.runs["cold_start"].model_dump()}
    for label, run in given.runs.items():
        for rate in RATES[label in BY_REWARD] if run.student else ():
            overrides = [*run.set, f"trainer.learning_rate={rate}", "trainer.flops=4.0e+11"]
            runs[f"{label}_{rate}"] = run.model_dump() | {"set": overrides}
    tuning = given.model_dump() | {"name": "compute_tuning", "seeds": [10], "runs": runs}
    file = Path("runs/compute_tuning.yaml")
    file.parent.mkdir(exist_ok=True)
    write_whole(file, yaml.safe_dump(tuning, sort_keys=False))
    call(SWEEP.with_name("sweep.py"), file, "--jobs", jobs)
    found = {cell.label: curve(read_run(cell.folder)) for cell in load_sweep(file)[1] if cell.after}
    for label, points in found.items():
        flops = spent(points, LEVELS[0])
        reached = "-" if flops is None else f"{flops / 1e12:.2f}"
        print(f"{label}: {reached} TFLOP to {LEVELS[0]:.0%}, at the end {points[-1][1]:.0%}")


def call(*command: object) -> None:
    """In a process of its own; ends this one with its exit code if it fails."""
    if (code := subprocess.run([sys.executable, *map(str, command)], check=False).returncode) != 0:
        raise typer.Exit(code)


def main(
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    tuning: Annotated[bool, typer.Option("--tune", help="Try three rates an arm instead.")] = False,
    out: Annotated[Path, typer.Option(help="Where compute.* goes.")] = Path("benchmarks/results"),
) -> None:
    """Train what is missing, and say what was found."""
    if tuning:
        return tune(jobs)
    sweep, cells = load_sweep(SWEEP)
    teacher = sweep.folder / "teacher"  # the shipped one again, for what it cost
    call("-m", "opd_agents", "train", "orderdesk_teacher", f"output={teacher}", "--resume")
    call(SWEEP.with_name("sweep.py"), SWEEP, "--jobs", jobs)
    curves: dict[str, dict[int, Curve]] = {}
    for cell in (cell for cell in cells if cell.after is not None):
        curves.setdefault(cell.label, {})[cell.seed] = curve(read_run(cell.folder))
    taught = {cell.label for cell in cells if cell.config.teacher is not None}
    cost = read_run(teacher).metrics[-1]["total/flops"]
    result = {
        "seeds": len(sweep.seeds),
        "teacher": f"{cost / 1e12:.2f} TFLOP",
        "arms": {label: arm(found, cost * (label in taught)) for label, found in curves.items()},
        "claims": {name: claim(curves, *one) for name, one in CLAIMS.items()},
    }
    keep(out, "compute", result, page(result))
    shutil.copy(sweep.folder / "results.svg", out / "compute.svg")
    print(page(result), end="")


if __name__ == "__main__":
    typer.run(main)
