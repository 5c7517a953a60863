"""`opd-agents rollout --explain`: one episode with its error, the repair, what proves it, and the credit of
every action, out of a run folder, or out of a step that is played for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_agents import envs
from opd_agents.config import Correction, Preference, RunConfig, load_config
from opd_agents.errors import OpdError, UserError
from opd_agents.report.examples import environment_name, nouns
from opd_agents.report.reading import Run, read_jsonl, read_run, repaired
from opd_agents.types import Credit, Trajectory

TRIES = 3  # steps that are played for an accepted repair


@dataclass(frozen=True, slots=True)
class Told:
    """An episode with the credit of its actions, and for each the components of the loss that count it, with
    its weight there; and what a judge gave as its reasons, by turn."""

    trajectory: Trajectory
    credits: Sequence[Credit]
    counted: Sequence[Mapping[str, float]]
    reasons: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Explained:
    """``repair`` is what was tried on the ``episode``, as a line of the trajectory file has it; ``branches``
    are those of its continuations that are learned from."""

    where: str
    episode: Told
    repair: Mapping[str, Any]
    branches: Sequence[Told]
    correction: Correction


def explain_run(path: Path, step: int | None = None) -> Explained:
    """The newest accepted repair of a run, or of its ``step``; one that was rejected where none was accepted.

    Raises UserError where nothing was repaired, RunFolderError for a folder that is no run's.
    """
    stages = list(read_run(path).training())
    for _, stage in reversed(stages):
        if (found := _found(stage, step)) is not None:
            return found
    of_step = "" if step is None else f" in step {step}"
    raise UserError(
        f"{path} holds no episode with a repair{of_step}. There are some in runs with a section"
        " `correction`, in steps that located an error: correction/proposed in metrics.jsonl counts them."
    )


def explain_config(config: RunConfig, tell: Callable[[str], None] = lambda text: None) -> Explained:
    """A repair of the student as ``config`` begins: whole training steps, at a learning rate of 0 and in a
    folder that is thrown away, until one holds an accepted repair. ``tell`` hears of each.

    Raises UserError where nothing is corrected, OpdError where ``TRIES`` steps had nothing to repair.
    """
    from opd_agents.runs import RunFolder
    from opd_agents.starting import check_inputs, load_session
    from opd_agents.trainer import train_step

    stage = next((one for one in config.stages.values() or [config] if one.correction is not None), None)
    if stage is None:
        raise UserError(
            f"{config.name} has no section `correction`, so nothing is repaired. Add one, such as"
            " `correction: {propose: {by: expert, where: disagreed}}`; see docs/architecture.md."
        )
    envs.import_plugins(config.imports)
    rows: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tried = _without_learning(stage, f"{folder}/run")
        check_inputs(tried)
        kept = RunFolder(Path(tried.folder), tried.model_dump(mode="json"), resume=False)
        session = load_session(tried, kept)
        with closing(session.references):
            while len(rows) < TRIES and not (rows and rows[-1]["correction/accepted"]):
                rows.append(train_step(session))
                kept.log(rows[-1])
                tell(_of_step(rows[-1]))
        found = _found(read_run(kept.path), None)
    if found is None:
        raise OpdError(_nothing(rows))
    return found


def _without_learning(config: RunConfig, output: str) -> RunConfig:
    once = {"learning_rate": 0.0, "updates_per_step": 1, "tensorboard": False}
    trainer = config.trainer.model_copy(update=once)
    return config.model_copy(update={"trainer": trainer, "evaluation": None, "output": output})


def _of_step(row: Mapping[str, Any]) -> str:
    failed = round(row["rollout/episodes"] * (1 - row["rollout/success"]))
    located, accepted = row["correction/proposed"], row["correction/accepted"]
    played = f"{row['rollout/episodes']} episodes, {failed} without success"
    return f"step {row['step']}: {played}; {located} repairs tried, {accepted} accepted"


def _nothing(rows: Sequence[Mapping[str, Any]]) -> str:
    told = ". ".join(map(_of_step, rows))
    if all(row["rollout/success"] == 1 for row in rows):
        why = "no episode failed: give harder tasks (environments.0.options), or a weaker student"
    else:
        why = (
            "no error was located in those that failed, or there is no room for a proof: let more be found"
            " (correction.propose), or raise correction.token_share or rollout.episodes_per_step"
        )
    return f"Nothing to explain after {len(rows)} steps: {why}. {told}."


def _found(run: Run, step: int | None) -> Explained | None:
    """The newest accepted repair of a run without stages, else the newest rejected one."""
    rejected: tuple[Path, Mapping[str, Any]] | None = None
    for file in sorted((run.path / "trajectories").glob("step-*.jsonl"), reverse=True):
        if step is not None and _step(file) != step:
            continue
        for line in read_jsonl(file, repaired):
            if not line.get("repair") or line["repair"]["control"]:
                continue
            if line["repair"]["accepted"]:
                return _explained(run, file, line)
            rejected = rejected or (file, line)
    return None if rejected is None else _explained(run, *rejected)


def _step(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))


def _explained(run: Run, file: Path, line: Mapping[str, Any]) -> Explained:
    config = load_config(run.path / "config.yaml")
    assert config.correction is not None  # else there is no line with a repair
    uid = line["trajectory"]["uid"]
    branches = [other for other in read_jsonl(file) if _learned_from(other["trajectory"], uid)]
    episode, *others = (_told({**one, "path": file}, config) for one in (line, *branches))
    task, environment = episode.trajectory.task, environment_name(episode.trajectory)
    title = f"step {_step(file)}, {task.split} task {task.id} of {environment}"
    return Explained(title, episode, line["repair"], others, config.correction)


def _learned_from(trajectory: Mapping[str, Any], uid: str) -> bool:
    """Whether it is a branch of episode ``uid``, or of a continuation of it, whose names begin with its."""
    branch = trajectory["branch"]
    return branch is not None and branch["tried"] and f"{branch['parent']}-".startswith(f"{uid}-")


def _told(line: dict[str, Any], config: RunConfig) -> Told:
    from opd_agents.batch import pack
    from opd_agents.composition import selected

    trajectory, credits = nouns(line)
    packed = pack([trajectory])
    counted: list[dict[str, float]] = [{} for _ in trajectory.turns]
    for name, component in config.loss.components.items():
        if isinstance(component, Preference):
            continue
        weights = selected(packed, [trajectory], component.select)
        sums, sizes = packed.per_turn(weights), packed.per_turn((weights != 0).float())
        for (_, turn), total, size in zip(packed.turns, sums.tolist(), sizes.tolist(), strict=True):
            if size:
                counted[turn][name] = total / size * credits[turn].factors.get(name, 1.0)
    reasons = {one["turn"]: one["reason"] for one in line["feedback"] if one["turn"] is not None}
    return Told(trajectory, credits, counted, reasons)
