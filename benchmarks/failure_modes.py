"""E5: the runs of failure_modes.yaml, the alarms that they rang, and what became of the claims.

    python benchmarks/failure_modes.py [--jobs 1]

Writes failure_modes.json, .md and .svg; cells that are finished are not trained again.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, TypeAlias

import typer
from figures import keep, markdown, over_seeds, plus_minus, svg, verdict
from safetensors.torch import load_file, save_file
from sweep import Cell, load_sweep

from opd_agents.alarms import WINDOW, read_alarms
from opd_agents.config import load_config
from opd_agents.report.reading import number
from opd_agents.runs import read_metrics
from opd_agents.trainer import train

HERE = Path(__file__).parent
SWEEP = HERE / "failure_modes.yaml"
SHARPER = 6  # times the logits of the teacher that knows the odds
SEEN = 0.8  # of the seeds
ABOVE = {  # figure, one, other
    "1a start above OPD": ("success", "slip_start", "slip_opd"),
    "1c scope above OPD": ("success", "slip_scope", "slip_opd"),
    "1d trust above OPD": ("success", "slip_trust", "slip_opd"),
    "2b verified SCoRe above OPD": ("success", "slip_verified", "slip_opd"),
    "2c verified SCoRe above own successes": ("success", "slip_verified", "slip_successes"),
    "3a start above GRPO": ("pass@8", "vault_start", "vault_grpo"),
    "3c reverse KL above GRPO": ("pass@8", "vault_reverse_kl", "vault_grpo"),
    "3d JSD above reverse KL": ("pass@8", "vault_jsd", "vault_reverse_kl"),
    "4a OPD above its start": ("calibration error", "safe_opd", "safe_opd, first steps"),
    "4c OPD above temperature-aware": ("calibration error", "safe_opd", "safe_aware"),
    "5b frontier above rounds": ("success", "free_frontier", "free_rounds"),
    "5c rewarded above rounds": ("success", "free_rewarded", "free_rounds"),
}
RINGS = {
    "1b flawed_prefix": "slip_opd",
    "2a derailed_turns": "slip_opd",
    "3b diversity_collapse": "vault_grpo",
    "4b calibration_gap": "safe_opd",
    "5a saturation": "free_rounds",
}
FIGURES = {"slip": "success", "vault": "pass@8", "safe": "calibration error", "free": "success"}  # by world
Figures: TypeAlias = Mapping[str, float]
Arms: TypeAlias = Mapping[str, Mapping[int, Figures]]  # by label and seed


def teachers(folder: Path) -> None:
    """One that learned on the track alone, one that knows the odds where two keys fit, and one where one
    fits, with its logits ``SHARPER`` times as large."""
    vault, odds = str(HERE / "failure_modes_vault_start.yaml"), folder / "odds_teacher"
    train(
        load_config(str(HERE / "failure_modes_chain_start.yaml"), f"output={folder / 'chain_teacher'}"),
        resume=True,
    )
    train(load_config(vault, f"output={folder / 'vault_teacher'}"), resume=True)
    one_fits = "environments=[{id: benchmarks/Vault-v0, options: {fits: 1}}]"
    tokenizer = f"student.build.tokenizer={folder / 'vault_teacher'}"
    train(load_config(vault, one_fits, tokenizer, f"output={odds}"), resume=True)
    sharp = folder / "sharp_teacher"
    if not sharp.exists():
        shutil.copytree(odds, folder / "sharpening", dirs_exist_ok=True)
        for file in (folder / "sharpening").rglob("model.safetensors"):
            weights = load_file(odds / file.relative_to(folder / "sharpening"))
            weights["lm_head.weight"] *= SHARPER
            save_file(weights, file, metadata={"format": "pt"})
        (folder / "sharpening").rename(sharp)


def figures(cell: Cell) -> tuple[Figures, Figures]:
    """Of the student in the end, on test tasks, and of its first steps; the calibration error is of its own
    episodes, the mean of `WINDOW` steps."""
    found = json.loads((cell.folder / "cell.json").read_text(encoding="utf-8"))["evaluation"]
    errors = [row["calibration/ece"] for row in read_metrics(cell.folder) if "calibration/ece" in row]
    known = {
        "success": found["success"],
        "pass@8": found["pass_at"].get("8"),
        "calibration error": mean(errors[-WINDOW:]) if errors else None,
    }
    first = {"calibration error": mean(errors[:WINDOW]) if errors else math.nan}
    return {name: math.nan if number(value) is None else value for name, value in known.items()}, first


def claim(arms: Arms, figure: str, one: str, other: str) -> dict[str, Any]:
    """The paired difference over the seeds, and its verdict."""
    return verdict([arms[one][seed][figure] - arms[other][seed][figure] for seed in sorted(arms[one])])


def page(result: Mapping[str, Any]) -> str:
    """The arms, then the claims."""
    rows = []
    for label, row in result["arms"].items():
        rung = ", ".join(f"{name} {times}" for name, times in sorted(row["alarms"].items()))
        figure = FIGURES[label.partition("_")[0]]
        rows.append(
            {"arm": label, "figure": figure, "value": plus_minus(row["value"]), "alarms": rung or "-"}
        )
    about = (
        "What was predicted, and the rules, stand in benchmarks/failure_modes.yaml. Mean and 95 % t-interval"
        " over seeds, and with how many seeds an alarm rang."
    )
    lines = ["![figures of the arms, by world](failure_modes.svg)", ""]
    lines += [
        f"- {name}, {one['figure']}: **{one['verdict']}**, difference {plus_minus(one)}"
        f" ({one['seeds']} seeds)."
        for name, one in result["claims"].items()
    ]
    lines += [
        f"- {name} sees {one['arm']}: **{one['verdict']}**, with {one['rang']} of {result['seeds']} seeds."
        for name, one in result["alarms"].items()
    ]
    return markdown(about, result, rows) + "\n" + "\n".join(lines) + "\n"


def plot(arms: Arms) -> str:
    """SVG: a panel a world, its figure of every seed, and the mean."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (world, name) in zip(drawn.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        labels = [label for label in arms if label.startswith(f"{world}_")]
        for place, label in enumerate(labels):
            values = [row[name] for row in arms[label].values()]
            axes.plot([place] * len(values), values, "o", color="C0", alpha=0.4)
            axes.plot([place - 0.25, place + 0.25], [mean(values)] * 2, color="C0")
        names = [label.partition("_")[2].replace("_", " ") for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=30, ha="right")
        axes.set(title=f"{world}: {name}", ylim=(0, 1.02))
        axes.grid(alpha=0.3, axis="y")
    return svg(drawn, "failure_modes")


