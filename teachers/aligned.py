"""A teacher with another tokenizer: it reads the student's conversation in its own words, and what it says is
brought back to the student's tokens span by span.

A span is a shortest run of the student's tokens whose bytes are those of a run of the teacher's. Of an action
alone, never of what stands around it: that each renders with its own chat template.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from opd_agents.batch import Packed, pack
from opd_agents.chat import Chat
from opd_agents.chat.token_bytes import TokenBytes, common_spans
from opd_agents.errors import AlignmentError
from opd_agents.policies.models import chat_settings, load_chat, load_tokenizer
from opd_agents.recordings import tools_of
from opd_agents.teachers.base import Capability, SpanLogprobs, Teacher
from opd_agents.teachers.log_probs import log_probs
from opd_agents.types import ToolSpec, Trajectory, Turn

# Why tokens are of no span.
BYTES = "bytes that are no text, or that the teacher's tokenizer cannot write"
CONTROLS = "control tokens that are none to the other"
READING = "an action that the two chats read differently"
FORCED = "a span that holds tokens which nobody chose"
AFTER = "a history that the teacher cannot see"


def own_chat(path: str, chat: Chat) -> Chat:
    """How the checkpoint ``path`` itself writes the conversations of the student's ``chat``: with its own
    tokenizer and template, and the template's variables that it was saved with (else the student's)."""
    settings = chat_settings(path) or {"kwargs": chat.kwargs}
    settings |= {"system": chat.system, "history": "append", "thinking_budget": None}
    return load_chat(path, load_tokenizer(path), settings)


@dataclass(frozen=True, slots=True)
class Alignment:
    """The teacher's tokens, ``packed``, of episodes with N action tokens of the student's and M of its own;
    the span of each, ``ours`` int64 [N] and ``theirs`` [M], counted over all, -1 where it is of none. Of the
    student's tokens without a span ``left_out`` counts how many there are for which reason."""

    packed: Packed
    ours: Tensor
    theirs: Tensor
    left_out: Counter[str]


@dataclass(frozen=True, slots=True)
class Reading:
    """An action as the teacher reads it, as ``ids``, with ``size`` spans: the span of each token that the
    student chose (``ours``) and of each of the teacher's (``theirs``), -1 of none; ``end`` is the end token,
    where the action has one."""

    ids: tuple[int, ...]
    ours: list[int]
    theirs: list[int]
    size: int
    end: int | None


class Aligner:
    """From the student's ``chat`` to ``own``, the teacher's. Raises ConfigError for tokenizers whose tokens
    do not add up to text."""

    def __init__(self, chat: Chat, own: Chat) -> None:
        self.chat, self.own = chat, own
        self._our_bytes, self._their_bytes = TokenBytes(chat.tokenizer), TokenBytes(own.tokenizer)

    def align(self, trajectories: Sequence[Trajectory]) -> Alignment:
        """From an action on that the teacher cannot be shown as the student meant it, the rest of its episode
        is of no span. Raises ConfigError where the teacher's template cannot carry a conversation."""
        ours, theirs = list[int](), list[int]()
        seen, left_out, size = list[Trajectory](), Counter[str](), 0
        for trajectory in trajectories:
            turns: list[Turn] = []
            for turn, read, context in self._readings(trajectory):
                if isinstance(read, str):
                    left_out[read] += turn.n_chosen
                    ours += [-1] * turn.n_chosen
                    continue
                left_out[FORCED] += read.ours.count(-1)
                ours += [size + span if span >= 0 else -1 for span in read.ours]
                theirs += [size + span if span >= 0 else -1 for span in read.theirs]
                size += read.size
                own = dataclasses.replace(turn, context_ids=context, action_ids=read.ids, logprobs=None)
                turns.append(dataclasses.replace(own, spans=(), starts_segment=not turns))
            seen.append(dataclasses.replace(trajectory, turns=tuple(turns)))
        spans = [torch.tensor(numbers, dtype=torch.int64) for numbers in (ours, theirs)]
        return Alignment(pack(seen), spans[0], spans[1], +left_out)

    def _readings(self, trajectory: Trajectory) -> Iterator[tuple[Turn, Reading | str, tuple[int, ...]]]:
        """Every turn, how the teacher reads its action or else why it cannot, and its ids before it."""
        tools, problem = tools_of(trajectory), ""
        opening = [message for message in trajectory.messages if message.role != "system"]
        system = next((m.content for m in trajectory.messages if m.role == "system"), "")
        context = self.own.prompt_ids(opening, tools, system) if trajectory.turns else ()
        for turn in trajectory.turns:
            read = AFTER if problem else self._read(turn, context, tools)
            yield turn, read, context
            if isinstance(read, str):
                problem = read
            else:
                context = self.own.suffix_ids(
                    turn.messages, ended=read.end is not None, calls=turn.calls, end=read.end
                )

    def _read(self, turn: Turn, context: tuple[int, ...], tools: Sequence[ToolSpec]) -> Reading | str:
        """An action in the teacher's tokens, behind its ``context``; a text says why there is no such."""
        end = self._end(turn)
        body = turn.action_ids if end is None else turn.action_ids[:-1]
        ours = self._our_bytes.of(body)
        try:
            text = b"".join(ours).decode()
        except UnicodeDecodeError:
            return BYTES
        ids: tuple[int, ...] = tuple(self.own.tokenizer.encode(text, add_special_tokens=False))
        theirs = self._their_bytes.of(ids)
        if b"".join(theirs) != text.encode():
            return BYTES
        if _controls(self.chat, body, ours) != _controls(self.own, ids, theirs):
            return CONTROLS
        our_spans, their_spans = common_spans(ours, theirs)
        if end is not None:
            ids = (*ids, end)
            our_spans.append(max(our_spans, default=-1) + 1)
            their_spans.append(our_spans[-1])
        meant = _meaning(self.chat, turn.action_ids, turn.context_ids, tools, ended=end is not None)
        if meant != _meaning(self.own, ids, context, tools, ended=end is not None):
            return READING
        return _whole(Reading(ids, our_spans, their_spans, max(our_spans) + 1, end), turn.forced)

    def _end(self, turn: Turn) -> int | None:
        """The teacher's token for the end of an action: the one that is spelled alike, else the one that its
        template writes there."""
        last = turn.action_ids[-1]
        if last not in self.chat.end_ids:
            return None
        alike = self.own.tokenizer.get_vocab().get(str(self.chat.tokenizer.convert_ids_to_tokens(last)))
        return alike if alike in self.own.end_ids else self.own.end_of(turn.calls)


