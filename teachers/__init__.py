"""Teachers: trajectory in, signal out; a teacher never changes the trajectory."""

from opd_agents.teachers.base import HiddenStates, SampledLogprobs, Teacher, TeacherSignal, TeacherTopK

__all__ = ["HiddenStates", "SampledLogprobs", "Teacher", "TeacherSignal", "TeacherTopK"]
