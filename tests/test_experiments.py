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


def test_all_code_of_the_codefix_student_runs_in_docker() -> None:
    teacher, opd = load_config("codefix_teacher"), load_config("codefix_opd")
    student = opd.stages["distill"]
    assert student.teacher and student.student.build and student.evaluation
    assert student.teacher.model == student.student.build.tokenizer == f"runs/{teacher.name}"
    [measured], [source] = load_suite(student.evaluation.suite).environments, student.environments
    assert measured.options == source.options and "sandbox" not in source.options  # docker is the default
    assert teacher.rollout.actors == opd.stages["cold_start"].rollout.actors == set()  # recordings only


def test_miniwob_student_and_its_teacher_play_the_tasks_that_they_are_measured_on() -> None:
    teacher, student = load_config("miniwob_teacher"), load_config("miniwob_opd").stages["distill"]
    assert teacher.environments == student.environments
    assert student.teacher and student.student.build and student.evaluation and teacher.evaluation
    assert student.teacher.model == student.student.build.tokenizer == f"runs/{teacher.name}"
    assert student.evaluation.suite == teacher.evaluation.suite == student.environments[0].id


def test_the_stages_of_the_pipeline_hand_on_what_they_know() -> None:
    stages = load_config("pipeline").stages
    assert list(stages) == ["cold_start", "opd", "rl", "self"]
    assert [stage.method for stage in stages.values()] == ["sft", "gkd", "grpo", "rlsd"]
    opd, rl = stages["opd"], stages["rl"]
    assert opd.environments == rl.environments and opd.environments[0].limit  # else no task is met twice
    assert opd.rollout.curriculum and opd.rollout.curriculum.band is None
    assert rl.rollout.curriculum and rl.rollout.curriculum.band
    assert opd.trainer.until and rl.trainer.until and opd.evaluation
