"""The one trainer: task -> rollout -> trajectory -> teacher signal -> credit -> loss -> update."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_agents import envs
from opd_agents.batch import Packed, pack
from opd_agents.config import RunConfig
from opd_agents.correction import Repair, correct
from opd_agents.credit import FrozenTerms, advantages, assign_credit, check_behaviour, frozen_terms
from opd_agents.evaluation import load_suite, run_suite, summarise
from opd_agents.evaluation.evaluate import model_contestant
from opd_agents.loss import Plan, micro_losses, plan, selected
from opd_agents.policies.models import forward_flops
from opd_agents.progress import Interrupted, StopSignal, progress_bar
from opd_agents.rollout import rollout
from opd_agents.runs import RunFolder, latest_checkpoint, save_trajectories, write_whole
from opd_agents.session import Session, check_inputs, load_session
from opd_agents.step_metrics import repair_rows, step_metrics
from opd_agents.tasks import draw_episodes
from opd_agents.teachers import HiddenStates
from opd_agents.types import Actor, Trajectory


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
    session = load_session(config, folder)
    folder.truncate(session.step)
    trainer, limit = config.trainer, config.trainer.flops
    with (
        StopSignal() as stop,
        progress_bar(config, session.step) as bar,
        _tensorboard(config, session.step) as board,
    ):
        if config.evaluation and config.evaluation.at_start and session.step == 0:
            session.evaluation = evaluate_session(session)
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
                    f"The same command with --resume goes on from there ({folder.path})."
                )
    folder.save_checkpoint(session.step, session.save, trainer.keep_last)
    totals = {f"total/{key}": value for key, value in session.totals.items()}
    summary = {
        "name": config.name, "steps": session.step, "seconds": session.totals["seconds"],
        "evaluation": session.evaluation, **totals,
    }  # fmt: skip
    write_whole(folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    return folder.path


def train_step(session: Session) -> dict[str, Any]:
    """One rollout batch and its updates; returns the step's metrics."""
    started, config = time.perf_counter(), session.config
    before = dict(session.totals)
    episodes = draw_episodes(config, session.step, session.task_counts)
    trajectories = rollout(
        episodes, session.behaviour, make=envs.make, chat=session.chat, limits=session.limits,
        temperature=config.rollout.temperature,
    )  # fmt: skip
    packed = pack(trajectories)
    signal, frozen = score(session, packed, trajectories)
    repairs: list[Repair] = []
    if config.correction and session.teacher and frozen and frozen.teacher_logprob is not None:
        repairs = session_repairs(session, trajectories, packed, frozen)
        branches = [repair.branch for repair in repairs if repair.branch is not None]
        if branches and signal:
            extra = pack(branches)
            extra_signal, extra_frozen = score(session, extra, branches)
            trajectories, packed = [*trajectories, *branches], pack([*trajectories, *branches])
            if extra_signal and extra_frozen:
                signal = HiddenStates(torch.cat([signal.hidden, extra_signal.hidden]), signal.head)
                frozen = frozen.extended(extra_frozen)
    rewards = {
        name: advantages(trajectories, component.normalise)
        for name, component in config.loss.components.items()
        if component.kind == "policy"
    }
    verdicts = {(r.parent.uid, r.turn): "accepted" if r.accepted else "rejected" for r in repairs}
    credits = assign_credit(packed, trajectories, frozen, rewards, verdicts)
    losses = update(session, packed, trajectories, rewards, signal)
    session.step += 1
    session.student_sampler.reset(session.step)
    session.count(generated=sum(t.n_action_tokens for t in trajectories if t.branch is None), repairs=repairs)
    save_trajectories(
        session.folder.path,
        f"step-{session.step:06d}",
        [
            {"trajectory": t, "credit": c, "repair": repair_rows(t, repairs)}
            for t, c in zip(trajectories, credits, strict=True)
        ],
    )
    seconds = time.perf_counter() - started
    row = step_metrics(session, trajectories, packed, frozen, repairs, rewards, losses, before, seconds)
    evaluation = config.evaluation
    if evaluation and session.step % evaluation.every == 0:
        session.evaluation = evaluate_session(session)
    session.totals["seconds"] += time.perf_counter() - started
    return row | session.evaluation_row() if evaluation and session.step % evaluation.every == 0 else row


def score(
    session: Session, packed: Packed, trajectories: Sequence[Trajectory]
) -> tuple[HiddenStates | None, FrozenTerms | None]:
    """The teacher's signal and the frozen token terms, once per trajectory; the sampler is checked."""
    config = session.config
    tokens = config.trainer.micro_batch_tokens
    signal = session.teacher.score(packed, tokens) if session.teacher and session.needs_signal else None
    sampled = any(
        turn.logprobs is not None and turn.actor is Actor.STUDENT for t in trajectories for turn in t.turns
    )
    if signal is None and not sampled:
        return None, None
    frozen = frozen_terms(session.model, packed, signal, config.rollout.temperature, tokens)
    session.totals["flops"] += forward_flops(
        session.model, packed.n_tokens, packed.n_tokens / len(packed.rows) / 2
    )
    tolerance = 1e-3 if config.student.dtype == "float32" else 0.2
    check_behaviour(packed, trajectories, frozen, session.step, tolerance)
    return signal, frozen


