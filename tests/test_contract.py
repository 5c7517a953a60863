"""Every registered environment keeps the contract; the short ones are tried by their own tests, too."""

import sys
from pathlib import Path

import pytest

from opd_agents import envs
from opd_agents.testing import check_agent_env

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.real("miniwob", "playwright", "chromium", "docker", "scienceworld", "textworld", "mcp"),
]


# other tests register toys
IDS = [id for id in envs.list_envs() if id.startswith("opd_agents/") and "/MiniWoB." not in id]


@pytest.mark.parametrize("id", IDS)
def test_the_contract(id: str, tmp_path: Path) -> None:
    name = id.removeprefix("opd_agents/").removesuffix("-v0")
    case = cases.chosen([name], tmp_path)[name]
    env = envs.make(case.id, **case.options)
    try:
        check_agent_env(env, n_tasks=5 if env.runs_in == "main" else 2)
    finally:
        env.close()
