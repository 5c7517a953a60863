"""A teacher of the user's: ``teacher.kind: module:name``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from opd_agents.chat import Chat
from opd_agents.config import PlugIn
from opd_agents.errors import ConfigError
from opd_agents.plugins import load_object
from opd_agents.teachers.base import SERVES, Capability, Teacher


def teacher_class(place: str, settings: PlugIn) -> type[Teacher]:
    """The class that the section ``place`` (`teacher`, or one of `references`) names as its ``kind``. Raises
    UserError for one that cannot be imported, ConfigError where the class does not say what it can, or
    does not take ``options``."""
    what = f"{place}.kind {settings.kind}"
    cls: type[Teacher] = load_object(settings.kind, f"{place}.kind", "class")
    if not hasattr(cls, "can"):
        raise ConfigError(f"{what} lacks `can`; opd_agents.teachers.Teacher says what a teacher must have.")
    if unknown := cls.can - set(Capability):
        raise ConfigError(
            f"{what} says that it can {min(map(str, unknown))}, which is none of {', '.join(Capability)}."
        )
    try:
        inspect.signature(cls).bind(None, None, dtype="", temperature=1.0, **settings.options)
    except TypeError as error:
        raise ConfigError(
            f"{what} cannot be made with (model, chat, dtype=, temperature=) and {place}.options "
            f"{settings.options}: {error}."
        ) from None
    return cls


def make_teacher(
    place: str, settings: PlugIn, path: str | None, chat: Chat, *, temperature: float
) -> Teacher:
    """Load the teacher; ``path`` is its ``model``, of a run folder the newest checkpoint.

    Raises as :func:`teacher_class`, ConfigError for a class that lacks something, and what the class raises.
    """
    cls = teacher_class(place, settings)
    made: Callable[..., Teacher] = cls
    teacher = made(path, chat, dtype=settings.dtype, temperature=temperature, **settings.options)
    if missing := [name for name in _needed(cls.can) if not hasattr(teacher, name)]:
        raise ConfigError(
            f"{place}.kind {settings.kind} lacks {', '.join(missing)}; opd_agents.teachers.Teacher says what "
            "a teacher must have."
        )
    return teacher


def _needed(can: AbstractSet[Capability]) -> list[str]:
    """Of an instance; see Teacher."""
    acting = ["act", "greedy"] if Capability.ACT in can else []
    scoring = ["score"] if can & SERVES["spans"] else []
    judging = ["client"] if Capability.JUDGE in can else []
    return [*acting, *scoring, *judging, "tokens", "flops"]
