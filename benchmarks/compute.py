"""E2: the runs of STUDY.yaml, what each arm spent to a level of success, and what became of the claims.

    python benchmarks/compute.py [STUDY] [--jobs 1]
    python benchmarks/compute.py compute --tune      # the rates that stand in compute.yaml

The studies: compute (the default: all arms on OrderDesk), compute_starts (from weaker and stronger students),
compute_teacher (one that never was off the track), compute_babyai (another world). Writes STUDY.json, .md and
.svg; cells that are finished are not trained again.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from figures import keep, markdown, over_seeds, svg, verdict
from sweep import load_sweep

from opd_agents.report.reading import Run, number, read_run
from opd_agents.runs import write_whole

LEVELS = (0.6, 0.7, 0.8)
CLAIMED = 0.7  # the level of most claims
BY_REWARD = ("grpo", "score")
RATES = {False: (1e-3, 1.5e-3, 3e-3), True: (3e-4, 6e-4, 1e-3)}
TRAINED = Path("runs/compute_teachers")
TEACHERS = {  # by the last part of their path; the shipped one is trained again, for what it cost
    "orderdesk_teacher": ("orderdesk_teacher",),
    "expert_only": ("orderdesk_teacher", "rollout.source=expert"),
    "babyai_teacher": ("babyai_teacher",),
}


class Claim(NamedTuple):
    """Arm ``a`` needs less than the ``share`` of what arm ``b`` needs to the ``level``."""

    a: str
    b: str
    share: float = 1.0
    level: float = CLAIMED


CLAIMS: dict[str, dict[str, Claim]] = {
    "compute": {
        "1 fresh demonstrations below fixed ones": Claim("sft_fresh", "sft_fixed"),
        "2 verified SCoRe below GRPO": Claim("score_verified", "grpo"),
        "3 verified SCoRe below the published form": Claim("score_verified", "score"),
        "4 verified SCoRe below student retry": Claim("score_verified", "student_retry"),
        "5 fresh demonstrations below verified SCoRe": Claim("sft_fresh", "score_verified"),
        "6 OPD below GRPO": Claim("opd", "grpo"),
        "7 OPD below a tenth of GRPO": Claim("opd", "grpo", share=0.1),
        "8 OPD below fresh demonstrations": Claim("opd", "sft_fresh"),
        "9 OPD with GRPO below OPD": Claim("opd_grpo", "opd"),
        "10 OPD, then RL, below OPD": Claim("opd_then_rl", "opd"),
        "11 verified SCoRe below own successes": Claim("score_verified", "own_successes"),
        "12 own successes below GRPO": Claim("own_successes", "grpo"),
    },
    "compute_starts": {
        "1 from 2 %, OPD below GRPO": Claim("opd_2", "grpo_2"),
        "2 from 10 %, OPD below GRPO": Claim("opd_10", "grpo_10"),
        "3 from 70 %, OPD below GRPO": Claim("opd_70", "grpo_70", level=0.8),
        "4 from 70 %, OPD below a tenth of GRPO": Claim("opd_70", "grpo_70", share=0.1, level=0.8),
        "5 from 2 %, OPD below fresh demonstrations": Claim("opd_2", "sft_fresh_2"),
        "6 from 10 %, OPD below fresh demonstrations": Claim("opd_10", "sft_fresh_10"),
        "7 from 70 %, OPD below fresh demonstrations": Claim("opd_70", "sft_fresh_70", level=0.8),
    },
    "compute_teacher": {
        "1 OPD below OPD from the teacher of the expert only": Claim("opd", "opd_expert_only"),
        "2 OPD from the latter below GRPO": Claim("opd_expert_only", "grpo"),
        "3 OPD with GRPO below OPD, both from the latter":
            Claim("opd_grpo_expert_only", "opd_expert_only"),
        "4 verified SCoRe below OPD, both from the latter":
            Claim("score_verified_expert_only", "opd_expert_only"),
    },
    "compute_babyai": {
        "1 OPD below GRPO": Claim("opd", "grpo"),
        "2 OPD below a tenth of GRPO": Claim("opd", "grpo", share=0.1),
        "3 OPD below fresh demonstrations": Claim("opd", "sft_fresh"),
        "4 OPD with GRPO below OPD": Claim("opd_grpo", "opd"),
        "5 fresh demonstrations below fixed ones": Claim("sft_fresh", "sft_fixed"),
        "6 verified SCoRe below GRPO": Claim("score_verified", "grpo"),
        "7 verified SCoRe below OPD": Claim("score_verified", "opd"),
        "8 verified SCoRe below student retry": Claim("score_verified", "student_retry"),
        "9 verified SCoRe below own successes": Claim("score_verified", "own_successes"),
        "10 own successes below GRPO": Claim("own_successes", "grpo"),
    },
}  # fmt: skip
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


def claim(
    curves: Mapping[str, Mapping[int, Curve]], a: str, b: str, share: float, level: float
) -> dict[str, Any]:
    """Of the log-ratios over the seeds; an unreached level counts as all that was spent, which is too little,
    so that it may not decide for the arm that it flatters."""
    told = {arm: {seed: spent(points, level) for seed, points in curves[arm].items()} for arm in (a, b)}

    def logarithm(arm: str, seed: int) -> float:
        flops = told[arm][seed]
        return math.log(curves[arm][seed][-1][0] if flops is None else flops)

    seeds = sorted(told[a].keys() & told[b].keys())
    found = verdict([logarithm(b, seed) + math.log(share) - logarithm(a, seed) for seed in seeds])
    winner = {"reproduced": a, "contradicted": b}.get(found["verdict"])
    if winner is not None and None in told[winner].values():
        found |= {"verdict": "undecided"}
    reached = {arm: sum(value is not None for value in told[arm].values()) for arm in (a, b)}
    return found | {"reached": reached, "share": share, "level": level}


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
    row["start"] = over_seeds([points[0][1] for points in of_seeds.values()])
    return row | {"best": over_seeds([max(success for _, success in points) for points in of_seeds.values()])}


def factor(found: Mapping[str, Any], scale: float = 1.0) -> str:
    """A mean of logarithms for a person: the geometric mean, and its interval as a factor; a dash where all
    were there at the start."""
    if found["mean"] is None:
        return "-"
    middle = math.exp(found["mean"]) * scale
    return f"{middle:.2f}" + ("" if found["half"] is None else f" x/ {math.exp(found['half']):.2f}")


def percent(found: Mapping[str, Any]) -> str:
    return f"{100 * found['mean']:.0f}" + ("" if found["half"] is None else f" ± {100 * found['half']:.0f}")


def page(result: Mapping[str, Any]) -> str:
    """The arms, then the claims."""
    rows = []
    for label, row in result["arms"].items():
        cells = {"arm": label, "start %": percent(row["start"])}
        for level in (f"{level:.0%}" for level in LEVELS):
            found, seeds = row[level], row["seeds"]
            bound = "" if found["reached"] == seeds else "> "
            cells[f"TFLOP to {level}"] = f"{bound}{factor(found, 1e-12)} ({found['reached']} of {seeds})"
        claimed = row[f"{CLAIMED:.0%}"]
        known = row["teacher"] and claimed["mean"] is not None
        bound = "" if claimed["reached"] == row["seeds"] else "> "
        with_teacher = f"{bound}{(row['teacher'] + math.exp(claimed['mean'])) / 1e12:.2f}" if known else "-"
        rows.append(
            cells | {f"to {CLAIMED:.0%}, teacher trained": with_teacher, "best %": percent(row["best"])}
        )
    about = (
        "Compute to a level of sampled success on validation tasks: geometric mean over seeds, x/ its 95 % "
        "t-interval, and how many seeds got there; with `>` the others count as what they had spent at their "
        "last evaluation. A seed that is at a level from the start counts as there, and is not in its mean."
    )
    lines = [
        f"- {name}: **{one['verdict']}**, {one['share']:g} of b over a {factor(one)} at {one['level']:.0%} "
        f"({one['seeds']} seeds; " + ", ".join(f"{arm} {n}" for arm, n in one["reached"].items())
        + " reached it)."
        for name, one in result["claims"].items()
    ]  # fmt: skip
    return markdown(about, result, rows) + "\n" + "\n".join(lines) + "\n"


def plot(curves: Mapping[str, Mapping[int, Curve]], levels: Mapping[str, float]) -> str:
    """SVG: what every seed of an arm spent to the arm's level; a triangle for all that one spent which did
    not get there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.27 * len(curves)), layout="constrained")
    axes = figure.add_subplot()
    for place, (label, of_seeds) in enumerate(curves.items()):
        for points in of_seeds.values():
            flops = spent(points, levels[label])
            if flops is None:
                axes.plot(points[-1][0] / 1e12, place, ">", color="C3", fillstyle="none", alpha=0.8)
            else:
                axes.plot(flops / 1e12, place, "o", color="C0", alpha=0.6)
    axes.set_yticks(
        range(len(curves)), [f"{label.replace('_', ' ')}, {levels[label]:.0%}" for label in curves]
    )
    axes.set(xscale="log", xlabel="TFLOP to the level of success; triangles: spent, and not there")
    least, most = axes.get_xlim()
    ticks = [x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if least <= x <= most]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.minorticks_off()
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return svg(figure, "compute")


