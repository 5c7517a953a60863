"""A word-level tokenizer built from sample texts, for models of a few hundred thousand parameters.

Everything that an environment writes around its values (``{"order_id":"``, ``","status":"``) is one token,
enum-like words and tool names are one token each, and identifiers are spelt in single characters, so that
copying one that was never seen is the same skill as copying one that was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from opd_agents.chat.templates import compact_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNK, START, END = "<|pad|>", "<unk>", "<|im_start|>", "<|im_end|>"
ROLES = tuple(f"{START}{role}\n" for role in ("system", "user", "assistant", "tool"))
_SPECIAL = re.compile("|".join(map(re.escape, (*ROLES, PAD, UNK, START, END))))
_ALPHABET = "\t\n" + "".join(map(chr, range(32, 127)))
# Two letters or more (underscores, inner apostrophes and hyphens too); nothing of what has a digit in it.
_WORD = re.compile(r"(?<![\w-])[^\W\d](?:[^\W\d]|['-](?=[^\W\d]))+(?!\w|-\w)")
_SCALAR = re.compile(r'"((?:[^"\\]|\\.)*)"(?!\s*:)|"(?:[^"\\]|\\.)*"|(true|false|null|-?\d[\d.eE+-]*)')
_OPENING = re.compile(r"[{\[]")
_MARKER_BEFORE, _MARKER_AFTER = re.compile(r"<\w+>\s*$"), re.compile(r"\s*</\w+>")


def build_word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer for ``texts``: prompts, actions and observations, as the template renders them.

    The same set of texts gives the same ids. Besides the pieces of the texts the vocabulary holds every
    printable ASCII character, newline, tab and the texts' other characters, so decode(encode(text)) == text
    for any text over them. Its chat template is the compact one; pad, unk and eos (``<|im_end|>``) are set.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    parts = [part for text in texts for part in _SPECIAL.split(text)]
    alphabet = sorted(set(_ALPHABET).union(*parts))
    pieces = _pieces(parts)
    specials = [PAD, UNK, START, END, *ROLES]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet, *sorted(pieces)])}
    longest_first = sorted(pieces, key=lambda piece: (-len(piece), piece))
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        extra_special_tokens=[START, *ROLES],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = compact_template()
    return tokenizer


def _pieces(parts: list[str]) -> set[str]:
    """All vocabulary entries longer than one character."""
    pieces = {"<tool_call>", "</tool_call>"}
    prose: list[str] = []
    names: set[str] = set()  # words that are a whole value somewhere: one token, the same in prose as in JSON
    for part in parts:
        cursor = 0
        for start, stop in _json_regions(part):
            prose.append(part[cursor:start])
            scaffolding, values = _split_json(part[start:stop])
            pieces.update(scaffolding)
            names.update(value for value in values if _WORD.fullmatch(value))
            prose.extend(values)
            cursor = stop
        prose.append(part[cursor:])
    pieces.update(_prose_pieces(prose, names))
    return {piece for piece in pieces if len(piece) > 1}


def _json_regions(text: str) -> Iterator[tuple[int, int]]:
    """Where JSON objects and arrays stand, with the markers (``<tool_call>``) that directly enclose them."""
    decoder = json.JSONDecoder()
    cursor = 0
    while opening := _OPENING.search(text, cursor):
        start = opening.start()
        try:
            _, stop = decoder.raw_decode(text, start)
        except ValueError:
            cursor = start + 1
            continue
        before = _MARKER_BEFORE.search(text[:start])
        after = _MARKER_AFTER.match(text, stop)
        cursor = after.end() if after else stop
        yield (before.start() if before else start), cursor


def _split_json(text: str) -> tuple[list[str], list[str]]:
    """The text between the scalar values of one JSON region, and the values (strings without quotes)."""
    scaffolding, values, cursor = [], [], 0
    for match in _SCALAR.finditer(text):
        group = match.lastindex
        if group is None:  # an object's key belongs to the scaffolding
            continue
        scaffolding.append(text[cursor : match.start(group)])
        values.append(match[group])
        cursor = match.end(group)
    return [*scaffolding, text[cursor:]], values


def _prose_pieces(prose: list[str], names: set[str]) -> set[str]:
    """Words with the spaces that belong to them.

    A space goes with the word after it, as usual. Before a name or an identifier, whose token must be the
    same everywhere, it goes with the word before, if that word never stands before an ordinary one.
    """
    pieces: set[str] = set()
    before_name: set[str] = set()
    before_word: set[str] = set()
    for text in prose:
        words = list(_WORD.finditer(text))
        word_starts = {match.start() for match in words if match[0] not in names}
        for match in words:
            start, stop = match.span()
            if match[0] in names:
                pieces.add(match[0])
                continue
            piece = text[start - (text[start - 1 : start] == " ") : stop]
            pieces.add(piece)
            if text[stop : stop + 1] == " ":
                (before_word if stop + 1 in word_starts else before_name).add(piece)
    return pieces | {f"{piece} " for piece in before_name - before_word}
