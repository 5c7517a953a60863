"""A teacher of the user's: ``teacher.kind: module:name``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from opd_agents.chat import Chat
from opd_agents.config import PlugIn
from opd_agents.config.needs import Need
from opd_agents.errors import ConfigError
from opd_agents.plugins import load_object
from opd_agents.teachers.base import Teacher, check_serves

NEEDED = ("act", "greedy", "score", "tokens", "flops")  # of an instance; see Teacher


def teacher_class(place: str, settings: PlugIn, needs: AbstractSet[Need]) -> type[Teacher]:
    """The class that the section ``place`` (`teacher`, or one of `references`) names as its ``kind``. Raises
    UserError for one that cannot be imported, ConfigError where the class does not say what it gives, gives
    no signal that serves what is needed of it, or does not take ``options``."""
    what = f"{place}.kind {settings.kind}"
    cls: type[Teacher] = load_object(settings.kind, f"{place}.kind", "class")
    if not hasattr(cls, "gives"):
        raise ConfigError(f"{what} lacks `gives`; opd_agents.teachers.Teacher says what a teacher must have.")
    check_serves(what, cls.gives, needs)
    try:
        inspect.signature(cls).bind(None, None, dtype="", temperature=1.0, **settings.options)
    except TypeError as error:
        raise ConfigError(
            f"{what} cannot be made with (model, chat, dtype=, temperature=) and {place}.options "
            f"{settings.options}: {error}."
        ) from None
    return cls


def make_teacher(
    place: str,
    settings: PlugIn,
    path: str | None,
    chat: Chat,
    *,
    temperature: float,
    needs: AbstractSet[Need],
) -> Teacher:
    """Load the teacher; ``path`` is its ``model``, of a run folder the newest checkpoint.

    Raises as :func:`teacher_class`, ConfigError for a class that lacks something, and what the class raises.
    """
    made: Callable[..., Teacher] = teacher_class(place, settings, needs)
    teacher = made(path, chat, dtype=settings.dtype, temperature=temperature, **settings.options)
    if missing := [name for name in NEEDED if not hasattr(teacher, name)]:
        raise ConfigError(
            f"{place}.kind {settings.kind} lacks {', '.join(missing)}; opd_agents.teachers.Teacher says what "
            "a teacher must have."
        )
    return teacher
