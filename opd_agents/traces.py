"""Agents' traces in and out: files of chat messages <-> files of trajectories."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opd_agents.chat import Chat
from opd_agents.errors import DataError, UserError
from opd_agents.messages import to_row
from opd_agents.policies.models import load_chat, load_tokenizer
from opd_agents.recordings import encode_rows, refuse_bad, to_conversation, tools_of
from opd_agents.rows import read_rows
from opd_agents.runs import PARTIAL, newest_checkpoint, trajectory_row
from opd_agents.types import Trajectory, from_dict, to_json

Line = tuple[Trajectory, str]


@dataclass(frozen=True, slots=True)
class Traces:
    """What was written. ``tokens`` are those of the actions; ``skipped`` says of each row left out why."""

    conversations: int
    turns: int
    tokens: int
    skipped: tuple[str, ...]


def import_messages(
    source: Path, to: Path, model: str, *, split: str | None = None, skip_bad: bool = False
) -> Traces:
    """Conversations (chat-message JSONL, or a saved dataset) as trajectory lines, in the tokens of ``model``.

    Raises DataError for bad rows unless ``skip_bad``; nothing is written then.
    """
    results = encode_rows(read_rows(source, split), _chat(model), None)
    lines = (one if isinstance(one, DataError) else (one, to_json(trajectory_row(one))) for one in results)
    return _write(to, lines, skip_bad)


def export_messages(
    source: Path, to: Path, model: str | None = None, *, only_success: bool = False, skip_bad: bool = False
) -> Traces:
    """Trajectories as chat-message JSONL in OpenAI's format, with the tools of their environments.

    ``source`` is a file of trajectory lines, or a run folder, whose training episodes are taken. ``model``
    (default: the run's own) reads the token ids; episodes of an expert may have none. Raises DataError as
    :func:`import_messages`.
    """
    files = sorted((source / "trajectories").glob("step-*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: a folder without training episodes (trajectories/step-*.jsonl).")
    model = str(source) if model is None and source.is_dir() else model
    chat = None if model is None else _chat(model)
    return _write(to, _message_lines(files, chat, only_success), skip_bad)


def _message_lines(
    files: Iterable[Path], chat: Chat | None, only_success: bool
) -> Iterator[Line | DataError]:
    for file in files:
        rows = read_rows(file)
        for index in range(len(rows)):
            try:
                trajectory = from_dict(Trajectory, rows[index]["trajectory"])
                if trajectory.success or not only_success:
                    conversation = to_conversation(trajectory, chat, tools_of(trajectory))
                    yield trajectory, to_json(to_row(conversation))
            except (UserError, KeyError, TypeError, ValueError) as error:
                told = str(error) if isinstance(error, UserError) else f"no trajectory ({error!r})."
                yield DataError(f"{rows.where(index)}: {told}")


def _write(to: Path, lines: Iterable[Line | DataError], skip_bad: bool) -> Traces:
    """Beside its place, then renamed: a file is there whole or not at all."""
    conversations = turns = tokens = 0
    bad: list[DataError] = []
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{PARTIAL}{to.name}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for line in lines:
                if isinstance(line, DataError):
                    bad.append(line)
                    continue
                file.write(line[1] + "\n")
                conversations += 1
                turns += len(line[0].turns)
                tokens += sum(len(turn.action_ids) for turn in line[0].turns)
        if not skip_bad:
            refuse_bad(bad, conversations + len(bad))
        if not conversations:
            raise DataError(f"Nothing is left to write to {to}; {len(bad)} rows are bad.")
        os.replace(partial, to)
    finally:
        partial.unlink(missing_ok=True)
    return Traces(conversations, turns, tokens, tuple(map(str, bad)))


def _chat(model: str) -> Chat:
    path = newest_checkpoint(model)
    return load_chat(path, load_tokenizer(path))
