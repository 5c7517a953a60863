"""The scripted expert: makes any file the right one, in small changes where few are needed."""

from __future__ import annotations

import difflib

from opd_agents.envs.code.slips import TOKEN
from opd_agents.types import ToolCall

FEW = 2  # changes that are made one by one
LARGEST = 8000  # characters of a file whose differences are looked for


def next_change(present: bytes, wanted: str) -> ToolCall:
    """The call that brings solution.py nearer to ``wanted``, which it is not yet.

    The shortest run of whole tokens around the first difference that occurs only once is edited; where
    differences are many, all that lies between the first and the last is.
    """
    try:
        text = present.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or len(text) > LARGEST:
        return ToolCall("write_file", {"content": wanted})
    old, new = TOKEN.findall(text), TOKEN.findall(wanted)
    differences = [
        places
        for tag, *places in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != "equal"
    ]
    start, stop, new_start, new_stop = differences[0]
    if len(differences) > FEW:
        stop, new_stop = differences[-1][1], differences[-1][3]
    left, right = start, stop
    while left == right or text.count("".join(old[left:right])) > 1:
        if left and "\n" not in old[left - 1]:  # rather within a line
            left -= 1
        elif right < len(old) and "\n" not in old[right]:
            right += 1
        else:
            left, right = max(left - 1, 0), min(right + 1, len(old))
    mended = [*old[left:start], *new[new_start:new_stop], *old[stop:right]]
    return ToolCall("edit_file", {"old": "".join(old[left:right]), "new": "".join(mended)})
