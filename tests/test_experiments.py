"""The shipped experiments on real environments: teacher, student and measurement are of one world."""

from opd_agents.config import load_config
from opd_agents.evaluation.suites import load_suite


def test_babyai_student_and_its_teacher_play_the_tasks_that_they_are_measured_on() -> None:
    teacher, student = load_config("babyai_teacher"), load_config("babyai_opd").stages["distill"]
    assert teacher.environments == student.environments
    assert student.teacher and student.student.build and student.evaluation
    assert student.teacher.model == student.student.build.tokenizer == f"runs/{teacher.name}"
    [measured] = load_suite(student.evaluation.suite).environments
    assert measured.options == student.environments[0].options and measured.tasks == 300
