"""The models that a run compares its student with: the teacher, and the references of the config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents import envs
from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import EnvironmentSource, Local, PlugIn, RunConfig, Self, conditioning_of
from opd_agents.config import Teacher as TeacherSettings
from opd_agents.config.needs import Need, reference_needs
from opd_agents.episode import Episode, Limits
from opd_agents.errors import ConfigError
from opd_agents.policies.adapters import adapter_base
from opd_agents.policies.models import load_tokenizer
from opd_agents.runs import newest_checkpoint
from opd_agents.teachers import Teacher, TeacherSignal
from opd_agents.teachers.base import check_aligned
from opd_agents.teachers.conditioning import Conditioner
from opd_agents.teachers.local import LocalTeacher
from opd_agents.teachers.plug_in import make_teacher, teacher_class
from opd_agents.teachers.self_teacher import CopyTeacher, SameModelTeacher, self_teacher
from opd_agents.types import Trajectory

# Of self teachers, in a checkpoint. Not beside the model's: some programs load all that they find there.
FILE = Path("teachers") / "weights.safetensors"


class References:
    """``teachers`` by name, `teacher` first among them; ``needs``: what the loss needs of which.

    Self teachers follow the student: see :meth:`after_update` and :meth:`after_step`. Raises UserError for a
    model that cannot be loaded or does not fit the ``student`` and its ``chat``.
    """

    def __init__(self, config: RunConfig, student: PreTrainedModel, chat: Chat) -> None:
        self.needs = needs_of(config)
        self.teachers: dict[str, Teacher] = {}
        self.conditioners: dict[str, Conditioner] = {}
        rollout = config.rollout
        limits = Limits(
            max_turns=rollout.max_turns, step_timeout=rollout.step_timeout,
            episode_timeout=rollout.episode_timeout, max_live=rollout.max_live,
        )  # fmt: skip
        for name, settings in settings_of(config).items():
            if (conditioning := conditioning_of(settings)) is not None:
                self.conditioners[name] = Conditioner(conditioning, chat, limits)
            self.teachers[name] = self._made(name, settings, config, student, chat)

    def _made(
        self, name: str, settings: TeacherSettings, config: RunConfig, student: PreTrainedModel, chat: Chat
    ) -> Teacher:
        temperature, conditioner = config.rollout.temperature, self.conditioners.get(name)
        match settings:
            case Self():
                fresh = config.student.lora is not None and (
                    adapter_base(newest_checkpoint(str(config.student.model))) is None
                )
                return self_teacher(
                    settings, student, chat, temperature, fresh_adapter=fresh, conditioner=conditioner
                )
            case Local():
                path = newest_checkpoint(str(settings.model))
                dtype = settings.dtype or config.student.dtype
                return LocalTeacher(path, chat, dtype=dtype, temperature=temperature, conditioner=conditioner)
        own = settings.model  # not always a checkpoint: what it is, its class knows
        own = newest_checkpoint(own) if own and Path(own).exists() else own
        needs = self.needs.get(name, frozenset())
        return make_teacher(place(name), settings, own, chat, temperature=temperature, needs=needs)

    def score(
        self, packed: Packed, trajectories: Sequence[Trajectory], owned: Tensor, max_tokens: int
    ) -> tuple[dict[str, TeacherSignal], dict[str, Tensor]]:
        """The signal of every reference that the loss needs, filled where ``owned`` (bool [N]); and of those
        with conditioning the tokens (bool [N], the same on every rank) that they had something to say about:
        on others there is no signal. Raises AlignmentError for a signal of other tokens or another type."""
        signals: dict[str, TeacherSignal] = {}
        taught: dict[str, Tensor] = {}
        for name in self.needs:
            asked, keep = packed, owned
            if name in self.conditioners:
                asked, taught[name] = self.conditioners[name].condition(packed, trajectories)
                keep = owned & taught[name]
            teacher = self.teachers[name]
            signals[name] = teacher.score(asked, max_tokens, keep)
            check_aligned(place(name), signals[name], teacher.gives, len(packed.target))
        return signals, taught

    def after_update(self, student: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Follow an optimizer step; ``student`` gives the trained weights by name (and is asked by every rank
        where it is asked by one)."""
        for teacher in self._copies().values():
            if teacher.follows_updates:
                teacher.after_update(student())

    def after_step(self, student: PreTrainedModel, step: int) -> None:
        """Follow a training step, the ``step``-th (from 1)."""
        for teacher in self.teachers.values():
            if isinstance(teacher, SameModelTeacher):
                teacher.after_step()
            elif isinstance(teacher, CopyTeacher):
                teacher.after_step(((n, p) for n, p in student.named_parameters() if p.requires_grad), step)

    @property
    def tokens(self) -> int:
        """Scored plus written by all of them, so far."""
        return sum(teacher.tokens for teacher in self.teachers.values())

    @property
    def flops(self) -> int:
        return sum(teacher.flops for teacher in self.teachers.values())

    def check(self, episodes: Iterable[Episode]) -> None:
        """Raise ConfigError where the template cannot carry a teacher's context into these episodes."""
        for episode in episodes:
            for conditioner in self.conditioners.values():
                conditioner.check(episode)

    def save(self, checkpoint: Path) -> None:
        """The weights of self teachers that no other file of a checkpoint has."""
        copies = self._copies().items()
        state = {f"{name}/{key}": weight for name, copy in copies for key, weight in copy.state().items()}
        if state:
            (checkpoint / FILE).parent.mkdir()
            save_file(state, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """What :meth:`save` wrote, bit for bit. Raises whatever a broken file makes safetensors raise."""
        if not (copies := self._copies()):
            return
        saved = load_file(checkpoint / FILE)
        for name, copy in copies.items():
            prefix = f"{name}/"
            copy.load({k.removeprefix(prefix): w for k, w in saved.items() if k.startswith(prefix)})

    def _copies(self) -> dict[str, CopyTeacher]:
        return {name: one for name, one in self.teachers.items() if isinstance(one, CopyTeacher)}


def settings_of(config: RunConfig) -> dict[str, TeacherSettings]:
    """The sections of the teacher and of the references, by name."""
    return ({"teacher": config.teacher} if config.teacher else {}) | config.references


def needs_of(config: RunConfig) -> Mapping[str, frozenset[Need]]:
    """Which references score the trajectories, and what of them is needed; others at most act."""
    needs = dict(reference_needs(config.loss.components))
    if config.correction is not None or config.rollout.teacher_share:
        needs["teacher"] = needs.get("teacher", frozenset[Need]()) | {"sampled"}
    return needs


def place(name: str) -> str:
    """Where in a config a reference stands."""
    return name if name == "teacher" else f"references.{name}"


def check_references(config: RunConfig) -> None:
    """Raise UserError for what the sections name and does not exist or cannot serve the loss."""
    needs = needs_of(config)
    for name, settings in settings_of(config).items():
        match settings:
            case Local():
                load_tokenizer(newest_checkpoint(str(settings.model)))
            case PlugIn():
                teacher_class(place(name), settings, needs.get(name, frozenset()))
        conditioning = conditioning_of(settings)
        sources = conditioning.sources if conditioning else []
        if "expert" in sources and not any(_has_expert(source) for source in config.environments):
            raise ConfigError(
                f"{place(name)}.conditioning.sources: expert, but none of the environments has a scripted"
                " expert; take another source."
            )


def _has_expert(source: EnvironmentSource) -> bool:
    env = envs.make(source.id, **source.options)
    env.close()
    return env.has_expert
