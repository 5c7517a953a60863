"""The scripted expert: reads what it needs, then makes the files and notes what they should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from opd_agents.envs.filedesk.world import Office
from opd_agents.types import ToolCall

READINGS = ("read_file", "search_files")


def reads(office: Office) -> Iterator[ToolCall]:
    """What must be read before one can know what to do."""
    if office.level.rules and any(request.kind in ("archive", "remind") for request in office.requests):
        yield ToolCall("read_file", {"path": "rules.txt"})
    for request in office.requests:
        label = request.client if office.level.terse else f"client: {request.client}"
        yield ToolCall("search_files", {"text": label})
        if not office.level.terse:
            own = sorted(bill.path for bill in office.bills if bill.client == request.client)
            yield from (ToolCall("read_file", {"path": path}) for path in own)


def changes(files: Mapping[str, str], goal: Mapping[str, str]) -> Iterator[ToolCall]:
    """Calls that turn ``files`` into ``goal``, whatever was done to them; only the first is sure to be right
    before it was made. What stands in the way or takes up space goes first."""
    missing = {path: text for path, text in goal.items() if path not in files}
    moves = {}
    for path in sorted(files.keys() - goal.keys()):
        targets = (target for target, text in missing.items() if text == files[path])
        target = next((target for target in targets if not _in_one_another(path, target)), None)
        if target is None:
            yield ToolCall("delete_file", {"path": path})
        else:
            moves[path] = target
    for path, text in goal.items():
        if path in files and files[path] != text:
            yield _edit(path, files[path], text)
    for path, target in moves.items():
        yield ToolCall("move_file", {"path": path, "target": target})
    for path, text in missing.items():
        source = next((source for source in sorted(files) if files[source] == text), None)
        if source is None:
            yield ToolCall("write_file", {"path": path, "text": text})
        else:
            yield ToolCall("copy_file", {"path": source, "target": path})


def note_changes(notes: Sequence[str], goal: Sequence[str]) -> Iterator[ToolCall]:
    """The same for the notes, whose order does not matter."""
    wanted = list(goal)
    for number, note in enumerate(notes, 1):
        if note not in wanted:
            yield ToolCall("delete_note", {"number": number})
            return  # the others have other numbers now
        wanted.remove(note)
    yield from (ToolCall("add_note", {"text": note}) for note in wanted)


def _in_one_another(path: str, other: str) -> bool:
    return f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")


def _edit(path: str, text: str, wanted: str) -> ToolCall:
    """The one part that differs is replaced, a line or a word of a line; else the file is written anew."""
    for separator in ("\n", " "):
        old, new = text.split(separator), wanted.split(separator)
        differing = [i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
        if len(old) == len(new) > 1 and len(differing) == 1 and text.count(old[differing[0]]) == 1:
            part = differing[0]
            return ToolCall("edit_file", {"path": path, "old": old[part], "new": new[part]})
    return ToolCall("write_file", {"path": path, "text": wanted})
