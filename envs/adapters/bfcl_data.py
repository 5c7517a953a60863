"""The tasks of BFCL v4, read from the data files of the package bfcl-eval.

The package's own loader is not used: importing it makes folders beside the installed packages.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from opd_agents.envs.adapters.splits import SPLITS, split_of
from opd_agents.errors import MissingPart, UnknownName, UserError
from opd_agents.types import ToolSpec


def bfcl(module: str) -> ModuleType:
    """A module of bfcl-eval, "" for the package. Raises MissingPart."""
    try:
        return importlib.import_module(f"bfcl_eval.{module}".rstrip("."))
    except ImportError as error:
        raise MissingPart(
            f"BFCL needs the package bfcl-eval ({error}). Install it with: opd-agents envs install bfcl"
        ) from error


@cache
def rows(category: str) -> tuple[dict[str, Any], ...]:
    """The tasks of one data file, in its order; ``gold`` is the official answer, where there is one."""
    folder = Path(str(bfcl("").__file__)).parent / "data"
    name = f"BFCL_v4_{category}.json"
    tasks = _lines(folder / name)
    answers = folder / "possible_answer" / name
    if answers.exists():  # none for the tasks whose answer is (not) to call anything
        for task, answer in zip(tasks, _lines(answers), strict=True):
            task["gold"] = answer["ground_truth"]
    return tuple(tasks)


@cache
def simulator_tools(simulator: str) -> tuple[ToolSpec, ...]:
    """The functions of a simulator, which is named by its class."""
    names = bfcl("constants.executable_backend_config").MULTI_TURN_FUNC_DOC_FILE_MAPPING
    folder = Path(str(bfcl("").__file__)).parent / "data" / "multi_turn_func_doc"
    return tuple(tool_spec(doc) for doc in _lines(folder / names[simulator]))


def chosen(given: Sequence[str], known: Sequence[str], env: str) -> tuple[str, ...]:
    """The option ``categories``, checked; empty means all."""
    if isinstance(given, str):
        raise UserError(f"{env}: categories must be a list of names, got {given!r}.")
    for name in given:
        if name not in known:
            raise UnknownName(f"category of {env}", str(name), known, "opd-agents envs")
    return tuple(dict.fromkeys(given)) or tuple(known)


def divided(tasks: Iterable[tuple[str, dict[str, Any]]], divide: bool) -> dict[str, list[dict[str, Any]]]:
    """The splits of (key, task) pairs: all are "test", or each key with all its tasks belongs to one of three
    splits, always the same."""
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in (SPLITS if divide else ["test"])}
    for key, task in tasks:
        splits[split_of(key) if divide else "test"].append(task)
    return {name: found for name, found in splits.items() if found}


def tool_spec(doc: Mapping[str, Any]) -> ToolSpec:
    """A function's description as a tool: a name that chat templates and APIs take, and a JSON schema."""
    parameters = json_schema(doc["parameters"])
    return ToolSpec(doc["name"].replace(".", "_"), doc["description"], {**parameters, "type": "object"})


def json_schema(doc: Mapping[str, Any]) -> dict[str, Any]:
    """BFCL's types are Python's, Java's and JavaScript's; what else it says of a parameter is JSON schema."""
    types = bfcl("constants.type_mappings").GORILLA_TO_OPENAPI
    schema = {**doc, "type": types.get(doc.get("type"), "string")}
    if "properties" in doc:
        schema["properties"] = {name: json_schema(item) for name, item in doc["properties"].items()}
    if "items" in doc:
        schema["items"] = json_schema(doc["items"])
    return schema


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
