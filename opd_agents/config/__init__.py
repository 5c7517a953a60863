"""The typed configuration of a run: YAML in, frozen pydantic models out, unknown keys refused."""

from opd_agents.config.loading import (
    EXPERIMENTS,
    absolute_inputs,
    load_config,
    merge,
    parse_overrides,
    read_yaml,
)
from opd_agents.config.methods import list_methods, method_text
from opd_agents.config.sections import (
    ChatSettings,
    Component,
    Correction,
    EnvironmentSource,
    Lora,
    Loss,
    Recorded,
    RunConfig,
    Schedule,
    Scheduled,
    Section,
    Select,
    Student,
)

__all__ = [
    "EXPERIMENTS",
    "ChatSettings",
    "Component",
    "Correction",
    "EnvironmentSource",
    "Lora",
    "Loss",
    "Recorded",
    "RunConfig",
    "Schedule",
    "Scheduled",
    "Section",
    "Select",
    "Student",
    "absolute_inputs",
    "list_methods",
    "load_config",
    "merge",
    "method_text",
    "parse_overrides",
    "read_yaml",
]
