"""`opd-agents check`: will a run train on what its student saw, and will it fit? Before compute is spent."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opd_agents import envs
from opd_agents.config import Api, RunConfig, Vllm, sections_in
from opd_agents.errors import OpdError
from opd_agents.estimate import memory
from opd_agents.policies.offload import Offloaded
from opd_agents.probing import Finding, probe
from opd_agents.questions import Asked, ask, why_not_asked
from opd_agents.runs import RunFolder
from opd_agents.session import Session
from opd_agents.starting import check_inputs, load_session
from opd_agents.teachers.aligned import AlignedTeacher
from opd_agents.teachers.cache import StaleCache
from opd_agents.teachers.local import ModelTeacher
from opd_agents.teaching import settings_of
from opd_agents.trainer import train_step

ROLLOUTS = 64  # of the four questions, where nothing else is said


@dataclass(frozen=True, slots=True)
class StageCheck:
    """``memory`` in bytes by part, ``seconds`` of one step and of all, both estimated; empty where a finding
    stood before them. ``questions``: whether the teacher is worth the compute, where that was asked."""

    name: str
    findings: list[Finding]
    memory: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    questions: Asked | None = None

    @property
    def passed(self) -> bool:
        return all(finding.passed is not False for finding in self.findings)

    def row(self) -> dict[str, Any]:
        findings = [{"about": f.about, "passed": f.passed, "says": f.says} for f in self.findings]
        told = {"findings": findings, "memory": self.memory, "seconds": self.seconds}
        asked = self.questions.row() if self.questions else None
        return {"name": self.name, "passed": self.passed} | told | {"questions": asked}


def check(config: RunConfig, *, episodes: int = 8, rollouts: int | None = 0) -> list[StageCheck]:
    """Every stage, with a training step on about ``episodes`` episodes in a folder that is thrown away, and
    the four questions of its teacher, of so many ``rollouts`` (0: they are not asked; None: ``ROLLOUTS``, but
    of a teacher whose answers are paid for none).

    A later stage is checked with the student as the config gives it, not as the stage before would leave it.
    """
    envs.import_plugins(config.imports)
    stages = config.stages or {config.name: config}
    return [_stage(name, stage, episodes, rollouts) for name, stage in stages.items()]


def _stage(name: str, config: RunConfig, episodes: int, rollouts: int | None) -> StageCheck:
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_inputs(config)
            session = load_session(tried := _tried(config, episodes, folder), _folder(tried))
        except OpdError as error:
            about = "cache" if isinstance(error, StaleCache) else "inputs"
            return StageCheck(name, [Finding(about, False, str(error), error)])
        findings += [Finding("inputs", True, "environments, models and plug-ins are there and fit")]
        findings += [*_positions(session), *probe(session)]
        if not StageCheck(name, findings).passed:
            return StageCheck(name, findings)
        with closing(session.references):
            asked = _asked(session, rollouts)
            findings += [asked] if isinstance(asked, Finding) else []
            questions = asked if isinstance(asked, Asked) else None
            started = time.perf_counter()
            try:
                row = train_step(session)
            except OpdError as error:
                return StageCheck(name, [*findings, Finding("step", False, str(error))], questions=questions)
            seconds = time.perf_counter() - started
    step = seconds * config.rollout.episodes_per_step / tried.rollout.episodes_per_step
    reader = session.discriminator.reader if session.discriminator else None
    local = _local_teachers(session).values()
    resting = [one.weights.nbytes for one in local if isinstance(one.weights, Offloaded)]
    parts = memory(config, session.model, [one.model for one in local], reader, resting)
    there, where = _device()
    if share := _engines(config):
        parts["engines"] = round(share * there)
    says = f"about {_gigabytes(sum(parts.values()))} of {_gigabytes(there)} of {where}"
    findings += [*_step(row, session), Finding("memory", sum(parts.values()) < there, says)]
    spent = {"step": step, "run": step * config.trainer.steps}
    return StageCheck(name, findings, parts, spent, questions)


def _asked(session: Session, rollouts: int | None) -> Asked | Finding | None:
    """The four questions, or why they were not asked; before the step, which changes the student."""
    if rollouts == 0:
        return None
    if why := why_not_asked(session):
        return Finding("questions", None, f"not asked: {why}")
    teacher = session.config.teacher
    if rollouts is None and teacher and any(isinstance(one, Api) for _, one in sections_in("", teacher)):
        return Finding("questions", None, "not asked: the teacher's answers are paid for; say --rollouts N")
    try:
        return ask(session, ROLLOUTS if rollouts is None else rollouts)
    except OpdError as error:
        return Finding("questions", None, f"not answered: {error}", error)


def _tried(config: RunConfig, episodes: int, folder: str) -> RunConfig:
    rollout = config.rollout
    most = max(1, episodes // rollout.group_size) * rollout.group_size
    few = rollout.model_copy(update={"episodes_per_step": min(rollout.episodes_per_step, most)})
    trainer = config.trainer.model_copy(update={"tensorboard": False})
    return config.model_copy(update={"rollout": few, "trainer": trainer, "output": f"{folder}/run"})


def _folder(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.folder), config.model_dump(mode="json"), resume=False)


def _local_teachers(session: Session) -> dict[str, ModelTeacher]:
    teachers = session.references.singles.items()
    inner = {n: one.teacher if isinstance(one, AlignedTeacher) else one for n, one in teachers}
    return {name: teacher for name, teacher in inner.items() if isinstance(teacher, ModelTeacher)}


def _positions(session: Session) -> Iterator[Finding]:
    most = session.config.rollout.max_context_tokens
    models = {name: teacher.model for name, teacher in _local_teachers(session).items()}
    for name, model in {"student": session.model, **models}.items():
        positions = model.config.get_text_config().max_position_embeddings
        if most > positions:
            says = f"rollout.max_context_tokens is {most}, but it was made for {positions} positions"
            yield Finding(name, None, says)


def _step(row: Mapping[str, Any], session: Session) -> Iterator[Finding]:
    """What a whole training step says; it has refused log-probs that are not the sampler's already."""
    if episodes := row["rollout/episodes"]:
        success, turns, failed = (row[f"rollout/{key}"] for key in ("success", "turns", "errors"))
        says = f"{episodes} episodes, success {success:.0%}, {turns:.1f} turns each"
        yield Finding("rollout", None, says + (f"; in {failed:.0%} the environment failed" if failed else ""))
    if "student" in session.config.rollout.actors:
        yield Finding("sampler", True, "the trainer re-scores the sampled tokens as the sampler did")
    if (norm := row.get("grad_norm", 0.0)) > 0:
        yield Finding("loss", True, f"loss {row['loss']:.4g}, gradient norm {norm:.3g}")
    elif row.get("groups/nonzero") == 0:
        says = "no gradient: the episodes of every group had the same reward; try more --episodes"
        yield Finding("loss", None, says)
    else:
        says = "the gradient is zero: no loss component selects a token that it can learn from"
        yield Finding("loss", False, says)


def _engines(config: RunConfig) -> float:
    """The share of the device's memory that vLLM in this process may fill."""
    sections = (
        section
        for name, settings in settings_of(config).items()
        for _, section in sections_in(name, settings)
    )
    return sum(one.engine.memory for one in sections if isinstance(one, Vllm) and one.engine is not None)


def _device() -> tuple[int, str]:
    """Its memory in bytes, and whose it is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "the GPU"
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) * 1024, "this machine"


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
