"""The one trainer: task -> rollout -> trajectory -> teacher signal -> credit -> loss -> update."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from opd_agents import envs
from opd_agents.config import RunConfig
from opd_agents.evaluation import load_suite, run_suite, summarise
from opd_agents.evaluation.evaluate import model_contestant
from opd_agents.experience import credit, score, with_repairs
from opd_agents.progress import Interrupted, StopSignal, progress_bar
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder, latest_checkpoint, save_trajectories, write_whole
from opd_agents.session import Session, check_inputs, load_session
from opd_agents.step_metrics import step_metrics, trajectory_rows
from opd_agents.tasks import draw_episodes
from opd_agents.types import Actor
from opd_agents.updates import update


def train(config: RunConfig, *, resume: bool = False) -> Path:
    """Train one run, with its stages in order; returns its folder. Raises UserError before any work is lost.

    ``resume`` goes on from the newest checkpoint, starts a run that does not exist yet, and leaves a finished
    one as it is.
    """
    envs.import_plugins(config.imports)
    for stage in config.stages.values() or [config]:
        check_inputs(stage)
    if not config.stages:
        return _train_stage(config, resume)
    RunFolder(config.folder, config.model_dump(mode="json"), resume=resume)
    previous: Path | None = None
    summaries = {}
    for name, stage in config.stages.items():
        if previous is not None:
            start = {"model": str(latest_checkpoint(previous).resolve()), "build": None}
            stage = stage.model_copy(update={"student": stage.student.model_copy(update=start)})
        previous = _train_stage(stage, resume)
        summaries[name] = json.loads((previous / "summary.json").read_text())
    seconds = sum(summary["seconds"] for summary in summaries.values())
    summary = {"name": config.name, "stages": summaries, "seconds": seconds}
    write_whole(config.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return config.folder


def train_seeds(config: RunConfig, seeds: Sequence[int], *, resume: bool = False) -> list[Path]:
    """The same run once per seed, each in ``<output>/seed-N``."""
    return [train(reseeded(config, seed), resume=resume) for seed in seeds]


def reseeded(config: RunConfig, seed: int) -> RunConfig:
    folder = config.folder / f"seed-{seed}"
    stages = {
        name: stage.model_copy(update={"seed": seed, "output": str(folder / name)})
        for name, stage in config.stages.items()
    }
    return config.model_copy(update={"seed": seed, "output": str(folder), "stages": stages})


def _train_stage(config: RunConfig, resume: bool) -> Path:
    folder = RunFolder(config.folder, config.model_dump(mode="json"), resume=resume)
    if (folder.path / "summary.json").is_file():  # written last: the run is finished
        return folder.path
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    session = load_session(config, folder)
    folder.truncate(session.step)
    trainer, limit = config.trainer, config.trainer.flops
    with (
        StopSignal() as stop,
        progress_bar(config, session.step) as bar,
        _tensorboard(config, session.step) as board,
    ):
        if config.evaluation and config.evaluation.at_start and session.step == 0:
            session.evaluation_at_start = evaluate_session(session)
        while session.step < trainer.steps and (limit is None or session.totals["flops"] < limit):
            row = train_step(session)
            folder.log(row)
            bar.update(row)
            if board is not None:
                for key, value in row.items():
                    if isinstance(value, (int, float)):
                        board.add_scalar(key, value, session.step)
            if session.step % trainer.checkpoint_every == 0 or stop.requested:
                folder.save_checkpoint(session.step, session.save, trainer.keep_last)
            if stop.requested:
                raise Interrupted(
                    f"Stopped after step {session.step}; its checkpoint is written. "
                    f"The same command goes on from there, `train` with --resume ({folder.path})."
                )
    if config.evaluation and session.step % config.evaluation.every:
        session.evaluation = evaluate_session(session)
    folder.save_checkpoint(session.step, session.save, trainer.keep_last)
    totals = {f"total/{key}": value for key, value in session.totals.items()}
    summary = {
        "name": config.name, "steps": session.step, "seconds": session.totals["seconds"],
        "evaluation_at_start": session.evaluation_at_start, "evaluation": session.evaluation, **totals,
    }  # fmt: skip
    write_whole(folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    return folder.path


def train_step(session: Session) -> dict[str, Any]:
    """One rollout batch and its updates; returns the step's metrics."""
    started, before, config = time.perf_counter(), dict(session.totals), session.config
    episodes = draw_episodes(config, session.step, session.task_counts)
    trajectories = rollout(
        episodes, session.behaviour, make=envs.make, chat=session.chat, limits=session.limits,
        temperature=config.rollout.temperature,
    )  # fmt: skip
    experience = with_repairs(session, score(session, trajectories))
    rewards, credits = credit(config.loss.components, experience)
    losses = update(session, experience, rewards)
    session.advance(
        generated_tokens=sum(t.n_action_tokens for t in experience.rollouts),
        correction_tokens=sum(repair.tokens for repair in experience.repairs),
    )
    save_trajectories(session.folder.path, f"step-{session.step:06d}", trajectory_rows(experience, credits))
    seconds = time.perf_counter() - started
    row = step_metrics(session, experience, rewards, losses, before, seconds)
    if config.evaluation and session.step % config.evaluation.every == 0:
        session.evaluation = evaluate_session(session)
        row |= session.evaluation_row()
    session.totals["seconds"] += time.perf_counter() - started
    return row


def evaluate_session(session: Session) -> dict[str, Any]:
    """The current weights on the validation tasks."""
    settings = session.config.evaluation
    if settings is None:
        return {}
    suite = load_suite(settings.suite)
    contestant = model_contestant("student", session.model, session.chat, suite.temperature, Actor.STUDENT)
    sampled, greedy = run_suite(contestant, suite, split=settings.split, limit=settings.limit)
    return summarise(sampled, greedy)


def _tensorboard(config: RunConfig, step: int) -> Any:
    if not config.trainer.tensorboard:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.folder / "tensorboard"), purge_step=step + 1)
