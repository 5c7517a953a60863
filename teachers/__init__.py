"""Teachers: trajectory in, signal out; a teacher never changes the trajectory."""

from opd_agents.teachers.base import HiddenStates, Teacher

__all__ = ["HiddenStates", "Teacher"]
