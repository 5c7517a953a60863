"""Agents' traces in and out: files of chat messages, or of TRL's rows <-> files of trajectories."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from opd_agents.chat import Chat
from opd_agents.errors import ConfigError, DataError, UserError
from opd_agents.messages import Conversation, to_row
from opd_agents.policies.models import load_chat, load_tokenizer
from opd_agents.recordings import encode_rows, refuse_bad, to_conversation, tools_of
from opd_agents.rows import read_rows, sided
from opd_agents.runs import PARTIAL, newest_checkpoint, trajectory_row
from opd_agents.trl_rows import completion_row, pairs, preference_row, prompt_rows
from opd_agents.types import Trajectory, Turn, from_dict, to_json

Format: TypeAlias = Literal["messages", "completions", "preferences", "prompts"]
KINDS: dict[Format, str] = {
    "messages": "conversations", "completions": "conversations", "preferences": "pairs", "prompts": "prompts"
}  # fmt: skip


class Line(NamedTuple):
    """One of a file, and the turns that are learned from it."""

    text: str
    turns: Sequence[Turn] = ()


class Told(NamedTuple):
    """An episode, and the place in the files that told it."""

    where: str
    episode: Trajectory


@dataclass(frozen=True, slots=True)
class Traces:
    """What was written: ``rows`` of ``kind``. ``tokens`` are those of the actions; ``skipped`` says of each
    row left out why."""

    rows: int
    turns: int
    tokens: int
    skipped: tuple[str, ...]
    kind: str = "conversations"


def import_messages(
    source: Path, to: Path, model: str, *, split: str | None = None, skip_bad: bool = False
) -> Traces:
    """Conversations (chat-message JSONL, or a saved dataset) as trajectory lines, in the tokens of ``model``;
    of a preference two, a success and a failure.

    Raises DataError for bad rows unless ``skip_bad``; nothing is written then.
    """
    results = encode_rows(sided(read_rows(source, split)), _chat(model), None)
    lines = (
        one if isinstance(one, DataError) else Line(to_json(trajectory_row(one)), one.turns)
        for one in results
    )
    return _write(to, lines, skip_bad)


def export_messages(
    source: Path,
    to: Path,
    model: str | None = None,
    *,
    form: Format = "messages",
    only_success: bool = False,
    skip_bad: bool = False,
) -> Traces:
    """Trajectories as chat-message JSONL in OpenAI's format, with the tools of their environments, or in one
    of TRL's forms: see :mod:`opd_agents.trl_rows`.

    ``source`` is a file of trajectory lines, or a run folder, whose training episodes are taken. ``model``
    (default: the run's own) reads the token ids; episodes of an expert may have none. Pairs are of episodes
    in one file, that is of one step. Raises DataError as :func:`import_messages`, and ConfigError for
    ``only_success`` with a form that needs failures, too.
    """
    if only_success and form in ("preferences", "prompts"):
        raise ConfigError(f"--only-success: `{form}` looks at failures, too; leave it out.")
    files = sorted((source / "trajectories").glob("step-*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: a folder without training episodes (trajectories/step-*.jsonl).")
    model = str(source) if model is None and source.is_dir() else model
    chat = None if model is None else _chat(model)
    told = (one for file in files for one in _episodes(file))
    match form:
        case "preferences":
            lines = _preference_lines(files, chat)
        case "prompts":
            lines = _prompt_lines(told)
        case _:
            lines = _lines(told, chat, only_success, to_row if form == "messages" else completion_row)
    return _write(to, lines, skip_bad, KINDS[form])


def _episodes(file: Path) -> Iterator[Told | DataError]:
    rows = read_rows(file)
    for index in range(len(rows)):
        try:
            yield Told(rows.where(index), from_dict(Trajectory, rows[index]["trajectory"]))
        except (UserError, KeyError, TypeError, ValueError) as error:
            told = str(error) if isinstance(error, UserError) else f"no trajectory ({error!r})."
            yield DataError(f"{rows.where(index)}: {told}")


def _lines(
    told: Iterable[Told | DataError],
    chat: Chat | None,
    only_success: bool,
    write: Callable[[Conversation], dict[str, Any]],
) -> Iterator[Line | DataError]:
    for one in told:
        if isinstance(one, DataError):
            yield one
        elif one.episode.success or not only_success:
            try:
                yield Line(to_json(write(_conversation(one.episode, chat))), one.episode.turns)
            except UserError as error:
                yield DataError(f"{one.where}: {error}")


def _preference_lines(files: Iterable[Path], chat: Chat | None) -> Iterator[Line | DataError]:
    seen: set[str] = set()  # what came of a repair may be in the files of further steps, too
    for file in files:
        told = list(_episodes(file))
        yield from (one for one in told if isinstance(one, DataError))
        episodes = [one.episode for one in told if isinstance(one, Told)]
        fresh = [one for one in episodes if one.branch is None or one.uid not in seen]
        seen |= {one.uid for one in fresh if one.branch is not None}
        for pair in pairs(fresh):
            both = pair.chosen, pair.rejected
            try:
                row = preference_row(pair, *(_conversation(one, chat) for one in both))
            except UserError as error:
                yield DataError(f"{file}: {pair.chosen.uid} against {pair.rejected.uid}: {error}")
                continue
            if row is not None:
                first = sum(message["role"] == "assistant" for message in row["prompt"])
                last = None if pair.turn is None else first + 1
                yield Line(to_json(row), [turn for one in both for turn in one.turns[first:last]])


def _prompt_lines(told: Iterable[Told | DataError]) -> Iterator[Line | DataError]:
    found = [  # without their turns, since these are all episodes of a run
        one if isinstance(one, DataError) else one._replace(episode=replace(one.episode, turns=()))
        for one in told
    ]
    yield from (one for one in found if isinstance(one, DataError))
    for row in prompt_rows(one.episode for one in found if isinstance(one, Told)):
        yield Line(to_json(row))


def _conversation(episode: Trajectory, chat: Chat | None) -> Conversation:
    return to_conversation(episode, chat, tools_of(episode))


def _write(
    to: Path, lines: Iterable[Line | DataError], skip_bad: bool, kind: str = "conversations"
) -> Traces:
    """Beside its place, then renamed: a file is there whole or not at all."""
    rows = turns = tokens = 0
    bad: list[DataError] = []
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{PARTIAL}{to.name}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for line in lines:
                if isinstance(line, DataError):
                    bad.append(line)
                    continue
                file.write(line.text + "\n")
                rows += 1
                turns += len(line.turns)
                tokens += sum(len(turn.action_ids) for turn in line.turns)
        if not skip_bad:
            refuse_bad(bad, rows + len(bad))
        if not rows:
            raise DataError(f"There are no {kind} to write to {to}; {len(bad)} rows are bad.")
        os.replace(partial, to)
    finally:
        partial.unlink(missing_ok=True)
    return Traces(rows, turns, tokens, tuple(map(str, bad)), kind)


def _chat(model: str) -> Chat:
    path = newest_checkpoint(model)
    return load_chat(path, load_tokenizer(path))