def main(
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Where failure_modes.* go.")] = Path("benchmarks/results"),
) -> None:
    """Train what is missing, and say what was found."""
    teachers(Path("runs/failure_modes"))
    command = [sys.executable, str(HERE / "sweep.py"), str(SWEEP), "--jobs", str(jobs)]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise typer.Exit(code)
    sweep, cells = load_sweep(SWEEP)
    arms: dict[str, dict[int, Figures]] = {}
    rung: dict[str, Counter[str]] = {}
    for cell in cells:
        end, first = figures(cell)
        arms.setdefault(cell.label, {})[cell.seed] = end
        arms.setdefault(f"{cell.label}, first steps", {})[cell.seed] = first
        rung.setdefault(cell.label, Counter()).update({alarm.name for alarm in read_alarms(cell.folder)})
    seen = {name: rung[label][name.split()[1]] for name, label in RINGS.items()}
    result = {
        "seeds": len(sweep.seeds),
        "arms": {
            label: {
                "value": over_seeds([row[FIGURES[label.partition("_")[0]]] for row in arms[label].values()]),
                "alarms": dict(rung[label]),
            }
            for label in sweep.runs
        },
        "claims": {name: claim(arms, *one) | {"figure": one[0]} for name, one in ABOVE.items()},
        "alarms": {
            name: {
                "arm": RINGS[name],
                "rang": times,
                "verdict": "seen" if times >= SEEN * len(sweep.seeds) else "not seen",
            }
            for name, times in seen.items()
        },
    }
    keep(out, "failure_modes", result, page(result))
    (out / "failure_modes.svg").write_text(
        plot({label: arms[label] for label in sweep.runs}), encoding="utf-8"
    )
    print(page(result), end="")


if __name__ == "__main__":
    typer.run(main)
