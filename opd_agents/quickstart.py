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
from opd_agents.config import Local, RunConfig, load_config
from opd_agents.credit import assign_credit, with_tokens
from opd_agents.evaluation import load_suite, run_suite, summarise, table
from opd_agents.evaluation.contestants import Contestant, load_contestant
from opd_agents.frozen import frozen_terms
from opd_agents.policies.models import load_model
from opd_agents.report import write_report
from opd_agents.runs import latest_checkpoint, save_trajectories, trajectory_row, write_whole
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

    What ``output`` holds of this quickstart already is not trained again: an interrupted one goes on, and
    ``compare`` adds its arms to a finished one. Raises RunFolderError where ``output`` holds another run.
    """
    started = time.perf_counter()
    config = load_config("quickstart", f"seed={seed}", f"output={output}")
    seconds = _seconds_spent(output)  # by an earlier call
    train(config, resume=True)
    cold, distilled = (stage.folder for stage in config.stages.values())
    teacher = config.stages["opd"].teacher
    assert isinstance(teacher, Local) and teacher.model is not None  # the shipped config has one
    checkpoints = {
        "teacher": Path(teacher.model),
        "student_before": latest_checkpoint(cold),
        "student_after": latest_checkpoint(distilled),
    }
    for name, experiment in ARMS.items() if compare else ():
        arm = _train_arm(experiment, config, cold, distilled, output / name)
        checkpoints[name] = latest_checkpoint(arm)
    policies = _evaluate(config, checkpoints, output)
    seconds += time.perf_counter() - started
    summary = {"name": config.name, "seconds": round(seconds, 1), "policies": policies}
    write_whole(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    rows = [{"policy": name} | row for name, row in policies.items()]
    console = Console()
    console.print(table({"suite": "OrderDesk, test tasks", "policies": rows}))
    console.print(f"{seconds:.0f} s in all.")
    return write_report([output])


def _seconds_spent(output: Path) -> float:
    """Seconds of all training that is finished below ``output``."""
    return sum(json.loads(path.read_text())["seconds"] for path in output.glob("*/summary.json"))


def _train_arm(experiment: str, config: RunConfig, cold: Path, distilled: Path, output: Path) -> Path:
    """Another method from the same cold start, stopped at the distilled student's FLOPs."""
    flops = json.loads((distilled / "summary.json").read_text())["total/flops"]
    start = f"student.model={latest_checkpoint(cold).resolve()}"
    overrides = (start, f"trainer.flops={flops}", f"seed={config.seed}", f"output={output}")
    return train(load_config(experiment, *overrides), resume=True)


def _evaluate(config: RunConfig, checkpoints: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Every policy on the same held-out test tasks; trajectories with the teacher's KL per turn."""
    suite = load_suite("orderdesk")
    rows: dict[str, Any] = {}
    for name, source in {"expert": "expert", **{k: str(v) for k, v in checkpoints.items()}}.items():
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
    """Trajectories for the report; those of a student with KL(student || teacher) of every token."""
    credits: list[Any] = [[] for _ in trajectories]
    if contestant.chat is not None and name != "teacher":
        packed = pack(trajectories)
        student = load_model(str(checkpoints[name]), "float32")
        signal = LocalTeacher(str(checkpoints["teacher"]), contestant.chat).score(packed, 16384)
        frozen = frozen_terms(student, packed, {"teacher": signal}, 1.0, 16384)
        credits = with_tokens(
            packed, trajectories, assign_credit(packed, trajectories, frozen, {}, {}), frozen
        )
    save_trajectories(output, f"eval-{name}", map(trajectory_row, trajectories, credits))
