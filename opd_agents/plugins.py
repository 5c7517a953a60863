"""Code that is not ours: of the user's, named in a config as ``module:name``, and optional packages."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias

from opd_agents.errors import MissingPart, UserError
from opd_agents.types import Credit, Trajectory

Reward: TypeAlias = Callable[[Trajectory], float]
CreditFunction: TypeAlias = Callable[[Trajectory, Sequence[Credit]], Sequence[float]]


def load_object(reference: str, what: str, kind: Literal["function", "class"] = "function") -> Any:
    """The function (anything callable) or class ``module:name``, its module imported if it is not yet.

    ``what`` says in messages what asks for it, such as a config key. A file's functions are found once it was
    imported through ``imports:`` or ``--import``, which also put its folder on the path. Raises UserError for
    a malformed reference, a module that is not found or fails to import, a missing name, and another kind.
    """
    module, colon, name = reference.partition(":")
    if not (colon and module and name.isidentifier()):
        raise UserError(f"{what}: {reference!r} is no 'module:name', such as 'my_rewards:exact'.")
    try:
        names = vars(importlib.import_module(module))
    except Exception as error:  # whatever a user's module raises
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
        hint = " Install it, or name its file under `imports:` or with --import." if missing else ""
        text = f"module {module} cannot be imported: {type(error).__name__}: {error}."
        raise UserError(f"{what}: {text}{hint}") from error
    if name not in names:
        raise UserError(f"{what}: module {module} has no {kind} {name}.")
    found = names[name]
    if not (isinstance(found, type) if kind == "class" else callable(found)):
        raise UserError(f"{what}: {reference} is no {kind} but {type(found).__name__} {found!r:.60}.")
    return found


def need(module: str, extra: str, what: str) -> ModuleType:
    """The module of an optional package, imported; ``what`` is who needs it, for the message.

    Raises MissingPart, which names the extra to install, also where the package is there but fails to import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPart(
            f"{what} needs the package {module.partition('.')[0]} ({error}). Install it with: "
            f"pip install 'opd-agents[{extra}]'"
        ) from error


def load_reward(reference: str, key: str) -> Reward:
    """``module:name`` as a reward of a finished trajectory. Raises UserError as :func:`load_object`, and when
    it is called and raises, or gives no finite number; ``key`` is the config's that names it."""
    function, what = load_object(reference, key), f"{key} ({reference})"

    def reward(trajectory: Trajectory) -> float:
        return _numbers(lambda: [function(trajectory)], what, trajectory)[0]

    return reward


def load_credit(reference: str, key: str) -> CreditFunction:
    """``module:name`` as a credit function: a weight for every turn of a trajectory, which a component's
    weight is multiplied by. Raises UserError as :func:`load_reward`, and for another number of weights."""
    function, what = load_object(reference, key), f"{key} ({reference})"

    def credit(trajectory: Trajectory, credits: Sequence[Credit]) -> Sequence[float]:
        weights = _numbers(lambda: function(trajectory, credits), what, trajectory)
        if len(weights) != len(trajectory.turns):
            raise UserError(
                f"{what} gave {len(weights)} weights for trajectory {trajectory.uid}, which has "
                f"{len(trajectory.turns)} turns: it must give one a turn."
            )
        return weights

    return credit


def _numbers(call: Callable[[], Iterable[Any]], what: str, trajectory: Trajectory) -> list[float]:
    try:
        values = [float(value) for value in call()]
    except Exception as error:  # whatever a user's function raises
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} failed on trajectory {trajectory.uid}: {problem}") from error
    if wrong := [value for value in values if not math.isfinite(value)]:
        raise UserError(f"{what} gave {wrong[0]} for trajectory {trajectory.uid}; it must be finite.")
    return values
