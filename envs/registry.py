"""Finding environments by id: built-in ones, plug-ins named by the user, and installed packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium

from opd_agents.envs.base import AgentEnv
from opd_agents.envs.tasks import load_tasks
from opd_agents.envs.web.miniwob_experts import EXPERTS as SCRIPTED
from opd_agents.envs.web.miniwob_tasks import TASKS as MINIWOB
from opd_agents.errors import EnvironmentContractError, MissingPart, UnknownName, UserError
from opd_agents.plugins import load_object

GROUP = "opd_agents.envs"  # entry points: the value is a module that calls register() when imported
LISTED_BY = "opd-agents envs"

_entry_points: dict[str, str] = {}
_imported: list[str] = []  # what import_plugins() was given, files by their whole path
_loaded_groups: set[str] = set()


def register(id: str, entry_point: str, **kwargs: Any) -> None:
    """Register an AgentEnv under ``id`` ("namespace/Name-v0"), also for ``gymnasium.make``.

    ``entry_point`` is "module:Class" as a string, imported at the first ``make``; ``kwargs`` go to the class.
    Raises UserError for a malformed id or entry point, and for ``max_episode_steps``.
    """
    if "max_episode_steps" in kwargs:
        raise UserError(
            f"{id}: max_episode_steps is refused. gymnasium's TimeLimit wrapper keeps its counter outside "
            "the environment, so a restored episode would be cut short; set max_turns in the environment."
        )
    if not isinstance(entry_point, str) or entry_point.count(":") != 1:
        raise UserError(f"{id}: entry_point must be a string 'module:Class', got {entry_point!r}.")
    try:
        gymnasium.register(id, entry_point, order_enforce=False, disable_env_checker=True, kwargs=kwargs)
    except gymnasium.error.Error as error:
        raise UserError(f"{id!r} cannot be registered: {error}") from error
    _entry_points[id] = entry_point


def make(id: str, *, tasks: str | Path | None = None, **kwargs: Any) -> AgentEnv:
    """The environment ``id`` without any wrapper; ``kwargs`` go to its class.

    ``tasks`` is a JSONL file or a folder of the library `datasets`; see :class:`AgentEnv` for its rows.
    Raises UnknownName, DataError for tasks that cannot be used, UserError for arguments that the class does
    not take or a class that cannot be imported, EnvironmentContractError if it is no AgentEnv.
    """
    cls = env_class(id)
    accepted = inspect.signature(cls.__init__).parameters
    if "tasks" in accepted:
        raise EnvironmentContractError(f"{id}: the argument `tasks` is every environment's task file.")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for name in kwargs:
        if name not in accepted and not takes_any:
            known = ", ".join([*list(accepted)[1:], "tasks"])
            raise UserError(f"{id} takes no argument {name!r}; it takes {known}.")
    env = gymnasium.make(id, **kwargs)
    assert isinstance(env, AgentEnv)  # register() asked for no wrapper
    if tasks is not None:
        env.use_tasks(load_tasks(tasks))
    return env


def list_envs() -> list[str]:
    """The ids of all environments that can be made, sorted."""
    _load_entry_points()
    return sorted(_entry_points)


def describe(id: str) -> dict[str, Any]:
    """What `opd-agents envs --json` prints of one environment, as plain data. One whose package is not
    installed is described without tools and splits; ``missing`` says what to install."""
    cls = env_class(id)
    known = {"family": cls.family, "fork_mode": cls.fork_mode, "extra": cls.extra, "licence": cls.licence}
    try:
        env = make(id)
    except MissingPart as error:
        unknown = {"tools": [], "splits": {}, "max_turns": cls.max_turns}
        return {"id": id, **known, **unknown, "missing": str(error)}
    try:
        return {
            "id": id,
            **known,
            "tools": [tool.name for tool in env.tools],
            "splits": dict(env.split_sizes),
            "max_turns": env.max_turns,
            "missing": None,
        }
    finally:
        env.close()


def has_expert(id: str, options: Mapping[str, Any]) -> bool:
    """Whether the environment, made so, has a scripted expert, which can be a matter of the options."""
    env = make(id, **options)
    try:
        return env.has_expert
    finally:
        env.close()


def import_plugins(names: Iterable[str]) -> None:
    """Import modules or Python files, which register their environments as they are imported.

    A file ``desk.py`` is imported as the module ``desk`` and its folder joins ``sys.path``, so that
    "desk:MyDesk" is a valid entry point here and in worker processes that import the same names. Raises
    UserError for a missing file or module, a taken module name, and an import that fails.
    """
    for name in names:
        if name.endswith(".py"):
            path = Path(name).expanduser().resolve()
            _import_file(path)
            name = str(path)
        else:
            _import(name, name)
        if name not in _imported:
            _imported.append(name)


def imported_plugins() -> list[str]:
    """What was imported by ``import_plugins``, for another process to import."""
    return list(_imported)


def registration(id: str) -> tuple[str, dict[str, Any]]:
    """What a known ``id`` was registered with: "module:Class", and arguments for it."""
    return _entry_points[id], dict(gymnasium.spec(id).kwargs)


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"Plug-in file {path} does not exist.")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: its other files must not hide installed modules
    _import(path.stem, str(path))
    origin = sys.modules[path.stem].__file__
    if origin is None or Path(origin).resolve() != path:
        raise UserError(f"Plug-in file {path} has the name of another module, {origin}: rename the file.")


def _import(module: str, name: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            hint = "a file must be named with its .py"
            raise UserError(f"Plug-in module {name!r} was not found; {hint}.") from error
        raise UserError(f"Plug-in {name} failed to import: {type(error).__name__}: {error}") from error


def env_class(id: str) -> type[AgentEnv]:
    """The class behind ``id``. Raises UnknownName, UserError and EnvironmentContractError, as ``make``."""
    if id not in _entry_points:
        _load_entry_points()
    if id not in _entry_points:
        raise UnknownName("environment", id, _entry_points, LISTED_BY)
    cls: type = load_object(_entry_points[id], id, "class")
    if not issubclass(cls, AgentEnv):
        raise EnvironmentContractError(f"{id}: {cls.__qualname__} is no opd_agents.envs.AgentEnv.")
    return cls


def _load_entry_points() -> None:
    """Import the installed plug-ins, once; a broken one is a warning, for it must not stop all others."""
    if GROUP in _loaded_groups:
        return
    _loaded_groups.add(GROUP)
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"plug-in {entry.name} ({entry.value}) failed to load: {error!r}", stacklevel=2)


register("opd_agents/FileDesk-v0", "opd_agents.envs.filedesk:FileDesk")
register("opd_agents/BfclMultiTurn-v0", "opd_agents.envs.adapters.bfcl:BfclMultiTurn")
register("opd_agents/BfclSingle-v0", "opd_agents.envs.adapters.bfcl_single:BfclSingle")
register("opd_agents/CodeFix-v0", "opd_agents.envs.code:CodeFix")
register("opd_agents/CodeGen-v0", "opd_agents.envs.code:CodeGen")
register("opd_agents/HumanEval-v0", "opd_agents.envs.code:HumanEval")
register("opd_agents/LockChain-v0", "opd_agents.envs.lockchain:LockChain")
register("opd_agents/Mcp-v0", "opd_agents.envs.mcp:McpTask")
register("opd_agents/OrderDesk-v0", "opd_agents.envs.orderdesk:OrderDesk")
register("opd_agents/OrderDeskDialogue-v0", "opd_agents.envs.orderdesk:OrderDeskDialogue")
register("opd_agents/PromptTask-v0", "opd_agents.envs.prompt_task:PromptTask")
register("opd_agents/Shop-v0", "opd_agents.envs.web.shop:Shop")
register("opd_agents/ShopText-v0", "opd_agents.envs.web.shop:ShopText")
register("opd_agents/ReasoningGym-v0", "opd_agents.envs.adapters.reasoning_gym:ReasoningGym")
register("opd_agents/Retrieval-v0", "opd_agents.envs.retrieval:Retrieval")
for _task in MINIWOB:
    _class = "ScriptedMiniWob" if _task in SCRIPTED else "MiniWob"
    register(f"opd_agents/MiniWoB.{_task}-v0", f"opd_agents.envs.web.miniwob:{_class}", task=_task)
register("opd_agents/BabyAI-v0", "opd_agents.envs.adapters.babyai:BabyAI")
register("opd_agents/GymText-v0", "opd_agents.envs.adapters.gym_text:GymText")
register("opd_agents/ScienceWorld-v0", "opd_agents.envs.adapters.scienceworld:ScienceWorld")
register("opd_agents/TextWorld-v0", "opd_agents.envs.adapters.textworld:TextWorld")
