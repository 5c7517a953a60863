"""Options that several commands take, and what they say."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from opd_agents.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="Make the environment with it: tasks=FILE; repeatable."
    ),
]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="Of api:MODEL; default: OPENAI_BASE_URL, else OpenAI's.")
]
KeyName = Annotated[
    str | None,
    typer.Option("--key-env", metavar="NAME", help="The variable with its key; default: OPENAI_API_KEY."),
]


def shipped(kind: str) -> str:
    """The names of the YAML files in ``configs/<kind>``."""
    entries = importlib.resources.files(f"opd_agents.configs.{kind}").iterdir()
    return ", ".join(
        sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))
    )


def environment_options(given: Sequence[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` strings as the arguments of an environment; paths count from the working folder."""
    from opd_agents.config import absolute_inputs, parse_overrides

    return absolute_inputs(parse_overrides(given or ()), Path.cwd())


def endpoint(base_url: str | None, key_env: str | None) -> Any:
    """Of ``api:MODEL``. A server of one's own, such as vLLM's, asks for no key unless one is named."""
    from pydantic import ValidationError

    from opd_agents.config import Endpoint

    key = key_env or ("OPENAI_API_KEY" if base_url is None or "OPENAI_API_KEY" in os.environ else None)
    try:
        return Endpoint(base_url=base_url, key=key)
    except ValidationError as error:
        raise ConfigError(f"--base-url or --key-env: {error.errors()[0]['msg']}") from None
