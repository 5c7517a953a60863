"""reasoning-gym's generators as environments."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.envs.adapters.formulas import is_list, is_polynomial
from opd_agents.envs.adapters.reasoning_gym import (
    FORMULAS,
    LISTS,
    NO_ANSWER,
    UNFIT,
    ReasoningGym,
    drawn,
    generator,
)
from opd_agents.errors import MissingPart, UnknownName, UserError
from opd_agents.fuzzing import RAW, TEXTS, fuzz
from opd_agents.testing import check_agent_env

pytestmark = pytest.mark.real("reasoning_gym")


def begin(env: ReasoningGym, task: int = 0, split: str = "train") -> str:
    return env.reset(seed=0, options={"split": split, "task_id": str(task)})[0]


def solved(env: ReasoningGym, answer: str) -> tuple[float, bool, bool]:
    _, reward, terminated, _, info = env.step(answer)
    return reward, terminated, bool(info.get("success"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attempts": 3},
        {"dataset": "graph_color"},
        {"dataset": "gsm_symbolic"},
        {"dataset": "letter_counting"},
    ],
)
def test_keeps_the_environment_contract(options: dict[str, Any]) -> None:
    check_agent_env("opd_agents/ReasoningGym-v0", n_tasks=3, **options)


def test_the_answer_is_the_text_or_what_is_tagged_in_it() -> None:
    env = ReasoningGym()
    question = begin(env)
    answer = str(drawn("chain_sum", "{}", "train", "0")["answer"])
    assert question == drawn("chain_sum", "{}", "train", "0")["question"]
    for text, reward in (
        (answer, 1.0),
        (f" {answer}\n", 1.0),
        (f"<answer>7x</answer> no: <answer> {answer} </answer>.", 1.0),
        ("<answer>7x</answer>", 0.0),
        ("", 0.0),
        ("[1, 2]", 0.0),
    ):
        begin(env)
        assert solved(env, text) == (reward, True, reward == 1)


def test_several_attempts_and_forks_between_them() -> None:
    env = ReasoningGym(attempts=3)
    begin(env, 4, "validation")
    assert env.step("7x")[0] == "Wrong. Attempts left: 2."
    twin = env.fork()
    assert env.step("8x")[0] == "Wrong. Attempts left: 1."
    assert solved(env, "9x") == (0.0, True, False)
    assert solved(twin, twin.expert_action()) == (1.0, True, True)


def test_a_config_changes_the_questions_and_partial_scores_are_no_success() -> None:
    plain, long = ReasoningGym(), ReasoningGym(config={"min_terms": 9, "max_terms": 9})
    assert begin(plain).count(" + ") + begin(plain).count(" - ") < 9 <= len(begin(long).split()) // 2
    env = ReasoningGym("spiral_matrix")
    begin(env)
    exact = str(drawn("spiral_matrix", "{}", "train", "0")["answer"])
    assert solved(env, str(exact.split())) == (0.1, True, False)


def test_no_question_is_in_two_splits_however_few_there_are() -> None:
    few = '{"max_terms": 2, "max_digits": 1, "min_terms": 2}'
    asked = {
        split: {drawn("chain_sum", few, split, str(task))["question"] for task in range(150)}
        for split in ("train", "validation", "test")
    }
    assert len(asked["train"] | asked["validation"] | asked["test"]) == sum(map(len, asked.values()))
    with pytest.raises(UserError, match="has too few different questions for a split 'no_such_split'"):
        drawn("chain_sum", few, "no_such_split", "0")


def test_questions_are_the_same_in_every_process() -> None:
    code = (
        "from opd_agents.envs.adapters.reasoning_gym import drawn\n"
        "for name in ('chain_sum', 'gsm_symbolic', 'letter_counting', 'syllogism'):\n"
        "    print(drawn(name, '{}', 'test', '3')['question'])"
    )
    env = {"PYTHONHASHSEED": "5", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    here = [
        drawn(n, "{}", "test", "3") for n in ("chain_sum", "gsm_symbolic", "letter_counting", "syllogism")
    ]
    assert done.stdout == "".join(f"{item['question']}\n" for item in here)


@pytest.mark.parametrize("dataset", [*LISTS, *FORMULAS])
def test_an_answer_that_is_code_is_never_run(dataset: str, capfd: pytest.CaptureFixture[str]) -> None:
    env = ReasoningGym(dataset)
    for code in (
        "print('RUN')",
        "[print('RUN')]",
        "__import__('os').system('echo RUN')",
        "(lambda: print('RUN'))()",
        "[0] * 10**10",
        "9**9**9**9",
        "99999999!!",
        "exp(99999999999)",
        "x" + "**2" * 200,
        "(" * 5000,
    ):
        begin(env)
        assert solved(env, code)[0] < 0.1
    assert "RUN" not in capfd.readouterr().out
    begin(env)
    assert solved(env, env.expert_action()) == (1.0, True, True)


def test_what_may_be_evaluated() -> None:
    assert all(map(is_polynomial, ("1 + 2", "-9*x**8/10 + 3*x**4/2 + C", "(5 - 1)*(7 + 3.5)", "2")))
    for text in (
        "sin(x)",
        "x**101",
        "2**3",
        "x.real",
        "1/(x + 1)",
        "xx",
        "x**y",
        "[1]",
        "'a'",
        "2**64 + 1j",
        "",
    ):
        assert not is_polynomial(text), text
    assert all(map(is_list, ("[1, 'a']", "_ Q\nQ _", "EAB", "1 2 3", "")))
    assert not any(map(is_list, ("[f()]", "f()", "[0] * 9", "a.b")))


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from([*LISTS, *FORMULAS, "chain_sum"]), st.text() | st.sampled_from([*RAW, *TEXTS]))
def test_whatever_is_answered_is_judged(dataset: str, text: str) -> None:
    env = ReasoningGym(dataset, attempts=2)
    begin(env, 1)
    assert env.step(text)[0] or env.over


def test_many_hostile_answers_are_judged() -> None:
    assert fuzz(ReasoningGym(attempts=5), 300)["fine"] == 300


@pytest.mark.slow
def test_the_experts_answer_scores_for_every_generator() -> None:
    from reasoning_gym.factory import DATASETS

    unsolved = set()
    for dataset in sorted(DATASETS.keys() - UNFIT.keys() - {"composite"}):
        env = ReasoningGym(dataset)
        begin(env)
        if not solved(env, env.expert_action())[2]:
            unsolved.add(dataset)
    assert unsolved == set(NO_ANSWER)


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="chain_sum"):
        ReasoningGym("chain_sums")
    with pytest.raises(UserError, match="refuses the config"):
        ReasoningGym(config={"no_such_setting": 1})
    with pytest.raises(UserError, match="attempts must be at least 1"):
        ReasoningGym(attempts=0)
    with pytest.raises(UserError, match="knight_swap cannot be used: its questions differ"):
        ReasoningGym("knight_swap")
    with pytest.raises(UserError, match="config must be plain data by name"):
        ReasoningGym(config={"x": object()})
    generator.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingPart, match=r"opd-agents\[reasoning\]"):
        ReasoningGym()
