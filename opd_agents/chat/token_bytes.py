"""The bytes that tokens stand for: what two tokenizers have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from opd_agents.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte of a character that a SentencePiece vocabulary lacks
_TEXT = 'a {"id": 7} \u00e9\u4e2d\U0001f600 b'


class TokenBytes:
    """The bytes of each token of ``tokenizer`` behind other text, remembered.

    Byte-level tokens are read by their alphabet, bytes by their names, all others by what the tokenizer's
    decoder writes for them behind another token. Raises ConfigError for a tokenizer whose tokens, joined so,
    are not the text that it read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known = {i: t.content.encode() for i, t in tokenizer.added_tokens_decoder.items()}
        self._decoder = tokenizer.backend_tokenizer.decoder
        state = json.loads(self._decoder.__getstate__()) if self._decoder is not None else {}
        self._byte_level = "ByteLevel" in _types(state)
        known = "".join(c for c in _TEXT if tokenizer.unk_token_id not in self._ids(c))
        if b"".join(self.of(self._ids(known))) != known.encode():
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ConfigError(
                f"The tokens of {name} do not add up to the text that they are of, byte by byte, so that they"
                " cannot be aligned with another tokenizer's."
                " Take a teacher whose tokenizer decodes to what it has read."
            )

    def of(self, ids: Iterable[int]) -> list[bytes]:
        """What each of the ids adds to the text."""
        return [self._known[i] if i in self._known else self._find(i) for i in ids]

    def _find(self, token: int) -> bytes:
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._byte_level:
            found = bytes(_ALPHABET[character] for character in piece)
        elif byte := _BYTE.fullmatch(piece):
            found = bytes.fromhex(byte[1])
        elif self._decoder is None:
            found = piece.encode()
        else:
            before, both = self._decoder.decode(["a"]), self._decoder.decode(["a", piece])
            found = both.removeprefix(before).encode()
        self._known[token] = found
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def common_spans(ours: Iterable[bytes], theirs: Iterable[bytes]) -> tuple[list[int], list[int]]:
    """Two sequences of pieces of the same bytes, cut at every byte where a piece of each ends: the number of
    the span that every piece of both stands in. A piece without bytes belongs to what is before it."""
    ends = [list(accumulate(map(len, pieces))) for pieces in (ours, theirs)]
    cuts = {end: number for number, end in enumerate(sorted({*ends[0]} & {*ends[1]}))}
    numbers: list[list[int]] = []
    for own in ends:
        number, found = len(cuts) - 1, list[int]()
        for end in reversed(own):
            number = cuts.get(end, number)
            found.append(number)
        numbers.append(found[::-1])
    return numbers[0], numbers[1]


def _types(state: Any) -> set[str]:
    """Of a decoder and of those that it is made of."""
    return {str(state.get("type")), *(name for part in state.get("decoders", ()) for name in _types(part))}


def _alphabet() -> dict[str, int]:
    """Of byte-level tokens: printable bytes stand for themselves, the others for characters from 256 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + place): b for place, b in enumerate(hidden)}


_ALPHABET = _alphabet()
