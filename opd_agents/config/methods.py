"""The shipped method presets."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import yaml

from opd_agents.errors import UnknownName

METHODS = importlib.resources.files("opd_agents.configs.methods")


def method_text(name: str) -> str:
    """The YAML of a shipped method preset."""
    known = _method_names()
    if name not in known:
        raise UnknownName("method", name, known, "opd-agents methods")
    return METHODS.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def list_methods() -> list[dict[str, Any]]:
    """The shipped presets, those of a family together: name, title, paper, family, signal, formula, cost,
    verified, config."""
    rows = [{"name": name} | yaml.safe_load(method_text(name)) for name in _method_names()]
    return sorted(rows, key=lambda row: (row["family"], row["name"]))


def _method_names() -> list[str]:
    return sorted(Path(entry.name).stem for entry in METHODS.iterdir() if entry.name.endswith(".yaml"))
