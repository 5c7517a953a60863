"""What the benchmarks of environments make: every registered id, with what it needs to run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_agents import envs
from opd_agents.errors import UnknownName

MINIWOB = (
    *("click-test", "click-button", "click-checkboxes", "click-dialog", "enter-text", "login-user"),
    *("choose-list", "drag-box"),
)
QUESTIONS = [{"id": str(i), "prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(50)]
SERVER = '''
from mcp.server.mcpserver import MCPServer

server, notes = MCPServer("notes", log_level="ERROR"), []


@server.tool()
def add_note(text: str, times: int = 1) -> str:
    """Write a note down."""
    notes.extend([text] * min(times, 10))
    return f"{len(notes)} notes"


@server.tool()
def read_notes() -> list[str]:
    """Read the last notes."""
    return notes[-5:]


@server.tool()
def forget() -> str:
    """Drop all notes."""
    notes.clear()
    return "empty"


server.run("stdio")
'''


@dataclass(frozen=True, slots=True)
class Case:
    """An environment to try; a tool benchmark plays the first ``tasks`` of its tasks, None: any."""

    id: str
    options: dict[str, Any] = field(default_factory=dict)
    tasks: int | None = None

    @property
    def name(self) -> str:
        return self.id.removeprefix("opd_agents/").removesuffix("-v0")


def all_cases(folder: Path) -> dict[str, Case]:
    """By name: all registered ids, of MiniWoB's some. ``folder`` gets the files that they need."""
    listed = [id for id in envs.list_envs() if "/MiniWoB." not in id]
    listed += [f"opd_agents/MiniWoB.{task}-v0" for task in MINIWOB]
    special = {
        "opd_agents/PromptTask-v0": Case("opd_agents/PromptTask-v0", {"tasks": _questions(folder)}),
        "opd_agents/Mcp-v0": Case(
            "opd_agents/Mcp-v0",
            {"tasks": _questions(folder), "server": _server(folder), "reset": "forget"},
        ),
        # some gold paths take over 300 turns
        "opd_agents/ScienceWorld-v0": Case("opd_agents/ScienceWorld-v0", {"max_turns": 500}),
        # a game is generated and compiled in about a second
        "opd_agents/TextWorld-v0": Case("opd_agents/TextWorld-v0", {"cache": str(folder / "games")}, 50),
    }
    return {case.name: case for case in (special.get(id, Case(id)) for id in listed)}


def chosen(names: Sequence[str], folder: Path) -> dict[str, Case]:
    """The cases of ``names``, whole ids too; none for all. Raises UnknownName."""
    cases = all_cases(folder)
    for name in (wanted := [name.removeprefix("opd_agents/").removesuffix("-v0") for name in names]):
        if name not in cases:
            raise UnknownName("case", name, cases, "opd-agents envs")
    return {name: cases[name] for name in wanted} or cases


def _questions(folder: Path) -> str:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return str(file)


def _server(folder: Path) -> str:
    file = folder / "notes.py"
    file.write_text(SERVER, encoding="utf-8")
    return shlex.join([sys.executable, str(file)])
