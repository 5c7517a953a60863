"""A tool is a typed Python function that a model may call: its signature is the JSON schema."""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
import pydantic_core

from opd_agents.errors import EnvironmentContractError, OpdError
from opd_agents.types import ToolSpec


class ToolError(OpdError):
    """A call that was refused or failed in a foreseen way; the agent reads the message."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: what the model is told (``spec``) and the function behind it.

    ``arguments`` is the pydantic model that checks the arguments; without one (a remote tool that checks
    them itself) they reach the function as they are.
    """

    spec: ToolSpec
    function: Callable[..., Any]
    arguments: type[pydantic.BaseModel] | None = None

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> Tool:
        """The tool of a typed function or bound method: name, docstring, and schema of its parameters.

        ``Annotated[str, pydantic.Field(description=...)]`` describes a parameter. Raises
        EnvironmentContractError for a parameter without an annotation, or one that cannot be passed by name.
        """
        if isinstance(function, types.MethodType):
            spec, arguments = _describe(function.__func__, skip_self=True)
        else:
            spec, arguments = _describe(function, skip_self=False)
        return cls(spec, function, arguments)

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """Check ``arguments``, run the tool, and return its result as text (JSON unless it is a string).

        Raises ToolError on arguments that do not fit the schema, and whatever the function raises.
        """
        if self.arguments is None:
            return to_json(self.function(**arguments))
        try:
            # Validated as JSON, not as Python: strict there means "what the schema says", dates included.
            checked = self.arguments.model_validate_json(json.dumps(arguments))
        except pydantic.ValidationError as error:
            raise ToolError(f"bad arguments for {self.spec.name}: {_explain(error)}") from error
        given = {name: getattr(checked, name) for name in checked.model_fields_set}
        return to_json(self.function(**given))


def to_json(result: Any) -> str:
    """A tool's result as text: a string as it is, anything else as compact JSON, keys in their order."""
    return result if isinstance(result, str) else pydantic_core.to_json(result).decode()


@functools.lru_cache(maxsize=1024)  # a schema costs a millisecond, and environments are made by the thousand
def _describe(function: Callable[..., Any], skip_self: bool) -> tuple[ToolSpec, type[pydantic.BaseModel]]:
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())[skip_self:]
    fields: dict[str, Any] = {}
    for parameter in parameters:
        where = f"parameter {parameter.name!r} of tool {function.__name__!r}"
        if parameter.annotation is parameter.empty:
            raise EnvironmentContractError(
                f"{where} has no type annotation; the tool's JSON schema is made from it"
            )
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise EnvironmentContractError(f"{where} cannot be passed by name, as every tool argument is")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (parameter.annotation, default)
    config = pydantic.ConfigDict(extra="forbid", strict=True)
    model: type[pydantic.BaseModel] = pydantic.create_model(function.__name__, __config__=config, **fields)
    description = inspect.getdoc(function) or ""
    return ToolSpec(function.__name__, description, without_titles(model.model_json_schema())), model


def without_titles(schema: Any) -> Any:
    """Pydantic's generated titles repeat the names and would cost prompt tokens."""
    if isinstance(schema, list):
        return [without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # A parameter may itself be called "title": under "properties" the keys are names, not keywords.
    return {
        key: {name: without_titles(item) for name, item in value.items()}
        if key in ("properties", "$defs")
        else without_titles(value)
        for key, value in schema.items()
        if key != "title"
    }


def _explain(error: pydantic.ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(map(str, item["loc"]))
        parts.append(f"{place}: {item['msg']}" if place else item["msg"])
    return "; ".join(parts)