def tune(file: Path, jobs: int) -> None:
    """Every arm at its three rates, on a seed of its own, up to 0.4 TFLOP; prints which is best."""
    given, _ = load_sweep(file)
    runs = {label: run.model_dump() for label, run in given.runs.items() if run.student is None}
    for label, run in given.runs.items():
        for rate in RATES[label in BY_REWARD] if run.student else ():
            overrides = [*run.set, f"trainer.learning_rate={rate}", "trainer.flops=4.0e+11"]
            runs[f"{label}_{rate}"] = run.model_dump() | {"set": overrides}
    tuning = given.model_dump() | {
        "name": f"{given.name}_tuning",
        "output": None,
        "seeds": [10],
        "runs": runs,
    }
    file = Path(f"runs/{given.name}_tuning.yaml")
    file.parent.mkdir(exist_ok=True)
    write_whole(file, yaml.safe_dump(tuning, sort_keys=False))
    call(Path(__file__).with_name("sweep.py"), file, "--jobs", jobs)
    found = {cell.label: curve(read_run(cell.folder)) for cell in load_sweep(file)[1] if cell.after}
    for label, points in found.items():
        flops = spent(points, LEVELS[0])
        reached = "-" if flops is None else f"{flops / 1e12:.2f}"
        print(f"{label}: {reached} TFLOP to {LEVELS[0]:.0%}, at the end {points[-1][1]:.0%}")