def session_repairs(
    session: Session, trajectories: Sequence[Trajectory], packed: Packed, frozen: FrozenTerms
) -> list[Repair]:
    """Corrections within the share of generated tokens that the config grants them."""
    settings, teacher = session.config.correction, session.teacher
    if settings is None or teacher is None or frozen.teacher_logprob is None:
        return []
    rolled_out = session.totals["generated_tokens"] - session.totals["correction_tokens"]
    rolled_out += sum(t.n_action_tokens for t in trajectories)
    allowed = (
        settings.token_share / (1 - settings.token_share) * rolled_out - session.totals["correction_tokens"]
    )
    return correct(
        trajectories, packed, frozen.teacher_logprob, settings,
        stream=(session.config.seed, session.step), token_budget=allowed, student=session.student_sampler,
        teacher=teacher.greedy, make=envs.make, chat=session.chat, limits=session.limits,
        temperature=session.config.rollout.temperature,
    )  # fmt: skip


def update(
    session: Session,
    packed: Packed,
    trajectories: Sequence[Trajectory],
    rewards: Mapping[str, torch.Tensor],
    signal: HiddenStates | None,
) -> dict[str, float]:
    """``updates_per_step`` optimizer steps, each on its share of the trajectories; mean losses and norms."""
    config, components = session.config, session.config.loss.components
    weights = {name: selected(packed, trajectories, c.select) for name, c in components.items()}
    measured: dict[str, list[float]] = {}
    measure = session.step % config.trainer.gradient_shares_every == 0
    for number, batch in enumerate(minibatches(session, packed, trajectories)):
        planned = plan(packed, components, weights, rewards, batch, session.progress)
        if not bool(planned.keep.any()):
            continue
        losses = accumulate(session, packed, planned, signal, shares=measure and number == 0)
        norm = torch.nn.utils.clip_grad_norm_(session.parameters, config.trainer.clip_norm)
        losses |= {"grad_norm": float(norm), "learning_rate": session.learning_rate}
        session.optimizer_step()
        for key, value in losses.items():
            measured.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in measured.items()}


def minibatches(
    session: Session, packed: Packed, trajectories: Sequence[Trajectory]
) -> Iterator[torch.Tensor]:
    """Token masks that deal out the trajectories, and separately the repaired ones, evenly and at random."""
    updates, config = session.config.trainer.updates_per_step, session.config
    random = np.random.Generator(np.random.Philox(key=[config.seed, session.step], counter=[0, 0, 2, 2**63]))
    share = torch.empty(len(trajectories), dtype=torch.int64)
    for repaired in (False, True):
        mine = [i for i, t in enumerate(trajectories) if (t.branch is not None) == repaired]
        for place, which in enumerate(random.permutation(len(mine)).tolist()):
            share[mine[which]] = place % updates
    for number in range(updates):
        yield share[packed.episode] == number


def accumulate(
    session: Session, packed: Packed, planned: Plan, signal: HiddenStates | None, *, shares: bool
) -> dict[str, float]:
    """Gradient of the whole update batch over its micro-batches; each component's loss, and with ``shares``
    its part of the sum of the components' gradient norms."""
    config, losses = session.config, dict.fromkeys(planned.components, 0.0)
    separate: dict[str, list[torch.Tensor]] = {}
    for micro in packed.micro_batches(config.trainer.micro_batch_tokens, planned.keep):
        parts = micro_losses(session.model, packed, micro, planned, signal, config.rollout.temperature)
        session.totals["flops"] += 3 * forward_flops(session.model, micro.n_tokens, micro.ids.shape[1] / 2)
        if shares:
            for name, part in parts.items():
                gradient = torch.autograd.grad(part, session.parameters, retain_graph=True, allow_unused=True)
                add_gradients(separate.setdefault(name, []), session.parameters, gradient)
        else:
            torch.stack(list(parts.values())).sum().backward()
        for name, part in parts.items():
            losses[name] += float(part.detach())
    result = {f"loss/{name}": value for name, value in losses.items()} | {"loss": sum(losses.values())}
    if not shares:
        return result
    for parameter, *gradients in zip(session.parameters, *separate.values(), strict=True):
        parameter.grad = torch.stack(gradients).sum(0)
    norms = {name: float(torch.stack([g.norm() for g in grads]).norm()) for name, grads in separate.items()}
    total = sum(norms.values())
    return result | {f"grad_share/{name}": norm / total if total else 0.0 for name, norm in norms.items()}


def add_gradients(
    total: list[torch.Tensor], parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Add one micro-batch's gradients in place; a parameter that a component does not reach has none."""
    if not total:
        total.extend(torch.zeros_like(parameter) for parameter in parameters)
    for into, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            into += gradient


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
