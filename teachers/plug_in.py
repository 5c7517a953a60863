"""A teacher of the user's: ``teacher.kind: module:name``."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from opd_agents.chat import Chat
from opd_agents.config.sections import Teacher as TeacherSettings
from opd_agents.errors import ConfigError
from opd_agents.plugins import load_object
from opd_agents.teachers.base import HiddenStates, Teacher

NEEDED = ("act", "greedy", "score", "tokens", "flops")  # of an instance; see Teacher


def teacher_class(settings: TeacherSettings, *, needs_signal: bool) -> type[Teacher]:
    """The class that ``teacher.kind`` names. Raises UserError for one that cannot be imported, ConfigError
    where the class does not say what it gives, gives no hidden states although the loss needs them, or does
    not take ``options``."""
    what = f"teacher.kind {settings.kind}"
    cls: type[Teacher] = load_object(settings.kind, "teacher.kind", "class")
    if not hasattr(cls, "gives"):
        raise ConfigError(f"{what} lacks `gives`; opd_agents.teachers.Teacher says what a teacher must have.")
    if needs_signal and HiddenStates not in cls.gives:
        raise ConfigError(
            f"{what} gives no hidden states, which `distill` components and `correction` need. Take "
            "`teacher.kind: local`, or imitate this teacher: rollout.source: teacher and a `ce` component."
        )
    try:
        inspect.signature(cls).bind(None, None, dtype="", temperature=1.0, **settings.options)
    except TypeError as error:
        raise ConfigError(
            f"{what} cannot be made with (model, chat, dtype=, temperature=) and teacher.options "
            f"{settings.options}: {error}."
        ) from None
    return cls


def make_teacher(
    settings: TeacherSettings, path: str | None, chat: Chat, *, temperature: float, needs_signal: bool
) -> Teacher:
    """Load the teacher; ``path`` is its ``model``, of a run folder the newest checkpoint.

    Raises as :func:`teacher_class`, ConfigError for a class that lacks something, and what the class raises.
    """
    made: Callable[..., Teacher] = teacher_class(settings, needs_signal=needs_signal)
    teacher = made(path, chat, dtype=settings.dtype, temperature=temperature, **settings.options)
    if missing := [name for name in NEEDED if not hasattr(teacher, name)]:
        raise ConfigError(
            f"teacher.kind {settings.kind} lacks {', '.join(missing)}; opd_agents.teachers.Teacher says what "
            "a teacher must have."
        )
    return teacher
