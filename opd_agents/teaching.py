"""From the sections of a config to teachers: who they are, what each can, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from opd_agents import envs
from opd_agents.api.client import check_key, store_of
from opd_agents.chat import Chat
from opd_agents.config import (
    Api,
    Cached,
    Ensemble,
    Local,
    PlugIn,
    RunConfig,
    Self,
    Single,
    Vllm,
    conditioning_of,
    is_aligned,
    sections_in,
)
from opd_agents.config import Teacher as TeacherSettings
from opd_agents.config.needs import Need, reference_needs, reference_top_k
from opd_agents.errors import ConfigError
from opd_agents.policies.adapters import adapter_base
from opd_agents.policies.fingerprint import fingerprint
from opd_agents.policies.models import load_tokenizer
from opd_agents.runs import newest_checkpoint
from opd_agents.teachers import Capability, Teacher
from opd_agents.teachers.aligned import AlignedTeacher, Aligner, own_chat
from opd_agents.teachers.api import ApiTeacher
from opd_agents.teachers.base import check_acts, check_serves, listed
from opd_agents.teachers.cache import Index, open_cache, read_index
from opd_agents.teachers.cached import CachedTeacher
from opd_agents.teachers.conditioning import Conditioner
from opd_agents.teachers.ensemble import together
from opd_agents.teachers.local import LocalTeacher, ModelTeacher
from opd_agents.teachers.plug_in import make_teacher, teacher_class
from opd_agents.teachers.self_teacher import self_teacher
from opd_agents.teachers.vllm import VllmTeacher


def settings_of(config: RunConfig) -> dict[str, TeacherSettings]:
    """The sections of the teacher and of the references, by name."""
    return ({"teacher": config.teacher} if config.teacher else {}) | config.references


def needs_of(config: RunConfig) -> Mapping[str, frozenset[Need]]:
    """Which references score the trajectories, and what of them is needed; others at most act."""
    needs = dict(reference_needs(config.loss.components))
    if (config.correction is not None and config.correction.propose.scored) or config.rollout.teacher_share:
        needs["teacher"] = needs.get("teacher", frozenset[Need]()) | {"sampled"}
    return needs


def place(name: str) -> str:
    """Where in a config a teacher stands."""
    return name if name.partition(".")[0] == "teacher" else f"references.{name}"


def parts_of(name: str, settings: TeacherSettings) -> dict[str, Single]:
    """The section, or those of the members of an ensemble, by the names of their teachers."""
    if isinstance(settings, Ensemble):
        return {f"{name}.{member}": section for member, section in settings.members.items()}
    return {name: settings}


def make_single(
    name: str,
    settings: Single,
    config: RunConfig,
    student: PreTrainedModel,
    chat: Chat,
    conditioner: Conditioner | None,
) -> Teacher:
    """The teacher of a section; ``name`` is its own, or `NAME.MEMBER` of an ensemble. Raises UserError for a
    model that cannot be loaded or does not fit the ``student`` and its ``chat``."""
    temperature = config.rollout.temperature
    match settings:
        case Local(align="bytes", model=str(model)) | Vllm(align="bytes", model=model):
            own = own_chat(newest_checkpoint(model), chat)
            alone = settings.model_copy(update={"align": None})
            teacher = make_single(name, alone, config, student, own, None)
            return AlignedTeacher(teacher, Aligner(chat, own))
        case Api():
            return ApiTeacher(settings, chat, store=store_of(settings.endpoint, config.folder))
        case Cached():
            behind = None
            if settings.of is not None:
                behind = partial(make_single, name, settings.of, config, student, chat, None)
            k = min(reference_top_k(config.loss.components).get(name, 0), len(chat.tokenizer))
            wanted = Index(_whose(settings, config.student.dtype), chat.fingerprint, temperature, k)
            return CachedTeacher(open_cache(Path(settings.cache), wanted), k, behind)
        case Self():
            fresh = config.student.lora is not None and (
                adapter_base(newest_checkpoint(str(config.student.model))) is None
            )
            return self_teacher(
                settings, student, chat, temperature, fresh_adapter=fresh, conditioner=conditioner
            )
        case Vllm():
            return VllmTeacher(
                settings,
                place(name),
                newest_checkpoint(settings.model),
                chat,
                temperature=temperature,
                scores=any(name == one or name.startswith(f"{one}.") for one in needs_of(config)),
                k=reference_top_k(config.loss.components).get(name, 0),
                max_tokens=config.rollout.max_context_tokens,
                dtype=config.student.dtype,
                conditioner=conditioner,
            )
        case Local():
            path = newest_checkpoint(str(settings.model))
            return LocalTeacher(
                path,
                chat,
                dtype=settings.dtype or config.student.dtype,
                temperature=temperature,
                quantise=settings.quantise,
                offload=settings.offload,
                conditioner=conditioner,
            )
    given = settings.model  # not always a checkpoint: what it is, its class knows
    given = newest_checkpoint(given) if given and Path(given).exists() else given
    return make_teacher(place(name), settings, given, chat, temperature=temperature)


def capabilities_of(name: str, settings: TeacherSettings) -> frozenset[Capability]:
    """What the teacher of a section will be able to. Raises UserError for a class that cannot be imported."""
    if is_aligned(settings):
        return AlignedTeacher.can
    match settings:
        case Api():
            return ApiTeacher.can
        case Cached():
            return CachedTeacher.can
        case Ensemble():
            return together(capabilities_of(name, member) for member in settings.members.values())
        case PlugIn():
            return teacher_class(place(name), settings).can
        case Vllm():
            return VllmTeacher.can
    return ModelTeacher.can


def _whose(settings: Cached, dtype: str) -> str | None:
    """The fingerprint of the teacher behind a cache; None: whoever's log-probs it holds."""
    match settings.of:
        case Local(model=model, dtype=own, quantise=rounded):
            stored = own or dtype if rounded is None else f"{own or dtype} {rounded}"
            return f"{fingerprint(newest_checkpoint(str(model)))} {stored}"
        case Vllm(model=model):
            return f"{fingerprint(newest_checkpoint(model))} vllm"
    return None


