"""The text of single tokens, by the tokenizer that a run or an evaluation kept."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from opd_agents.errors import CheckpointError, ConfigError, RunFolderError
from opd_agents.report.escaping import visible
from opd_agents.report.reading import Run
from opd_agents.runs import latest_checkpoint
from opd_agents.types import Turn

if TYPE_CHECKING:
    from opd_agents.chat.token_bytes import TokenBytes


class Pieces:
    """Cuts actions into the tokens that were sampled; of a run without a tokenizer none."""

    def __init__(self, checkpoint: str | None) -> None:
        self._checkpoint = checkpoint
        self._bytes: TokenBytes | None = None
        self._whole: dict[
            int, str | None
        ] = {}  # the text of a token, None of one that is part of a character

    def of(self, turn: Turn) -> list[str]:
        """Visible text of each id of the action, nothing where the ids are not known or not those of the
        turn's text: another model's, perhaps. A character of several tokens is the last one's."""
        if self._checkpoint is None or not turn.action_ids:
            return []
        if self._bytes is None:
            self._bytes = _token_bytes(self._checkpoint)
        if self._bytes is None:
            return []
        try:
            found = [self._known(self._bytes, token) for token in turn.action_ids]
        except (KeyError, IndexError, OverflowError, TypeError):  # of an id that the tokenizer does not have
            return []
        pieces = [piece for piece in found if piece is not None]
        if len(pieces) < len(found):
            pieces = _decoded(self._bytes.of(turn.action_ids))
        return [visible(piece) for piece in pieces] if turn.text in "".join(pieces) else []

    def _known(self, tokenizer: TokenBytes, token: int) -> str | None:
        if token not in self._whole:
            try:
                self._whole[token] = tokenizer.of([token])[0].decode()
            except UnicodeDecodeError:
                self._whole[token] = None
        return self._whole[token]


def _decoded(written: Sequence[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(one, i == len(written)) for i, one in enumerate(written, 1)]


@cache
def _token_bytes(checkpoint: str) -> TokenBytes | None:
    """None where the tokenizer is not to be had or its tokens do not add up to a text."""
    from opd_agents.chat.token_bytes import TokenBytes
    from opd_agents.policies.models import load_tokenizer

    try:
        return TokenBytes(load_tokenizer(checkpoint))
    except (CheckpointError, ConfigError):
        return None


def pieces_of_run(stage: Run, whole: Run) -> Pieces:
    """Of the stage's own newest checkpoint, else of the run's."""
    for folder in (stage.path, whole.path, *(part.path for _, part in reversed(list(whole.training())))):
        try:
            return Pieces(str(latest_checkpoint(folder)))
        except (CheckpointError, RunFolderError):
            continue
    return Pieces(None)


def pieces_of_policy(identity: Mapping[str, object]) -> Pieces:
    """Of a policy as an evaluation's `how.json` names it: its checkpoint, where it still is there."""
    checkpoint = identity.get("checkpoint")
    there = isinstance(checkpoint, str) and Path(checkpoint).is_dir()
    return Pieces(str(checkpoint) if there else None)


def cut(pieces: Sequence[str], most: int) -> tuple[str, list[int], int]:
    """The pieces' text of at most about ``most`` characters, how long each one in it is in the units of a
    script's strings (UTF-16), and how many characters are left out."""
    text, sizes, left_out = [], list[int](), 0
    for number, piece in enumerate(pieces):
        if most <= 0:
            left_out = sum(map(len, pieces[number:]))
            break
        text.append(piece)
        sizes.append(len(piece) if piece.isascii() else len(piece.encode("utf-16-le")) // 2)
        most -= len(piece)
    return "".join(text), sizes, left_out
