"""What a BFCL single-turn task offers, the official verdict on an answer, and an answer that it accepts."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias

from opd_agents.envs.adapters.bfcl_data import bfcl, tool_spec
from opd_agents.tools import random_call
from opd_agents.types import ToolCall, ToolSpec

Entry: TypeAlias = Mapping[str, Any]
MODEL = "opd-agents"


def category(entry: Entry) -> str:
    return str(entry["id"]).rpartition("_")[0]


def language(entry: Entry) -> str:
    """What the values of arguments are written in."""
    return {"simple_java": "Java", "simple_javascript": "JavaScript"}.get(category(entry), "Python")


def offered(entry: Entry) -> tuple[ToolSpec, ...]:
    """The functions; those of Java and JavaScript take each argument as source text."""
    if language(entry) == "Python":
        return tuple(tool_spec(doc) for doc in entry["function"])
    return tuple(tool_spec(_in_source(doc, language(entry))) for doc in entry["function"])


def _in_source(doc: Mapping[str, Any], language: str) -> dict[str, Any]:
    properties = {}
    for name, item in doc["parameters"]["properties"].items():
        inner = f" of {item['items']['type']}" if "items" in item else ""
        fields = f" with the fields {', '.join(item['properties'])}" if "properties" in item else ""
        hint = f"As {language} source text, type {item['type']}{inner}{fields}."
        properties[name] = {"type": "string", "description": f"{item['description']} {hint}"}
    return {**doc, "parameters": {**doc["parameters"], "properties": properties}}


def judge(entry: Entry, calls: Sequence[ToolCall]) -> bool:
    """The official verdict."""
    if "gold" not in entry:
        return bool(calls) == ("irrelevance" not in category(entry))
    answer = [{call.name: dict(call.arguments)} for call in calls]
    spoken = bfcl("constants.enums").Language[language(entry).upper()]
    try:
        verdict = ast_checker()(entry["function"], answer, entry["gold"], spoken, category(entry), MODEL)
    except Exception:  # it compares values before it knows their types
        return False
    return bool(verdict["valid"])


@cache
def ast_checker() -> Callable[..., dict[str, Any]]:
    """The official checker, in a copy of our own. Of the table of models, whose import takes the libraries of
    all vendors, it wants only to know whether dots in names are written as underscores, as ours are."""
    spec = importlib.util.find_spec(f"{bfcl('eval_checker.ast_eval').__name__}.ast_checker")
    assert spec is not None and spec.loader is not None  # bfcl-eval is there
    name = "bfcl_eval.constants.model_config"
    table, theirs = ModuleType(name), sys.modules.get(name)
    vars(table)["MODEL_CONFIG_MAPPING"] = {MODEL: SimpleNamespace(underscore_to_dot=True)}
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = table
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
        if theirs is not None:
            sys.modules[name] = theirs
    return module.ast_checker


def solution(entry: Entry) -> list[ToolCall]:
    """Calls that the checker accepts: the first official ones, any where any will do, none where none may."""
    if "gold" not in entry:
        return [] if "irrelevance" in category(entry) else [random_call(offered(entry), random.Random(0))]
    for quote in (
        '"',
        "",
    ):  # of texts within Java's and JavaScript's lists, where the checker is of two minds
        calls = [_first(entry, gold, quote) for gold in entry["gold"]]
        if judge(entry, calls):
            break
    return calls


def _first(entry: Entry, gold: Mapping[str, Any], quote: str) -> ToolCall:
    ((name, accepted),) = gold.items()
    doc = next(doc for doc in entry["function"] if doc["name"] == name)
    properties, required = doc["parameters"]["properties"], doc["parameters"]["required"]
    arguments: dict[str, Any] = {}
    for key, values in accepted.items():
        given = [value for value in values if value != ""]
        if "" in values and (key not in properties or not (given or key in required)):
            continue  # "" says that it may be left out
        value = _settled((given or values or [[]])[0])
        if language(entry) != "Python":
            inner = properties[key].get("items", {}).get("type", "")
            value = _source(value, properties[key]["type"], inner, quote)
        arguments[key] = value
    return ToolCall(name.replace(".", "_"), arguments)


def _settled(value: Any) -> Any:
    """One value of those that an answer accepts: within an object every field lists its choices."""
    if isinstance(value, list):
        return [_settled(item) for item in value]
    if not isinstance(value, dict):
        return value
    listed = {key: values if isinstance(values, list) else [values] for key, values in value.items()}
    given = {key: [v for v in values if v != ""] for key, values in listed.items()}
    return {
        key: _settled(given[key][0]) if given[key] else ""
        for key, values in listed.items()
        if given[key] or "" not in values
    }


def _source(value: Any, type: str, inner: str, quote: str) -> str:
    """A value as source text of ``type`` (of ``inner``), which Java and JavaScript name differently."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"{quote}{value}{quote}" if type == "" else value
    if isinstance(value, int | float):
        return str(value) + {"long": "L", "Bigint": "n"}.get(type, "")
    if isinstance(value, list):
        items = ", ".join(_source(item, "" if isinstance(item, str) else inner, "", quote) for item in value)
        forms = {"Array": "new Object[]{%s}", "ArrayList": "new ArrayList<Object>(Arrays.asList(%s))"}
        return forms.get(type, "[%s]") % items
    if type == "dict":
        return "{" + ", ".join(f"{key}: {_source(item, '', '', '')}" for key, item in value.items()) + "}"
    puts = " ".join(f'put("{key}", {_source(item, "", "", "")});' for key, item in value.items())
    return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
