"""The quickstart: cold-start a small student, distil it on-policy, and measure what that changed.

Everything that trains is a config of the one trainer (`configs/experiments/quickstart*.yaml`); this module
only runs them in order, evaluates on the same test tasks, and writes summary and report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from opd_agents.batch import pack
from opd_agents.config import RunConfig, load_config
from opd_agents.credit import assign_credit, frozen_terms
from opd_agents.evaluation import load_suite, run_suite, summarise, table
from opd_agents.evaluation.evaluate import Contestant, load_contestant
from opd_agents.policies.models import load_model
from opd_agents.report import write_report
from opd_agents.runs import latest_checkpoint, save_trajectories, write_whole
from opd_agents.teachers.local import LocalTeacher
from opd_agents.trainer import train
from opd_agents.types import Trajectory

# Arm of --compare: the experiment that trains it, from the cold start with the distilled student's FLOPs.
ARMS = {
    "student_sft": "quickstart_sft",
    "student_sft_fresh": "quickstart_sft_fresh",
    "student_opd": "quickstart_opd",
    "student_grpo": "quickstart_grpo",
}


def run(output: Path, seed: int, compare: bool) -> Path:
    """Train, compare, evaluate on test tasks, report; returns the path of the report.

    Raises RunFolderError where ``output`` holds a run already.
    """
    started = time.perf_counter()
    config = load_config("quickstart", f"seed={seed}", f"output={output}")
    train(config)
    cold, distilled = (stage.folder for stage in config.stages.values())
    checkpoints = {
        "teacher": Path(str(config.stages["opd"].teacher.model)),  # type: ignore[union-attr]
        "student_before": latest_checkpoint(cold),
        "student_after": latest_checkpoint(distilled),
    }
    if compare:
        for name, experiment in ARMS.items():
            checkpoints[name] = latest_checkpoint(
                _train_arm(experiment, config, cold, distilled, output / name)
            )
    policies = _evaluate(config, checkpoints, output)
    summary = {"name": config.name, "seconds": round(time.perf_counter() - started, 1), "policies": policies}
    write_whole(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    report = write_report([output])
    console = Console()
    console.print(
        table({"suite": "OrderDesk", "policies": [{"policy": n} | row for n, row in policies.items()]})
    )
    console.print(f"{summary['seconds']:.0f} s in all. Learning curves and episodes turn by turn: {report}")
    return report


def _train_arm(experiment: str, config: RunConfig, cold: Path, distilled: Path, output: Path) -> Path:
    """Another method from the same cold start, stopped at the distilled student's FLOPs."""
    flops = json.loads((distilled / "summary.json").read_text())["total/flops"]
    overrides = (f"student.model={latest_checkpoint(cold)}", f"trainer.flops={flops}", f"seed={config.seed}")
    return train(load_config(experiment, *overrides, f"output={output}"))


def _evaluate(config: RunConfig, checkpoints: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Every policy on the same held-out test tasks; trajectories with the teacher's KL per turn."""
    suite = load_suite("orderdesk")
    rows: dict[str, Any] = {}
    contestants = {"expert": "expert"} | {name: str(path) for name, path in checkpoints.items()}
    for name, source in contestants.items():
        contestant = load_contestant(source, suite.temperature)
        sampled, greedy = run_suite(contestant, suite, split="test", seed=config.seed)
        rows[name] = summarise(sampled, greedy) | _cost(name, checkpoints)
        _save(output, name, sampled, contestant, checkpoints)
    return rows


def _cost(name: str, checkpoints: Mapping[str, Path]) -> dict[str, Any]:
    """What making a policy cost: its own training and, for a student, the cold start before it."""
    parts = [name] if name in ("expert", "teacher", "student_before") else ["student_before", name]
    totals = [
        json.loads((checkpoints[p] / "trainer.json").read_text())["totals"] for p in parts if p in checkpoints
    ]
    keys = ("generated_tokens", "teacher_tokens", "flops", "seconds")
    return {key: sum(total[key] for total in totals) for key in keys}


def _save(
    output: Path,
    name: str,
    trajectories: list[Trajectory],
    contestant: Contestant,
    checkpoints: Mapping[str, Path],
) -> None:
    """Trajectories for the report; those of a student with KL(student || teacher) of every action."""
    credits: list[Any] = [[] for _ in trajectories]
    if contestant.chat is not None and name != "teacher":
        packed = pack(trajectories)
        signal = LocalTeacher(str(checkpoints["teacher"]), contestant.chat).score(packed, 16384)
        frozen = frozen_terms(load_model(str(checkpoints[name]), "float32"), packed, signal, 1.0, 16384)
        credits = assign_credit(packed, trajectories, frozen, {}, {})
    rows = (
        {"trajectory": t, "credit": c, "repair": None} for t, c in zip(trajectories, credits, strict=True)
    )
    save_trajectories(output, f"eval-{name}", rows)
