"""The environment: files in memory, a notebook, the verifier."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.filedesk.expert import READINGS, changes, note_changes, reads
from opd_agents.envs.filedesk.world import LEVELS, Office, draw_office
from opd_agents.envs.splits import SPLIT_SIZES
from opd_agents.errors import UnknownName, UserError
from opd_agents.tools import ToolError
from opd_agents.tools.files import FileTools, Quota
from opd_agents.types import Task, ToolCall

SYSTEM = (
    "You keep the bills of a shop, a file for each. Find out what you need, change nothing that you are not "
    "asked to, then call done."
)
RULES = " rules.txt says in which folders archive and reminders are; a bill keeps its name."
QUOTA = Quota(files=100, file_size=4000, total_size=100_000)
MAX_NOTES, MAX_NOTE = 50, 500


class FileDesk(AgentEnv):
    """An office whose bills are small text files: find, add up, move, correct, list.

    An episode succeeds if, at the end, files and notes are in every character those that were asked for.
    Everything can be undone until ``done`` ends the episode. There is no noise.
    """

    has_expert: ClassVar[bool] = True
    split_sizes = SPLIT_SIZES

    def __init__(self, level: str = "easy", max_turns: int | None = None) -> None:
        """``level``: easy, medium or hard; ``max_turns`` defaults to the level's."""
        if level not in LEVELS:
            raise UnknownName("FileDesk level", level, LEVELS, "opd-agents envs opd_agents/FileDesk-v0")
        self.level = LEVELS[level]
        self.max_turns = self.level.max_turns if max_turns is None else max_turns
        if self.max_turns < 1:
            raise UserError(f"FileDesk: max_turns must be at least 1, got {max_turns}.")
        self.system_prompt = SYSTEM + (RULES if self.level.rules else "")
        self.files: dict[str, str] = {}
        self.notes: list[str] = []
        self._answered: set[str] = set()  # readings, by whomever they were made
        on_files = FileTools(self.files, QUOTA)
        super().__init__(
            [
                *(on_files.list_files, on_files.find_files, on_files.search_files, on_files.read_file),
                *(on_files.write_file, on_files.append_file, on_files.edit_file),
                *(on_files.move_file, on_files.copy_file, on_files.delete_file),
                *(self.add_note, self.read_notes, self.delete_note, self.done),
            ]
        )

    @property
    def office(self) -> Office:
        """The content of the present task."""
        return draw_office(self.level.name, self.task.split, self.task.id)

    def begin(self, task: Task) -> str:
        self.set_state({"files": self.office.files(), "notes": [], "answered": []})
        return self.office.prompt

    def call(self, call: ToolCall) -> str:
        result = super().call(call)
        if call.name in READINGS:
            self._answered.add(format_calls([call]))
        return result

    def add_note(self, text: str) -> str:
        """Write a note."""
        if len(self.notes) >= MAX_NOTES or len(text) > MAX_NOTE:
            raise ToolError(f"at most {MAX_NOTES} notes of {MAX_NOTE} characters")
        self.notes.append(text)
        return "noted"

    def read_notes(self) -> list[str]:
        """Read all notes."""
        return self.notes

    def delete_note(self, number: int) -> str:
        """Delete a note by its number, the first is 1."""
        if not 1 <= number <= len(self.notes):
            raise ToolError(f"there are {len(self.notes)} notes")
        del self.notes[number - 1]
        return "deleted"

    def done(self) -> str:
        """Say that all is done; nothing can be done after this."""
        self.finish()
        return "Thank you."

    def on_text(self, text: str) -> str:
        return "Please call done when all is done."

    def success(self) -> bool:
        files, notes = self.office.goal()
        return self.files == files and sorted(self.notes) == sorted(notes)

    def expert_action(self) -> str:
        files, notes = self.office.goal()
        looking = (format_calls([call]) for call in reads(self.office) if self._readable(call))
        acting = itertools.chain(changes(self.files, files), note_changes(self.notes, notes))
        return next(
            itertools.chain(
                (action for action in looking if action not in self._answered),
                (format_calls([call]) for call in acting),
            ),
            format_calls([ToolCall("done", {})]),
        )

    def get_state(self) -> Any:
        return {"files": dict(self.files), "notes": list(self.notes), "answered": sorted(self._answered)}

    def set_state(self, state: Any) -> None:
        self.files.clear()  # the tools hold this very dictionary
        self.files.update(state["files"])
        self.notes, self._answered = list(state["notes"]), set(state["answered"])

    def digest_text(self) -> str:
        return f"{sorted(self.files.items())} {self.notes}"

    def _readable(self, call: ToolCall) -> bool:
        return call.name != "read_file" or call.arguments["path"] in self.files
