"""YAML in, :class:`RunConfig` out.

Precedence: defaults, method preset, file, stage, command line. Mappings merge, lists replace. Relative
input paths in a file count from that file's folder; those on the command line, and ``output``, from the
working folder.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from opd_agents.config.base import PLUG_IN
from opd_agents.config.methods import method_text
from opd_agents.config.run import RunConfig
from opd_agents.errors import ConfigError, UnknownName

INPUTS = ("model", "tokenizer", "dataset", "tasks", "trajectories")  # keys whose values are paths, or ids
TYPE = re.compile(r"constrained-\w+|float|[\w-]*\[.*\]")  # as pydantic calls one of several in a place
EXPERIMENTS = importlib.resources.files("opd_agents.configs.experiments")


def load_config(source: str | Path | Mapping[str, Any], *overrides: str) -> RunConfig:
    """Read a config from a YAML file, the name of a shipped experiment, or a mapping.

    ``overrides`` are ``dotted.key=value`` strings, values in YAML. Raises ConfigError naming the key, and
    UnknownName for a method or experiment that does not exist.
    """
    if isinstance(source, Mapping):
        raw, label = dict(source), "config"
    else:
        path = find_experiment(source)
        raw, label = absolute_inputs(read_yaml(path), path.parent), str(path)
    given = absolute_inputs(parse_overrides(overrides), Path.cwd())
    stages, given_stages = _pop_stages(raw, label), _pop_stages(given, "command line")
    if unknown := given_stages.keys() - stages.keys():
        known = ", ".join(stages) or "no stages"
        raise ConfigError(f"command line: unknown stage `stages.{min(unknown)}`; {label} has {known}.")
    base = _layered(raw, given)
    if not stages:
        return _validate(base, label)
    folder = Path(base.get("output") or f"runs/{base.get('name')}")
    resolved = {}
    for name, stage in stages.items():
        own = {"name": f"{base.get('name')}-{name}", "output": str(folder / name)}
        resolved[name] = _layered(merge(raw, stage), merge(given, given_stages.get(name, {}))) | own
        _validate(resolved[name], f"{label}, stage {name!r}")
    return _validate(base | {"stages": resolved}, label)


def _layered(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Method preset, then file, then command line; any of the last two may name the method."""
    own = merge(file, given)
    return merge(_preset(own), own)


def _pop_stages(raw: dict[str, Any], label: str) -> dict[str, dict[str, Any]]:
    """Take ``stages`` out of ``raw``."""
    stages = raw.pop("stages", None) or {}
    if not isinstance(stages, Mapping) or not all(isinstance(s, Mapping | None) for s in stages.values()):
        raise ConfigError(f"{label}: `stages` must map the name of each stage to its settings.")
    return {str(name): dict(stage or {}) for name, stage in stages.items()}


