"""BFCL: its tasks, its verdicts, and nothing that an agent can break. All with the package's own data."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from opd_agents.cli import app
from opd_agents.envs import AgentEnv, format_calls, make
from opd_agents.envs.adapters import bfcl_data, install
from opd_agents.envs.adapters.bfcl import STEPS, BfclMultiTurn
from opd_agents.envs.adapters.bfcl_single import BfclSingle
from opd_agents.envs.adapters.bfcl_verdict import judge, solution
from opd_agents.envs.adapters.bfcl_world import gold_calls
from opd_agents.errors import MissingPart, UnknownName, UserError
from opd_agents.evaluation import evaluate
from opd_agents.evaluation.suites import load_suite
from opd_agents.fuzzing import fuzz
from opd_agents.testing import check_agent_env
from opd_agents.tools import random_call
from opd_agents.types import ToolCall

pytestmark = pytest.mark.real("bfcl_eval")

# The official checker refuses every answer to these, the official one included.
IMPOSSIBLE = {
    *("simple_java_36", "simple_java_64", "simple_java_65", "live_simple_106-63-0", "live_simple_112-68-0"),
    *("live_multiple_862-181-3", "live_multiple_964-207-0"),
}


@pytest.fixture(scope="module")
def multi() -> BfclMultiTurn:
    return BfclMultiTurn()


@pytest.fixture(scope="module")
def single() -> BfclSingle:
    return BfclSingle()


def entries(env: BfclMultiTurn | BfclSingle) -> list[dict[str, Any]]:
    return [entry for split in env._splits.values() for entry in split]


def begin(env: AgentEnv, task: int, split: str = "test") -> str:
    return env.reset(seed=0, options={"split": split, "task_id": str(task)})[0]


@pytest.mark.parametrize("env_id", ["opd_agents/BfclMultiTurn-v0", "opd_agents/BfclSingle-v0"])
@pytest.mark.parametrize("divide", [False, True])
def test_keeps_the_environment_contract(env_id: str, divide: bool) -> None:
    check_agent_env(env_id, divide=divide, n_tasks=4)


def test_has_all_tasks_of_the_benchmark(multi: BfclMultiTurn, single: BfclSingle) -> None:
    assert (multi.split_sizes, single.split_sizes) == ({"test": 800}, {"test": 3641})
    for name, size in (("bfcl_multiturn", 800), ("bfcl_single", 3641)):
        suite = load_suite(name)
        assert len(suite.episodes("test", None, 0)) == size
        for source in suite.environments:  # "tasks" of a suite is how many, at most: here it is all
            assert make(source.id, **source.options).split_size("test") == source.tasks


def test_a_division_keeps_what_belongs_together_in_one_split() -> None:
    divided = BfclMultiTurn(divide=True)
    scenarios = {
        split: {entry["id"].rpartition("_")[2] for entry in found} for split, found in divided._splits.items()
    }
    assert list(scenarios) == ["train", "validation", "test"]
    assert sum(map(len, scenarios.values())) == 200 == len(set().union(*scenarios.values()))
    questions = [{str(e["question"]) for e in found} for found in BfclSingle(divide=True)._splits.values()]
    assert (
        not questions[0] & questions[1]
        and not questions[0] & questions[2]
        and not questions[1] & questions[2]
    )


def test_the_official_calls_succeed_on_every_tenth_task(multi: BfclMultiTurn) -> None:
    for task in range(0, 800, 10):
        begin(multi, task)
        info: dict[str, Any] = {}
        while not multi.over:
            *_, info = multi.step(multi.expert_action())
            assert info["tool_error"] is None
        assert info["success"], info["entry"]


def test_the_official_answers_are_accepted_but_for_seven(single: BfclSingle) -> None:
    refused = {entry["id"] for entry in entries(single) if not judge(entry, solution(entry))}
    assert refused == IMPOSSIBLE
    told = set()
    for source in load_suite("bfcl_single").environments:
        env = BfclSingle(**source.options)
        told |= {entries(env)[int(task)]["id"] for task in source.known_bad}
    assert told == IMPOSSIBLE


def test_the_suites_bad_multi_turn_task_wants_what_its_tool_does_not_give() -> None:
    for source in load_suite("bfcl_multiturn").environments:
        env = BfclMultiTurn(**source.options)
        (task,) = map(int, source.known_bad)
        begin(env, task)
        wanted = str(entries(env)[task]["gold"][-1]).split("content='")[1].split("'")[0]
        result = env.step('{"name": "sort", "arguments": {"file_name": "report.txt"}}')[0]
        assert "sorted_content" in result and wanted not in result


def changed(calls: list[ToolCall], rng: random.Random, env: BfclMultiTurn) -> list[list[ToolCall]]:
    """The calls in steps, perhaps with one too few, too many, changed or unknown, or in another order."""
    steps = [[call] for call in calls] if rng.random() < 0.5 else [list(calls)]
    step = rng.choice(steps or [[]])
    match rng.randrange(8):
        case 0 if step:
            del step[rng.randrange(len(step))]
        case 1 if step:
            step.append(rng.choice(step))
        case 2:
            steps.insert(rng.randint(0, len(steps)), [random_call(env.tools, rng, ["temp", "a.txt", ".."])])
        case 3:
            steps.insert(0, [ToolCall("nothing_here", {"x": 1})])
        case 4:
            steps = []
        case 5 if step and step[0].arguments:
            name = rng.choice(list(step[0].arguments))
            value = rng.choice([str(step[0].arguments[name]), 5, "zzz", None, [1], True])
            step[0] = ToolCall(step[0].name, {**step[0].arguments, name: value})
        case 6:
            rng.shuffle(steps)
    return [step for step in steps if step]


def as_python(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"


def official_verdict(played: list[list[list[ToolCall]]], entry: dict[str, Any]) -> bool:
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils

    answer = [[[as_python(call) for call in step] for step in turn] for turn in played]
    try:
        verdict = multi_turn_checker.multi_turn_checker(answer, entry["gold"], entry, "", "model")
    finally:  # its simulators live in the module's globals, under the model's and the task's name
        for name in [name for name in vars(multi_turn_utils) if name.endswith("_instance")]:
            del vars(multi_turn_utils)[name]
    return verdict["valid"]


def test_multi_turn_verdicts_are_the_official_ones(multi: BfclMultiTurn) -> None:
    verdicts = []
    for task in range(0, 800, 3):
        rng = random.Random(task)
        begin(multi, task)
        played = []
        for turn, _ in enumerate(multi._entry["question"]):
            calls = gold_calls(multi._entry, turn)
            steps = changed(calls, rng, multi) if rng.random() < 0.3 else [[call] for call in calls]
            if len(steps) > STEPS:
                steps = [calls]
            played.append(steps)
            for step in steps:
                multi.step(format_calls(step))
            *_, info = multi.step("Done.")
        verdicts.append(info["success"])
        assert info["success"] == official_verdict(played, multi._entry), multi._entry["id"]
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.9  # both occur


def test_single_turn_verdicts_tell_a_wrong_answer(single: BfclSingle) -> None:
    """Against what the tasks themselves say: another name, one call less or more, a value of no meaning."""
    for entry in entries(single)[::25]:
        calls = solution(entry)
        if entry["id"] in IMPOSSIBLE:
            continue
        assert judge(entry, calls)
        if "gold" not in entry:
            assert not judge(entry, [] if calls else [ToolCall("any", {})])
            continue
        first, *others = calls
        assert not judge(entry, [ToolCall("x" + first.name, first.arguments), *others])
        assert not judge(entry, others) and not judge(entry, [*calls, first])
        for name in first.arguments:
            assert not judge(entry, [ToolCall(first.name, {**first.arguments, name: {"?": "!"}}), *others])


def test_a_text_brings_the_next_request_and_missing_functions_come_later() -> None:
    env = BfclMultiTurn(categories=["miss_func"])
    begin(env, 0)
    names = {tool.name for tool in env.tools}
    assert "sort" not in names and "grep" in names
    observations = []
    while "sort" not in {tool.name for tool in env.tools}:
        observations.append(env.step(env.expert_action())[0])
    assert '{"name": "sort"' in observations[-1] and observations[-1].endswith("What about now?")
    assert [tool.name for tool in env.fork().tools] == [tool.name for tool in env.tools]


def test_calls_in_a_list_run_in_order_and_answer_as_the_official_run_does(multi: BfclMultiTurn) -> None:
    begin(multi, 0)
    calls = [
        ToolCall("cd", {"folder": "document"}),
        ToolCall("mkdir", {"dir_name": "temp"}),
        ToolCall("pwd", {}),
    ]
    *_, info = multi.step(format_calls(calls))
    assert [message.content for message in info["messages"]] == [
        '{"current_working_directory": "document"}',
        "None",
        '{"current_working_directory": "/workspace/document"}',
    ]


def test_more_than_twenty_steps_on_one_request_fail(multi: BfclMultiTurn) -> None:
    begin(multi, 0)
    for _ in range(STEPS):
        assert not multi.step('{"name": "pwd"}')[2]
    *_, terminated, _, info = multi.step('{"name": "pwd"}')
    assert terminated and not info["success"]


def test_a_fork_after_wrong_calls_goes_on_as_its_origin(multi: BfclMultiTurn) -> None:
    for task in range(0, 800, 40):
        rng = random.Random(task)
        begin(multi, task)
        for _ in range(3):
            multi.step(format_calls([random_call(multi.tools, rng, ["temp", ".."])]))
        twin = multi.fork()
        assert twin.state_digest() == multi.state_digest()
        while not multi.over:
            action = rng.choice(
                [multi.expert_action(), "Next.", format_calls([random_call(multi.tools, rng)])]
            )
            assert twin.step(action)[:4] == multi.step(action)[:4]
            assert twin.state_digest() == multi.state_digest()


def copies() -> Iterator[list[ToolCall]]:
    yield [ToolCall("cp", {"source": "document", "destination": "document"})] * 3  # a folder within itself
    for number in range(30):  # twice as many files with every step
        name, other = f"d{number}", f"d{number + 1}"
        made = ToolCall("mkdir", {"dir_name": other})
        yield [made, ToolCall("cp", {"source": name, "destination": f"{name}b"})]
        yield [ToolCall("mv", {"source": f"{name}{end}", "destination": other}) for end in ("", "b")]
    yield [ToolCall("mkdir", {"dir_name": "x"}), ToolCall("cd", {"folder": "x"})] * 200


def test_no_calls_make_a_world_too_large_to_walk(multi: BfclMultiTurn) -> None:
    begin(multi, 0)
    multi.step(format_calls([ToolCall("mkdir", {"dir_name": "d0"})]))
    refused = 0
    for calls in copies():
        multi.step("Next.") if multi.turn % 15 == 14 else None
        if multi.over:
            begin(multi, 0)
        refused += "refused" in multi.step(format_calls(calls))[0]
        multi.fork()
    assert refused


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("power", {"base": 9, "exponent": 10**9}),
        ToolCall("logarithm", {"value": 2, "base": 3, "precision": 10**9}),
        ToolCall("round_number", {"number": 5, "decimal_places": -(10**9)}),
        ToolCall("square_root", {"number": 2, "precision": 10**9}),
    ],
)
def test_no_number_takes_for_ever(multi: BfclMultiTurn, call: ToolCall) -> None:
    numbers = next(i for i, entry in enumerate(entries(multi)) if "MathAPI" in entry["involved_classes"])
    begin(multi, numbers)
    assert "must lie within 1000" in multi.step(format_calls([call]))[0]


@pytest.mark.parametrize("env", [BfclMultiTurn, BfclSingle])
def test_whatever_an_agent_sends_is_answered(env: type[BfclMultiTurn] | type[BfclSingle]) -> None:
    assert fuzz(env(), 400)["tool_error"] > 20


def test_options_are_checked() -> None:
    with pytest.raises(UnknownName, match="'miss_func' or 'miss_param'"):
        BfclMultiTurn(categories=["miss_fun"])
    with pytest.raises(UserError, match="must be a list of names, got 'base'"):
        BfclMultiTurn(categories="base")
    with pytest.raises(UserError, match="max_turns must be at least 1, got 0"):
        BfclMultiTurn(max_turns=0)


def test_a_suite_is_evaluated_and_the_expert_solves_it() -> None:
    result = evaluate("bfcl_single", ["expert"], limit=26)["policies"][0]
    assert (result["episodes"], result["success"], result["errors"]) == (26, 1.0, 0)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)
    bfcl_data.rows.cache_clear()
    with pytest.raises(MissingPart, match="opd-agents envs install bfcl"):
        BfclMultiTurn()


def test_install_runs_pip_without_the_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, len(commands) // 2)

    monkeypatch.setattr(install.subprocess, "run", run)
    done = CliRunner().invoke(app, ["envs", "install", "bfcl"])
    assert done.exit_code == 2  # the second run fails
    assert commands[1] == ["-m", "pip", "install", "--no-deps", "bfcl-eval==2026.3.23"]
    assert CliRunner().invoke(app, ["envs", "install"]).exit_code == 2
    assert CliRunner().invoke(app, ["envs", "install", "bfc"]).exit_code == 2


def test_the_data_files_are_read_without_traces_beside_the_package() -> None:
    code = (
        "import sys\nfrom opd_agents.envs.adapters.bfcl_single import BfclSingle\n"
        "env = BfclSingle()\nenv.reset(seed=0)\nenv.step('Hello.')\n"
        "print(sorted(name for name in sys.modules if name.startswith('bfcl_eval')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bfcl_eval.constants.eval_config" not in json.loads(done.stdout.replace("'", '"'))
