"""The simulators of a BFCL multi-turn task: opened, called, compared and measured."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import random
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias

from opd_agents.envs.adapters.bfcl_data import bfcl
from opd_agents.tools import ToolError
from opd_agents.types import ToolCall

World: TypeAlias = dict[str, Any]  # class name -> simulator
Entry: TypeAlias = Mapping[str, Any]

# What no honest call comes near, and what would take for ever: digits of a number, copies within copies.
DIGITS, COUNT = ("precision", "decimal_places", "exponent"), 1000
NODES, DEPTH = 20_000, 64
# Not state: a cycle, the wall clock, a constant; the current folder is told by its path.
HIDDEN = ("parent", "_last_modified", "_api_description", "_current_dir")


def opening(entry: Entry) -> World:
    """The simulators as the task begins."""
    stateless = bfcl("constants.executable_backend_config").STATELESS_CLASSES
    world: World = {}
    for name in entry["involved_classes"]:
        world[name] = simulator_class(name)()
        if name not in stateless:
            scenario = copy.deepcopy(entry["initial_config"].get(name, {}))
            world[name]._load_scenario(scenario, long_context="long_context" in entry["id"])
    return world


@cache
def simulator_class(name: str) -> Any:
    modules = bfcl("constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
    return vars(importlib.import_module(modules[name]))[name]


def execute(world: World, call: ToolCall) -> str:
    """Run one call; its result as the official run prints it. Raises ToolError for whatever goes wrong.

    Any public function can be called, also one that the task withholds for now: so it is in the official run.
    """
    owners = {name: simulator for simulator in world.values() for name in public(simulator.__class__)}
    if call.name not in owners:
        raise ToolError(f"unknown tool {call.name!r}")
    for name in DIGITS:
        value = call.arguments.get(name)
        if isinstance(value, int | float) and abs(value) > COUNT:
            raise ToolError(f"{name} must lie within {COUNT}")
    try:
        result = getattr(owners[call.name], call.name)(**copy.deepcopy(dict(call.arguments)))
        return result if isinstance(result, str) else _printed(result)
    except Exception as error:  # whatever a simulator makes of nonsense
        raise ToolError(f"{type(error).__name__}: {error}") from error


def _printed(result: Any) -> str:
    if not isinstance(result, dict):
        return str(result)
    try:
        return json.dumps(result)
    except (TypeError, ValueError):
        return str(result)


@cache
def public(simulator: Any) -> dict[str, inspect.Signature]:
    """The functions that a simulator offers, by its class."""
    found = inspect.getmembers(simulator, inspect.isfunction)
    return {name: inspect.signature(method) for name, method in found if not name.startswith("_")}


def gold_calls(entry: Entry, request: int) -> list[ToolCall]:
    """The official calls for one request."""
    classes = [simulator_class(name) for name in entry["involved_classes"]]
    signatures = {name: signature for cls in classes for name, signature in public(cls).items()}
    return [_read(text, signatures) for text in entry["gold"][request]]


def _read(text: str, signatures: Mapping[str, inspect.Signature]) -> ToolCall:
    """A call written as Python, its arguments by name."""
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.Call)  # of the package's own data
    name = ast.unparse(node.func)
    names = [*signatures[name].parameters][1:]  # without self
    given = {key: ast.literal_eval(value) for key, value in zip(names, node.args, strict=False)}
    named = {str(item.arg): ast.literal_eval(item.value) for item in node.keywords}
    return ToolCall(name, given | named)


def gold_outcome(entry: Entry, request: int) -> tuple[World, list[str]]:
    """The simulators after the official calls up to and with a request, and the results of its own."""
    world = opening(entry)
    results: list[str] = []
    for number in range(request + 1):
        results = [execute(world, call) for call in gold_calls(entry, number)]
    return world, results


def too_large(world: World) -> bool:
    """Whether the files and folders are more than can be walked in good time, or nested too deep."""
    pending = [(simulator.root, 0) for simulator in world.values() if "root" in vars(simulator)]
    seen = 0
    while pending:
        node, depth = pending.pop()
        seen += 1
        if depth > DEPTH or seen > NODES:
            return True
        pending += [(item, depth + 1) for item in vars(node).get("contents", {}).values()]
    return False


def plain(value: Any) -> Any:
    """The state of simulators as JSON data."""
    match value:
        case int() if abs(value) >= 2**63:
            return hex(value)  # decimal digits are limited
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case random.Random():
            return repr(value.getstate())
    if not type(value).__module__.startswith("bfcl_eval."):
        return repr(value)
    state = {key: plain(item) for key, item in vars(value).items() if key not in HIDDEN}
    return state | (value.pwd() if "_current_dir" in vars(value) else {})
