"""The one trainer: task -> rollout -> trajectory -> teacher signal -> credit -> loss -> update."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_agents import envs
from opd_agents.config import RunConfig
from opd_agents.distributed import World, join_world
from opd_agents.errors import BudgetSpent
from opd_agents.evaluation import load_suite, run_suite, summarise
from opd_agents.evaluation.contestants import model_contestant
from opd_agents.evaluation.results import versions
from opd_agents.experience import credit, score, with_likeness
from opd_agents.playing import Play, play_behind, play_step
from opd_agents.probing import refuse_misaligned
from opd_agents.progress import Interrupted, StopSignal, progress_bar
from opd_agents.repairing import with_repairs
from opd_agents.rollout import rollout
from opd_agents.runs import BEST, RunFolder, latest_checkpoint, read_metrics
from opd_agents.session import Session
from opd_agents.starting import check_inputs, load_session
from opd_agents.step_metrics import step_metrics, trajectory_rows
from opd_agents.trackers import tracking
from opd_agents.types import Actor, Trajectory
from opd_agents.updates import update, update_discriminator


def train(config: RunConfig, *, resume: bool = False, probes: bool = True) -> Path:
    """Train one run, with its stages in order; returns its folder. Raises UserError before any work is lost.

    ``resume`` goes on from the newest checkpoint, starts a run that does not exist yet, and leaves a finished
    one as it is. With ``probes`` a stage that begins looks first whether all see the same tokens, and raises
    AlignmentError where not. Started by torchrun or `accelerate launch`, processes train one run together.
    """
    world = join_world()
    with world.errors_told_once():
        envs.import_plugins(config.imports)
        for stage in config.stages.values() or [config]:
            check_inputs(stage)
        return (_train_stages if config.stages else _train_stage)(config, resume, probes, world)


def _train_stages(config: RunConfig, resume: bool, probes: bool, world: World) -> Path:
    folder = _open_folder(config, resume, world)
    previous: Path | None = None
    summaries = {}
    for name, stage in config.stages.items():
        if previous is not None:
            start = {"model": str(latest_checkpoint(previous).resolve()), "build": None}
            stage = stage.model_copy(update={"student": stage.student.model_copy(update=start)})
        previous = _train_stage(stage, resume, probes, world)
        summaries[name] = json.loads((previous / "summary.json").read_text())
    seconds = sum(summary["seconds"] for summary in summaries.values())
    folder.write_summary({"name": config.name, "stages": summaries, "seconds": seconds})
    return folder.path


def train_seeds(
    config: RunConfig, seeds: Sequence[int], *, resume: bool = False, probes: bool = True
) -> list[Path]:
    """The same run once per seed, each in ``<output>/seed-N``."""
    return [train(reseeded(config, seed), resume=resume, probes=probes) for seed in seeds]


def reseeded(config: RunConfig, seed: int) -> RunConfig:
    folder = config.folder / f"seed-{seed}"
    stages = {
        name: stage.model_copy(update={"seed": seed, "output": str(folder / name)})
        for name, stage in config.stages.items()
    }
    return config.model_copy(update={"seed": seed, "output": str(folder), "stages": stages})


def _open_folder(config: RunConfig, resume: bool, world: World) -> RunFolder:
    """The main rank makes the folder, before the others look at it."""
    if not world.is_main:
        world.wait()
    folder = RunFolder(config.folder, config.model_dump(mode="json"), resume=resume, writes=world.is_main)
    if world.is_main:
        world.wait()
    return folder


def _train_stage(config: RunConfig, resume: bool, probes: bool, world: World) -> Path:
    folder = _open_folder(config, resume, world)
    if (folder.path / "summary.json").is_file():  # written last: the run is finished
        return folder.path
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    session = load_session(config, folder, world)
    if probes and session.step == 0:
        refuse_misaligned(session)
    told = max((row["step"] for row in read_metrics(folder.path)), default=0)
    folder.truncate(session.step)
    trainer = config.trainer
    with (
        closing(session.references),
        StopSignal(tells=world.is_main) as stop,
        progress_bar(config, session.step, read_metrics(folder.path), shown=world.is_main) as bar,
        tracking(config, session.step, told, world) as track,
    ):
        if config.evaluation and config.evaluation.at_start and session.step == 0:
            session.evaluation_at_start = evaluate_session(session)
        while session.end is None:
            row = _affordable_step(session)
            folder.log(row)
            bar.update(row)
            track(row)
            stopped = any(world.gather(stop.requested))
            if session.step % trainer.checkpoint_every == 0 or stopped:
                _save_checkpoint(session)
            if stopped:
                raise Interrupted(
                    f"Stopped after step {session.step}; its checkpoint is written. "
                    f"The same command goes on from there, `train` with --resume ({folder.path})."
                )
    if config.evaluation and session.step % config.evaluation.every:
        session.evaluation = evaluate_session(session)
    _save_checkpoint(session)
    totals = {f"total/{key}": value for key, value in session.totals.items()}
    summary = {
        "name": config.name, "steps": session.step, "seconds": session.totals["seconds"],
        "evaluation_at_start": session.evaluation_at_start, "evaluation": session.evaluation,
        "best": _best(folder), "ended": session.end, "parameters": session.parameters,
        "versions": versions(), **totals,
    }  # fmt: skip
    folder.write_summary(summary)
    world.wait()  # a next stage starts from what is written
    return folder.path


def _affordable_step(session: Session) -> dict[str, Any]:
    """A step. Where the budget of an API ends in it the checkpoint is that of the step before, which it has
    not changed: all that is asked for is asked for before the updates."""
    totals = dict(session.totals)
    try:
        return train_step(session)
    except BudgetSpent as error:
        kept = "the newest checkpoint"
        if session.world.size == 1 and session.step:  # other ranks are not here
            session.totals = totals
            _save_checkpoint(session)
            kept = f"the checkpoint of step {session.step}"
        raise BudgetSpent(
            f"{error} Stopped in step {session.step + 1}; {kept} and all answers are kept in "
            f"{session.folder.path}. The same command goes on from there with a larger budget, such as "
            "teacher.endpoint.max_cost=20, and --resume; what was answered is not paid for again."
        ) from None


def _save_checkpoint(session: Session) -> None:
    """The main rank writes what all have."""
    write = partial(session.save, optimizer_state=session.optimizer_state())
    session.folder.save_checkpoint(session.step, write, session.config.trainer.keep_last)


def _best(folder: RunFolder) -> dict[str, Any] | None:
    """Where the best weights are, for the summary."""
    best = folder.best()
    keys = ("step", "success", "success_greedy")
    return None if best is None else {"folder": BEST} | {key: best[key] for key in keys}


def train_step(session: Session) -> dict[str, Any]:
    """One rollout batch and its updates; returns the step's metrics."""
    started, before, config = time.perf_counter(), dict(session.totals), session.config
    play = partial(
        rollout, make=envs.launch, chat=session.chat, limits=session.limits,
        temperature=config.rollout.temperature,
    )  # fmt: skip
    played = play_step(
        config, session.step, session.task_counts, source_play(session, play),
        partial(play, policy=session.demonstrator), session.world, session.judge, session.known,
    )  # fmt: skip
    trajectories, otherwise = played.trajectories, session.alternatives(played.trajectories)
    if session.recordings is not None:
        trajectories = sorted(trajectories + session.recordings.draw(session.step), key=lambda t: t.uid)
    said = played.judged.feedback + otherwise.preferred.feedback
    scored = score(session, [*trajectories, *otherwise.trajectories], said, otherwise.agreement)
    session.count(sampled_for="rollout")
    experience = with_likeness(session, with_repairs(session, scored))
    assigned, scheduled = session.world.from_main(lambda: credit(session, experience)), session.scheduled()
    losses = update(session, experience, assigned)
    told_apart = update_discriminator(session, experience)
    session.advance(
        generated_tokens=played.generated_tokens,
        correction_tokens=experience.locating_tokens + sum(repair.tokens for repair in experience.repairs),
    )
    session.folder.save_trajectories(session.step, trajectory_rows(experience, assigned.credits))
    _save_transcript(session)
    seconds = time.perf_counter() - started
    row = step_metrics(session, experience, assigned, losses, before, seconds)
    row |= played.metrics(config) | (otherwise.metrics() if config.rollout.alternatives else {}) | scheduled
    row |= told_apart | session.remember(played.trajectories + played.discarded)
    if config.evaluation and session.step % config.evaluation.every == 0:
        session.evaluation = evaluate_session(session)
        row |= session.evaluation_row()
    session.adapt(row)
    session.totals["seconds"] += time.perf_counter() - started
    return row


