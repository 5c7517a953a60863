"""Teachers: trajectory in, signal out; a teacher never changes the trajectory."""

from opd_agents.teachers.base import (
    Capability,
    HiddenStates,
    SampledLogprobs,
    SpanLogprobs,
    Teacher,
    TeacherSignal,
    TeacherTopK,
)

__all__ = [
    "Capability",
    "HiddenStates",
    "SampledLogprobs",
    "SpanLogprobs",
    "Teacher",
    "TeacherSignal",
    "TeacherTopK",
]