def asked_to_act(config: RunConfig) -> list[str]:
    """The keys of the config by which `teacher` takes turns."""
    rollout, extra = config.rollout, config.rollout.demonstrations
    corrects = config.correction
    asks = {
        "rollout.source": "teacher" in rollout.actors and rollout.beginning is None,
        "rollout.beginning": rollout.beginning is not None and rollout.beginning.actor == "teacher",
        "rollout.demonstrations": extra is not None and extra.actor == "teacher",
        "rollout.alternatives": rollout.alternatives is not None and rollout.alternatives.actor == "teacher",
        "correction": corrects is not None and "teacher" in (corrects.propose.by, corrects.resumes),
    }
    return [key for key, asked in asks.items() if asked]


def check_references(config: RunConfig) -> None:
    """Raise UserError for what the sections name and does not exist or cannot serve the loss."""
    needs = needs_of(config)
    for name, settings in settings_of(config).items():
        for where, section in sections_in(place(name), settings):
            match section:
                case Api():
                    check_key(section.endpoint, store_of(section.endpoint, config.folder))
                case Cached(of=None):
                    read_index(Path(section.cache))
                case Local() | Vllm():
                    load_tokenizer(newest_checkpoint(str(section.model)))
            conditioning = conditioning_of(section)
            sources = conditioning.sources if conditioning else []
            if "expert" in sources and not any(
                envs.has_expert(source.id, source.options) for source in config.environments
            ):
                raise ConfigError(
                    f"{where}.conditioning.sources: expert, but none of the environments has a scripted"
                    " expert; take another source."
                )
        kind = f"kind {settings.kind}{', align: bytes' if is_aligned(settings) else ''}"
        able, what = capabilities_of(name, settings), f"{place(name)} ({kind})"
        check_serves(what, able, needs.get(name, frozenset()))
        if isinstance(settings, Ensemble) and settings.debate is not None:
            for part, member in parts_of(name, settings).items():
                check_acts(f"{place(part)} (kind {member.kind})", capabilities_of(part, member), "debate")
        for key in asked_to_act(config) if name == "teacher" else ():
            check_acts(what, able, key)
        if config.judge is not None and config.judge.by == name and Capability.JUDGE not in able:
            raise ConfigError(
                f"judge.by asks {what} for judgements, which takes the capability `judge`, but it has"
                f" {listed(able)}. Take one of kind api, under `references` where the teacher is another."
            )