def find_experiment(source: str | Path) -> Path:
    """The path of a config file, or of a shipped experiment by its name."""
    path = Path(source)
    if path.is_file():
        return path
    files = [Path(str(entry)) for entry in EXPERIMENTS.iterdir()]
    shipped = {file.stem: file for file in files if file.suffix == ".yaml"}
    if str(source) in shipped:
        return shipped[str(source)]
    if path.suffix in (".yaml", ".yml"):
        names = ", ".join(sorted(shipped))
        raise ConfigError(f"No config file {source}. Give the path of a YAML file, or one of: {names}.")
    raise UnknownName("experiment", str(source), shipped, "opd-agents train --help")


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, found {type(raw).__name__}.")
    return raw


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``: mappings merge, everything else replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def absolute_inputs(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Checkpoints and files that exist below ``folder`` made absolute; other strings may be ids or names."""
    return {key: _absolute(key, value, folder) for key, value in raw.items()}


def _absolute(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return absolute_inputs(value, folder)
    if isinstance(value, list):
        return [_absolute(key, item, folder) for item in value]
    is_input = isinstance(value, str) and (
        (key in INPUTS and value) or value.endswith((".jinja", ".py", ".yaml", ".yml"))
    )
    return str((folder / value).resolve()) if is_input and (folder / value).exists() else value


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``dotted.key=value`` strings as a mapping, values in YAML. Raises ConfigError."""
    result: dict[str, Any] = {}
    for item in overrides:
        dotted, sign, text = item.partition("=")
        if not sign or not dotted:
            raise ConfigError(f"Cannot read {item!r}: write overrides as key=value, such as trainer.steps=5.")
        try:
            value: Any = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            raise ConfigError(f"Cannot read {item!r}: the value of `{dotted}` is no valid YAML.") from None
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        for key in reversed(dotted.split(".")):
            value = {key: value}
        result = merge(result, value)
    return result


def _preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    method = raw.get("method")
    return dict(yaml.safe_load(method_text(str(method))).get("config", {})) if method else {}


def _validate(raw: Mapping[str, Any], label: str) -> RunConfig:
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{label}: " + "; ".join(map(_explain, _relevant(error.errors())))) from None


def _relevant(errors: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The errors; of those of a value that may be of several types, the ones as the nearest of these."""
    places: dict[tuple[Any, ...], dict[Any, list[Mapping[str, Any]]]] = {}
    for item in errors:
        place = item["loc"]
        split = _followed(place).types[:1] or [len(place)]
        places.setdefault(place[: split[0]], {}).setdefault(place[split[0] :][:1], []).append(item)
    return [item for types in places.values() for item in _nearest(list(types.values()))]


def _nearest(types: Sequence[list[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    """The errors as the type that has the fewest; all those that are as near."""
    distances = [(any(map(_of_another_type, items)), len(items)) for items in types]
    for distance, items in zip(distances, types, strict=True):
        if distance == min(distances):
            yield from items


def _of_another_type(item: Mapping[str, Any]) -> bool:
    """Such as a mapping where a number should be."""
    word_asked = item["type"] in ("literal_error", "enum") and isinstance(item["input"], dict | list)
    return word_asked or item["type"].endswith("_type")


def _explain(item: Mapping[str, Any]) -> str:
    keys, section, _ = _followed(item["loc"])
    location = ".".join(keys)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], list(section.model_fields), n=1, cutoff=0.5)
        return f"unknown key `{location}`" + (f", did you mean `{near[0]}`?" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "union_tag_invalid":
        known = item["ctx"]["expected_tags"].replace("'", "")
        message = f"unknown kind {item['ctx']['tag']!r}; known are {known}"
    if item["type"] == "string_pattern_mismatch" and item["ctx"]["pattern"] == PLUG_IN:
        message = "no `module:name` of yours either"
    if item["type"] == "union_tag_not_found":
        message = "`kind` is missing"
    return f"`{location}`: {message}" if location else message


class Followed(NamedTuple):
    """The ``keys`` of a place as they stand in the file, the ``section`` there, and where between the keys
    pydantic says which of several ``types`` it means."""

    keys: list[str]
    section: type[BaseModel]
    types: list[int]


def _followed(location: Sequence[Any]) -> Followed:
    section: type[BaseModel] = RunConfig
    choices: list[type[BaseModel]] = []
    keys, types, free = [], [], False
    for index, part in enumerate(map(str, location)):
        if not free and (chosen := [one for one in choices if part in _kinds(one)]):
            section, choices = chosen[0], []
        elif not free and (TYPE.fullmatch(part) or part in {one.__name__ for one in choices}):
            types.append(index)
        else:
            keys.append(part)
            field = None if free else section.model_fields.get(part)
            free = field is not None and typing.get_origin(field.annotation) is dict  # any key comes next
            if field is not None:
                choices = _sections_in(field.annotation)
                section = choices[0] if choices else section
    return Followed(keys, section, types)


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    field = section.model_fields.get("kind")
    return typing.get_args(field.annotation) if field is not None else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _sections_in(argument)]