def source_play(session: Session, play: Callable[..., list[Trajectory]]) -> Play:
    """Who plays the step's episodes."""
    beginning = session.config.rollout.beginning
    if beginning is None:
        return partial(play, policy=session.behaviour)
    left = int(session.at(beginning.left))
    return partial(play_behind, first=session.beginner, then=session.behaviour, left=left, play=play)


def _save_transcript(session: Session) -> None:
    """What the step asked of APIs, of all ranks, the first rank's first."""
    if clients := session.references.clients:
        exchanges = [one for client in clients for one in client.take_transcript()]
        everyones = session.world.gather(exchanges)
        session.folder.save_transcript(session.step, [one for part in everyones for one in part])


def evaluate_session(session: Session) -> dict[str, Any]:
    """The current weights on the validation tasks; those that beat all before them are kept in ``best/``, the
    weights at the start included."""
    settings = session.config.evaluation
    if settings is None:
        return {}
    suite = load_suite(settings.suite)
    contestant = model_contestant("student", session.model, session.chat, suite.temperature, Actor.STUDENT)
    sampled, greedy = run_suite(
        contestant, suite, split=settings.split, limit=settings.limit, world=session.world
    )
    result, key = summarise(sampled, greedy), session.config.trainer.keep_best
    if key is not None and session.world.is_main:
        best = session.folder.best()
        if best is None or result[key] > best[key]:
            session.folder.save_best({"step": session.step} | result, session.save_weights)
    return result
