"""Whatever an agent sends, an environment answers: no exception, no hang, text that a file can hold."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_envs import Counter

from opd_agents import envs
from opd_agents.envs import parse_action
from opd_agents.envs.actions import BadAction
from opd_agents.errors import EnvironmentContractError
from opd_agents.fuzzing import RAW, TEXTS, fuzz, hostile_action

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import cases

DESK = envs.make("opd_agents/OrderDesk-v0")
PIECES = [*RAW, *TEXTS, '{"name":"a","arguments":', '"x":', ",", "}", "]", "[", "{"]


def drawn(seed: int) -> str:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return hostile_action(DESK.tools, rng, ["A1", "ana"])
    return "".join(rng.choices(PIECES, k=rng.randrange(6)))


@settings(max_examples=10_000, deadline=None, database=None)
@given(st.integers(0, 2**64))
def test_the_parser_reads_or_refuses(seed: int) -> None:
    action = drawn(seed)
    try:
        calls = parse_action(action)
    except BadAction as error:
        str(error).encode()
        return
    assert action.strip() and all(isinstance(call.name, str) for call in calls)
    assert parse_action(action) == calls


IN_PROCESS = [  # other tests register toys
    id for id in envs.list_envs() if id.startswith("opd_agents/") and envs.env_class(id).runs_in == "main"
]
# Actions in the gate; benchmarks/fuzz.py sends thousands.
REAL = [
    *[(f"MiniWoB.{task}", 25, ("miniwob", "playwright", "chromium")) for task in cases.MINIWOB],
    ("Shop", 200, ("playwright", "chromium")),
    ("CodeFix", 200, ("docker",)),
    ("ScienceWorld", 200, ("scienceworld", "java")),
    ("TextWorld", 200, ("textworld",)),
    ("Mcp", 200, ("mcp",)),
]


def needs(id: str) -> tuple[str, ...]:
    """The modules behind an extra, for the marker ``real``."""
    modules = {"bfcl": ("bfcl_eval", "mpmath"), "reasoning": ("reasoning_gym",), "minigrid": ("minigrid",)}
    return modules.get(envs.env_class(id).extra or "", ())


def assert_answers(name: str, actions: int, folder: Path) -> None:
    case = cases.chosen([name], folder)[name]
    env = envs.make(case.id, **case.options)
    try:
        counts = fuzz(env, actions, tasks=case.tasks and 3)  # each of these takes seconds to make
    finally:
        env.close()
    assert counts["episodes"] > 0 and actions == counts.total() - counts["episodes"]
    assert env.text_only or min(counts["parse_error"], counts["tool_error"]) > 0


@pytest.mark.parametrize(
    "id", [pytest.param(id, marks=pytest.mark.real(*needs(id)) if needs(id) else ()) for id in IN_PROCESS]
)
def test_environments_in_process_answer_everything(id: str, tmp_path: Path) -> None:
    assert_answers(id.removeprefix("opd_agents/").removesuffix("-v0"), 10_000, tmp_path)


@pytest.mark.parametrize(
    ("name", "actions"), [pytest.param(name, n, marks=pytest.mark.real(*parts)) for name, n, parts in REAL]
)
def test_environments_with_real_parts_answer_everything(name: str, actions: int, tmp_path: Path) -> None:
    assert_answers(name, actions, tmp_path)


class Faulty(Counter):
    """Answers all but one kind of action as it should."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def add(self, number: int) -> dict[str, int]:
        """Add a number to the counter."""
        if self.fault == "raise" and number > 10**20:
            raise OverflowError("too large")
        return super().add(abs(number) % 10)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        observation, *rest = super().step(action)
        if self.fault == "silent" and action.startswith("{"):
            observation = ""
        if self.fault == "surrogate" and len(action) > 50:
            observation += "\ud800"
        return observation, *rest


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise", "OverflowError: too large"), ("silent", "not answered"), ("surrogate", "no file can hold")],
)
def test_what_is_not_answered_is_found(fault: str, message: str) -> None:
    with pytest.raises(EnvironmentContractError, match=message):
        fuzz(Faulty(fault), 2000)
