"""E4: the runs of mixing.yaml, and what became of the claims that stand there.

    python benchmarks/mixing.py [--jobs 1]

Writes mixing.json, .md and .svg; cells that are finished are not trained again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from figures import markdown, plus_minus, svg, verdict, write
from sweep import load_sweep

SWEEP = Path(__file__).with_name("mixing.yaml")
FIGURE = "success_greedy"
GATES = ("divergence", "trust", "pass_rate")
CLAIMS = {
    "1 ratio 1 above ratio .01": ("ratio_1", "ratio_0.01"),
    "2 ratio 1 above ratio 100": ("ratio_1", "ratio_100"),
    "3 ratio .01 above ratio 100": ("ratio_0.01", "ratio_100"),
    "4 gated above ungated": ("gated", "ratio_1"),
} | {f"4 gated above gated without {gate}": ("gated", f"without_{gate}") for gate in GATES}


def claim(cells: Mapping[str, Mapping[int, float]], one: str, other: str) -> dict[str, Any]:
    """The paired difference over the seeds that both have, and its verdict."""
    return verdict(
        [cells[one][seed] - cells[other][seed] for seed in cells[one].keys() & cells[other].keys()]
    )


def page(result: Mapping[str, Any]) -> str:
    """The arms, then the claims."""
    arms = [
        {"arm": label, **{name: plus_minus(value, 3) for name, value in row.items()}}
        for label, row in result["arms"].items()
    ]
    about = "Teacher and reward in one advantage of deviation 1: mean and 95 % t-interval over seeds."
    lines = ["![greedy success by ratio and by gates](mixing.svg)", ""] + [
        f"- {name}: **{one['verdict']}**, difference {plus_minus(one, 3)} ({one['seeds']} seeds)."
        for name, one in result["claims"].items()
    ]
    return markdown(about, result, arms) + "\n" + "\n".join(lines) + "\n"


def plot(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """SVG: greedy success with its interval, of the ratios, and beside them of the gates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ratios = [label for label in arms if label.startswith("ratio_")]
    gated = ["ratio_1", *(label for label in arms if label.startswith(("gated", "without")))]
    names = ["no gate", *(label.replace("_", " ") for label in gated[1:])]
    places = [[float(label.removeprefix("ratio_")) for label in ratios], list(range(len(gated)))]
    for axes, labels, at in zip((left, right), (ratios, gated), places, strict=True):
        found = [arms[label][FIGURE] for label in labels]
        middle, half = ([one[key] for one in found] for key in ("mean", "half"))
        axes.errorbar(at, middle, yerr=half, fmt="o", capsize=3)
        axes.axhline(arms["cold_start"][FIGURE]["mean"], color="grey", linestyle=":", label="cold start")
        axes.grid(alpha=0.3)
    left.set(xscale="log", xlabel="reward : teacher", ylabel="greedy success")
    left.legend(frameon=False)
    right.set_xticks(places[1], names, rotation=25, ha="right")
    return svg(figure, "mixing")


def main(
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Where mixing.json and .md go.")] = Path("benchmarks/results"),
) -> None:
    """Train what is missing, and say what was found."""
    command = [sys.executable, str(SWEEP.with_name("sweep.py")), str(SWEEP), "--jobs", str(jobs)]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise typer.Exit(code)
    sweep, _ = load_sweep(SWEEP)
    data = json.loads((sweep.folder / "results.json").read_text(encoding="utf-8"))
    cells: dict[str, dict[int, float]] = {}
    for row in data["cells"]:
        cells.setdefault(row["label"], {})[row["seed"]] = row["values"][FIGURE]
    arms = {
        label: {metric: row[metric] for metric in (FIGURE, "success")}
        for label, row in data["labels"].items()
    }
    claims = {name: claim(cells, *pair) for name, pair in CLAIMS.items()}
    result = {"seeds": len(sweep.seeds), "arms": arms, "claims": claims}
    write(out, "mixing", result, page(result), as_json=False)
    (out / "mixing.svg").write_text(plot(arms), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