def _whole(read: Reading, forced: Sequence[tuple[int, int]]) -> Reading:
    """Without the spans that hold forced tokens of the student's, and without these tokens."""
    put = {place for start, stop in forced for place in range(start, stop)}
    cut = {read.ours[place] for place in put}
    ours = [-1 if span in cut else span for place, span in enumerate(read.ours) if place not in put]
    theirs = [-1 if span in cut else span for span in read.theirs]
    return dataclasses.replace(read, ours=ours, theirs=theirs)


def _controls(chat: Chat, ids: Sequence[int], pieces: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """The special tokens of an action, with the bytes before them."""
    added = chat.tokenizer.added_tokens_decoder
    starts = accumulate(map(len, pieces), initial=0)
    special = (i in chat.end_ids or (i in added and added[i].special) for i in ids)
    return [(at, piece) for at, piece, one in zip(starts, pieces, special, strict=False) if one]


def _meaning(
    chat: Chat, ids: Sequence[int], context: Sequence[int], tools: Sequence[ToolSpec], *, ended: bool
) -> tuple[object, ...]:
    """What a chat reads in an action: its calls, its words and its thoughts, and whether it can be read."""
    read = chat.parse(ids, ended=ended, context_ids=context, tools=tools, text_only=not tools)
    return read.calls, read.content, read.reasoning, read.error is None


class AlignedTeacher(Teacher):
    """``teacher``, made for the chat that is the aligner's ``own``, asked about the student's episodes."""

    can: ClassVar[frozenset[Capability]] = frozenset({Capability.SPAN_LOGPROBS})

    def __init__(self, teacher: Teacher, aligner: Aligner) -> None:
        self.teacher, self.aligner = teacher, aligner

    @property
    def tokens(self) -> int:
        """Of its own."""
        return self.teacher.tokens

    @property
    def flops(self) -> int | None:
        return self.teacher.flops

    def score_episodes(
        self, packed: Packed, trajectories: Sequence[Trajectory], max_tokens: int, keep: Tensor
    ) -> tuple[SpanLogprobs, Tensor]:
        """The log-probs of the spans that ``keep`` (bool [N]) touches, and where there are spans at all (bool
        [N]). Raises AlignmentError where ``packed`` is not of these trajectories, ConfigError as align."""
        found = self.aligner.align(trajectories)
        ours, theirs, has = found.ours, found.theirs, found.ours >= 0
        if len(ours) != len(packed.target):
            raise AlignmentError(
                f"{len(ours)} action tokens were aligned with the teacher's, but the table has"
                f" {len(packed.target)}."
            )
        wanted = torch.isin(theirs, ours[keep & has])
        own = torch.zeros(len(theirs))
        if bool(wanted.any()):
            signal = self.teacher.score(found.packed, max_tokens, wanted)
            own = log_probs(signal, found.packed.target, 1.0)["logprobs"]
        size = int(ours.max()) + 1 if len(ours) else 0
        total = torch.zeros(size, dtype=torch.float64).index_add(0, theirs[wanted], own[wanted].double())
        shares = total / ours[has].bincount(minlength=size).clamp(min=1)
        logprobs = torch.zeros(len(ours))
        logprobs[has] = shares[ours[has]].float()
        joined = torch.zeros_like(has)
        joined[1:] = has[1:] & (ours[1:] == ours[:-1])
        return SpanLogprobs(logprobs, joined), has
