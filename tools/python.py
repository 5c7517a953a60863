"""Python as a tool: programs of an agent, run in a sandbox."""

from __future__ import annotations

from opd_agents.tools.base import Tool, ToolError
from opd_agents.tools.sandbox import Sandbox

SNIPPET = "snippet.py"  # where the program lies while it runs


def run_python(sandbox: Sandbox, max_chars: int = 4000) -> Tool:
    """The tool ``run_python``: :func:`run_program` in ``sandbox``."""

    def run_python(code: str) -> str:
        """Run a Python program in the work folder and read what it prints."""
        return run_program(sandbox, code, max_chars)

    return Tool.from_function(run_python)


def run_program(sandbox: Sandbox, code: str, max_chars: int) -> str:
    """Run a program in the sandbox's work folder, whose other files it may read and change.

    Returns what it prints, the middle left out beyond ``max_chars``. Raises ToolError for what is no text,
    and if the sandbox fails.
    """
    try:
        program = code.encode()
    except UnicodeEncodeError as error:
        raise ToolError(f"the code is no valid text: {error.reason}") from error
    before = sandbox.get()
    sandbox.put(before | {SNIPPET: program})
    try:
        result = sandbox.run(["python", SNIPPET])
    finally:
        mine = {SNIPPET: before[SNIPPET]} if SNIPPET in before else {}
        sandbox.put({path: data for path, data in sandbox.get().items() if path != SNIPPET} | mine)
    return shortened(result.text(), max_chars)


def shortened(text: str, max_chars: int) -> str:
    """``text``, or its beginning and end and how much is left out between them."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
