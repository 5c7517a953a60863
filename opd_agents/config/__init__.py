"""The typed configuration of a run: YAML in, frozen pydantic models out, unknown keys refused."""

from opd_agents.config.base import Adaptive, Schedule, Scheduled, Section, SignedScheduled
from opd_agents.config.loading import (
    EXPERIMENTS,
    absolute_inputs,
    load_config,
    merge,
    parse_overrides,
    read_yaml,
)
from opd_agents.config.loss import (
    Component,
    CrossEntropy,
    Distill,
    Entropy,
    Loss,
    Policy,
    Preference,
    ReferencePart,
    RewardPart,
    Select,
)
from opd_agents.config.methods import list_methods, method_text
from opd_agents.config.needs import Need, reference_needs
from opd_agents.config.run import RunConfig
from opd_agents.config.sections import (
    ChatSettings,
    Correction,
    Demonstrations,
    EnvironmentSource,
    Lora,
    Recorded,
    Student,
)
from opd_agents.config.teachers import Conditioning, Local, PlugIn, Self, Teacher, conditioning_of
from opd_agents.config.weights import Weight

__all__ = [
    "EXPERIMENTS",
    "Adaptive",
    "ChatSettings",
    "Component",
    "Conditioning",
    "Correction",
    "CrossEntropy",
    "Demonstrations",
    "Distill",
    "Entropy",
    "EnvironmentSource",
    "Local",
    "Lora",
    "Loss",
    "Need",
    "PlugIn",
    "Policy",
    "Preference",
    "Recorded",
    "ReferencePart",
    "RewardPart",
    "RunConfig",
    "Schedule",
    "Scheduled",
    "Section",
    "Select",
    "Self",
    "SignedScheduled",
    "Student",
    "Teacher",
    "Weight",
    "absolute_inputs",
    "conditioning_of",
    "list_methods",
    "load_config",
    "merge",
    "method_text",
    "parse_overrides",
    "read_yaml",
    "reference_needs",
]