def call(*command: object) -> None:
    """In a process of its own; ends this one with its exit code if it fails."""
    if (code := subprocess.run([sys.executable, *map(str, command)], check=False).returncode) != 0:
        raise typer.Exit(code)


def trained(teacher: str) -> float:
    """FLOPs of the training of one of `TEACHERS`; if it is not trained, it is now."""
    call("-m", "opd_agents", "train", *TEACHERS[teacher], f"output={TRAINED / teacher}", "--resume")
    return read_run(TRAINED / teacher).metrics[-1]["total/flops"]


def main(
    study: Annotated[str, typer.Argument(help=f"One of {', '.join(CLAIMS)}.")] = "compute",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    tuning: Annotated[bool, typer.Option("--tune", help="Try three rates an arm instead.")] = False,
    out: Annotated[Path, typer.Option(help="Where STUDY.* goes.")] = Path("benchmarks/results"),
) -> None:
    """Train what is missing, and say what was found."""
    if study not in CLAIMS:
        raise typer.BadParameter(f"no study {study!r}; there are {', '.join(CLAIMS)}")
    file = Path(__file__).with_name(f"{study}.yaml")
    sweep, cells = load_sweep(file)
    taught = {
        cell.label: Path(cell.config.teacher.model).name
        for cell in cells
        if cell.config.teacher is not None and cell.config.teacher.model is not None
    }
    costs = {name: trained(name) for name in sorted({*taught.values()})}
    if tuning:
        return tune(file, jobs)
    call(file.with_name("sweep.py"), file, "--jobs", jobs)
    curves: dict[str, dict[int, Curve]] = {}
    for cell in (cell for cell in cells if cell.after is not None):
        curves.setdefault(cell.label, {})[cell.seed] = curve(read_run(cell.folder))
    result = {
        "seeds": len(sweep.seeds),
        **{name: f"{cost / 1e12:.2f} TFLOP" for name, cost in costs.items()},
        "arms": {
            label: arm(found, costs[taught[label]] if label in taught else 0.0)
            for label, found in curves.items()
        },
        "claims": {name: claim(curves, *one) for name, one in CLAIMS[study].items()},
    }
    keep(out, study, result, page(result))
    asked = {arm: one.level for one in CLAIMS[study].values() for arm in (one.a, one.b)}
    levels = {label: asked.get(label, CLAIMED) for label in curves}
    write_whole(out / f"{study}.svg", plot(curves, levels))
    print(page(result), end="")


if __name__ == "__main__":
    typer.run(main)
