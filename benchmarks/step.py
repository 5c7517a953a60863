"""A whole training step (rollouts, teacher, loss, update) against TRL's `DistillationTrainer`.

    python benchmarks/step.py [--episodes 16] [--turns 4] [--repeats 3] [--threads 1] [--json]

Both distil the full-vocabulary reverse KL into the same scripted student (scripted.py), whose episodes of one
tool call a turn are certain, so that both train on the same ids. Each arm runs in processes of its own, the
arms alternating. The first step is for warming up; its losses must agree. Peak memory is the process's, less
what it held before it loaded the models.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from figures import as_text, markdown, spread, write
from scripted import Queue, TrlQueue, recited, rows, scripted_model

import opd_agents as opd
from opd_agents.policies.models import build_model, save_checkpoint

Arm = Literal["opd-agents", "TRL"]
ARMS: tuple[Arm, ...] = ("opd-agents", "TRL")
FILLER = 8000  # further vocabulary entries: a projection that costs something
SHAPE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 16, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
STEPS, TOLERANCE = 3, 1e-4  # of a process; of the loss, in nats
LEARNING_RATE = 1e-6


class StatelessQueue(Queue):
    """TRL's distillation knows functions as tools, but no environments: every answer is the same."""

    def __init__(self, turns: int = 4) -> None:
        super().__init__(recited(FILLER), turns)

    def _next_order(self, note: str) -> str:
        return self.texts.observation(0, 0)


def build(folder: Path) -> None:
    """The checkpoints of both arms: the scripted student, and a random teacher of the same vocabulary."""
    tokenizer = recited(FILLER).tokenizer
    save_checkpoint(folder / "student", scripted_model(tokenizer, **SHAPE), tokenizer, {})
    save_checkpoint(folder / "teacher", build_model("llama", SHAPE, tokenizer, seed=1), tokenizer, {})


def run_ours(folder: Path, episodes: int, turns: int) -> tuple[list[float], list[float], int]:
    """Seconds and loss of each step, and the action tokens of one."""
    opd.register("bench/Queue-v0", "step:StatelessQueue")
    from opd_agents.runs import RunFolder
    from opd_agents.starting import load_session
    from opd_agents.trainer import train_step

    config = opd.load_config(
        {
            "name": "bench",
            "output": tempfile.mkdtemp(dir=folder),
            "method": "gkd",
            "student": {"model": str(folder / "student")},
            "teacher": {"model": str(folder / "teacher")},
            "environments": [{"id": "bench/Queue-v0", "options": {"turns": turns}, "limit": episodes}],
            "rollout": {"episodes_per_step": episodes},
            "trainer": {
                "learning_rate": LEARNING_RATE,
                "micro_batch_tokens": 10**6,
                "tensorboard": False,
                "gradient_shares_every": 10**6,  # the first step, which is not counted, measures them
            },
        }
    )
    session = load_session(config, RunFolder(config.folder, config.model_dump(mode="json"), resume=False))
    seconds, losses, tokens = [], [], 0
    for _ in range(STEPS):
        started = time.perf_counter()
        row = train_step(session)
        seconds.append(time.perf_counter() - started)
        losses.append(row["loss"])
        tokens = int(row["rollout/generated_tokens"])
    return seconds, losses, tokens


def run_trl(folder: Path, episodes: int, turns: int) -> tuple[list[float], list[float], int]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.started: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())

    texts, clock = recited(FILLER), Clock()

    def next_order(note: str):  # type: ignore[no-untyped-def]
        return texts.observation(0, 0)

    next_order.__doc__ = TrlQueue.next_order.__doc__
    settings = DistillationConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=episodes, max_steps=STEPS, beta=1.0,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_completion_length=8192,
        temperature=1.0, top_k=0, max_tool_calling_iterations=turns - 1, gradient_checkpointing=False,
        logging_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        shuffle_dataset=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "student"),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher"), args=settings,
        train_dataset=Dataset.from_list(rows(texts, episodes)), tools=[next_order], callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    # a step begins with its rollouts, which come before the callback: from the end of the one before
    seconds = [b - a for a, b in zip([clock.started[0], *clock.ended], clock.ended, strict=False)]
    tokens = round(logged[-1]["completions/mean_length"] * episodes)
    return seconds, [row["loss"] for row in logged], tokens


def worker(arm: Arm, folder: Path, episodes: int, turns: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, losses, tokens = (run_ours if arm == "opd-agents" else run_trl)(folder, episodes, turns)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds[1:], "losses": losses, "action_tokens": tokens, "peak_mib": (peak - before) / 1024,
    }  # fmt: skip


def fresh_process(arm: Arm, folder: Path, episodes: int, turns: int, threads: int) -> dict[str, Any]:
    """What :func:`worker` gives in a process of its own."""
    command = [sys.executable, __file__, "--worker", arm, "--folder", str(folder)]
    command += ["--episodes", str(episodes), "--turns", str(turns), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(
    episodes: int, turns: int, repeats: int, threads: int, run: Callable[..., dict[str, Any]] = fresh_process
) -> dict[str, Any]:
    """Both arms, alternating; asserts that they train on the same."""
    load, runs = os.getloadavg()[0], {arm: list[dict[str, Any]]() for arm in ARMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        for repeat in range(repeats):
            for arm in ARMS[:: -1 if repeat % 2 else 1]:
                runs[arm].append(run(arm, folder, episodes, turns, threads))
    ours, theirs = runs["opd-agents"], runs["TRL"]
    gap = abs(ours[0]["losses"][0] - theirs[0]["losses"][0])
    assert gap < TOLERANCE, (ours[0]["losses"], theirs[0]["losses"])
    assert ours[0]["action_tokens"] == theirs[0]["action_tokens"], (ours[0], theirs[0])
    per_run = {arm: [median(run["seconds"]) for run in runs[arm]] for arm in ARMS}
    ratios = [b / a for a, b in zip(per_run["opd-agents"], per_run["TRL"], strict=True)]
    memory = {arm: [run["peak_mib"] for run in runs[arm]] for arm in ARMS}
    return {
        "episodes": episodes, "turns": turns, "action tokens": ours[0]["action_tokens"], "repeats": repeats,
        "loss": ours[0]["losses"][0], "loss gap": gap, "torch": torch.__version__, "threads": threads,
        "cores": os.cpu_count(), "load before": round(load, 2), "load after": round(os.getloadavg()[0], 2),
        "seconds": {arm: spread(per_run[arm]) for arm in ARMS},
        "peak_mib": {arm: spread(memory[arm]) for arm in ARMS},
        "trl_seconds_over_ours": spread(ratios),
    }  # fmt: skip


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    table = [
        {
            "arm": arm, "seconds a step": as_text(result["seconds"][arm]),
            "TRL takes, times ours": as_text(result["trl_seconds_over_ours"]) if arm == "TRL" else "",
            "peak memory, MiB": as_text(result["peak_mib"][arm], digits=0),
        }
        for arm in ARMS
    ]  # fmt: skip
    return markdown("Median (min to max) over processes.", result, table)


def main(
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of a step.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="Turns of an episode.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each arm.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Where step.json and step.md go.")] = Path("benchmarks/results"),
    arm: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Seconds and peak memory of a training step, this project's and TRL's."""
    if arm in ARMS and folder is not None:
        print(json.dumps(worker(arm, folder, episodes, turns, threads)))
        return
    result = measure(episodes, turns, repeats, threads)
    write(out, "step", result, page(result), as_json)


if __name__ == "__main__":
    typer.run(main)
