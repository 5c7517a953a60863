"""The environments: a file, tools that change and run it, and hidden tests that decide."""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Any, ClassVar, get_args

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv, RunsIn
from opd_agents.envs.code.cases import LEVELS, SPLIT_SIZES, Case, Work, draw_case
from opd_agents.envs.code.expert import next_change
from opd_agents.envs.code.judge import SOLUTION, ask, shorten
from opd_agents.errors import UnknownName, UserError
from opd_agents.tools import ToolError
from opd_agents.tools.python import run_program
from opd_agents.tools.sandbox import Kind, Limits, Sandbox, open_sandbox
from opd_agents.tools.sandbox.base import check_files
from opd_agents.types import Task, ToolCall

WAITING = 5  # times as long as a program may compute it may run in all, waiting for a core or for nothing
LONGEST_OUTPUT = 2000  # characters of a program's output that an agent is shown


class CodeEnv(AgentEnv):
    """A programmer's desk: one file ``solution.py`` with one function, tools to change, run and test it.

    The example tests say how the file does; ``submit`` ends the episode, and the hidden tests decide. They
    call the function in the sandbox and compare what it gives outside of it, so code cannot pass by anything
    but right answers. Between two runs all files are plain data, so an episode can be forked anywhere.
    """

    family: ClassVar[str] = "code"
    has_expert: ClassVar[bool] = True
    runs_in: ClassVar[RunsIn] = "thread"
    max_live: ClassVar[int | None] = 16  # a program that waits for a core uses up its time-out
    looks_first: ClassVar[bool] = False  # whether the expert runs the tests before it changes anything

    system_prompt = (
        "You are a programmer. Make solution.py do what is asked, check it with run_tests, then submit: "
        "hidden tests decide."
    )

    def __init__(self, sandbox: Kind, image: str | None, timeout: int, max_turns: int) -> None:
        """``sandbox`` and ``image`` go to :func:`opd_agents.tools.sandbox.open_sandbox` at the first reset;
        ``timeout`` is that of one run, in whole seconds of a core's time: what else the machine does must not
        decide what is right."""
        if max_turns < 1:
            raise UserError(f"{type(self).__name__}: max_turns must be at least 1, got {max_turns}.")
        if sandbox not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise UserError(f"{type(self).__name__}: unknown sandbox {sandbox!r}; it is one of {kinds}.")
        if not isinstance(timeout, int) or timeout < 1:
            raise UserError(
                f"{type(self).__name__}: timeout must be whole seconds, at least 1, got {timeout}."
            )
        self.max_turns = max_turns
        self._sandbox_kind, self._image = sandbox, image
        self._limits = Limits(timeout=WAITING * timeout, cpu_seconds=timeout)
        self._opened: Sandbox | None = None
        self.files: dict[str, bytes] = {}
        self.tested: bytes | None = None  # solution.py as the tests last found it
        self.solved: bool | None = None  # once submitted
        super().__init__(
            [self.read_file, self.edit_file, self.write_file, self.run_python, self.run_tests, self.submit]
        )

    @property
    @abstractmethod
    def case(self) -> Case:
        """The content of the present task."""

    @property
    def sandbox(self) -> Sandbox:
        if self._opened is None:
            self._opened = open_sandbox(self._sandbox_kind, image=self._image, limits=self._limits)
        return self._opened

    def begin(self, task: Task) -> str:
        _ = self.sandbox  # where it is missing, this is the place to say so
        self.files = {SOLUTION: self.case.start.encode()}
        self.tested = self.solved = None
        return self.case.prompt

    # ---- tools ----

    def read_file(self) -> str:
        """Read solution.py."""
        return shorten(self._read(), 4 * LONGEST_OUTPUT)

    def edit_file(self, old: str, new: str) -> str:
        """Replace a piece of solution.py. It must occur there exactly once."""
        text = self._read()
        count = text.count(old) if old else 0
        if count != 1:
            raise ToolError(f"old occurs {count} times in {SOLUTION}, not once")
        return self._write(text.replace(old, new))

    def write_file(self, content: str) -> str:
        """Replace all of solution.py."""
        return self._write(content)

    def run_python(self, code: str) -> str:
        """Run a Python program in the folder of solution.py and read what it prints."""
        self.sandbox.put(self.files)
        try:
            return run_program(self.sandbox, code, LONGEST_OUTPUT)
        finally:
            self.files = self.sandbox.get()

    def run_tests(self) -> dict[str, Any]:
        """Run the example tests and see the first that fails."""
        case = self.case
        answers = ask(self.sandbox, self.files, case.name, [test.arguments for test in case.examples])
        self.tested = self.files.get(SOLUTION)
        wrong = [(a, t) for a, t in zip(answers, case.examples, strict=True) if not a.fits(t)]
        report = {"passed": f"{len(answers) - len(wrong)}/{len(answers)}"}
        if not wrong:
            return report if answers else report | {"note": "there are no example tests"}
        answer, test = wrong[0]
        call = shorten(f"{case.name}({', '.join(map(repr, test.arguments))})")
        return report | {"call": call, "gave": answer.shown(), "expected": shorten(repr(test.expected))}

    def submit(self) -> str:
        """Hand in solution.py. This ends the work."""
        self.solved = self.verdict()
        self.finish()
        return "submitted"

    def verdict(self) -> bool:
        """Whether the hidden tests pass."""
        hidden = self.case.hidden
        answers = ask(self.sandbox, self.files, self.case.name, [test.arguments for test in hidden])
        return all(answer.fits(test) for answer, test in zip(answers, hidden, strict=True))

    def _read(self) -> str:
        try:
            return self.files[SOLUTION].decode()
        except KeyError:
            raise ToolError(f"there is no {SOLUTION}; write_file makes it anew") from None
        except UnicodeDecodeError:
            raise ToolError(f"{SOLUTION} is no UTF-8 text; write_file makes it anew") from None

    def _write(self, text: str) -> str:
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            raise ToolError(f"no UTF-8 text: {error.reason}") from error
        check_files(self.files | {SOLUTION: content}, self._limits)
        self.files[SOLUTION] = content
        return "written"

    # ---- the rest of an environment ----

    def on_text(self, text: str) -> str:
        return "Please use the tools, and submit when solution.py is right."

    def success(self) -> bool:
        return self.solved is True

    def get_state(self) -> Any:
        return self.files, self.tested, self.solved

    def set_state(self, state: Any) -> None:
        self.files, self.tested, self.solved = state

    def digest_text(self) -> str:
        files = {path: content.decode("latin-1") for path, content in self.files.items()}
        return json.dumps([files, self.solved], sort_keys=True)

    def expert_action(self) -> str:
        case, present = self.case, self.files.get(SOLUTION, b"")
        if present != case.solution.encode():
            if self.looks_first and self.tested is None:
                return format_calls([ToolCall("run_tests", {})])
            return format_calls([next_change(present, case.solution)])
        return format_calls([ToolCall("submit" if self.tested == present else "run_tests", {})])

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class _Drawn(CodeEnv):
    """Functions drawn from the levels of ``cases.py``."""

    work: ClassVar[Work]
    split_sizes = SPLIT_SIZES

    def __init__(
        self,
        level: str = "easy",
        sandbox: Kind = "docker",
        image: str | None = None,
        timeout: int = 4,
        max_turns: int | None = None,
    ) -> None:
        """``max_turns`` defaults to the level's; for the others see :class:`CodeEnv`."""
        if level not in LEVELS:
            raise UnknownName(f"{type(self).__name__} level", level, LEVELS, "opd-agents envs")
        self.level = level
        super().__init__(sandbox, image, timeout, LEVELS[level].max_turns if max_turns is None else max_turns)

    @property
    def case(self) -> Case:
        return draw_case(self.work, self.level, self.task.split, self.task.id)


class CodeFix(_Drawn):
    """Find what is wrong with a function, and mend it: one slip, at the level hard two."""

    work: ClassVar[Work] = "fix"
    looks_first: ClassVar[bool] = True


class CodeGen(_Drawn):
    """Write a function whose first line is there."""

    work: ClassVar[Work] = "write"
