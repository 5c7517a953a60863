"""Trajectories -> token tensors. One ``pack`` serves trainer and teacher: both score the same history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_agents.errors import AlignmentError
from opd_agents.types import SpanKind, Trajectory, Turn

KINDS = tuple(SpanKind)


@dataclass(frozen=True, slots=True)
class Packed:
    """R rows (one per segment of a trajectory) and a flat table of their N action tokens, in row order.

    ``rows[r]`` are the ids of a row, int64 [T_r]. For action token n: ``row[n]`` and ``position[n]`` (>= 1)
    say where it stands, ``target[n]`` is its id, ``behaviour[n]`` the log-prob it was sampled with (NaN where
    the actor does not sample), ``turn[n]`` counts turns over the whole batch, ``episode[n]`` trajectories,
    ``kind[n]`` indexes ``KINDS`` (-1: in no span). Forced ids stand in the rows only. ``turns`` lists
    (trajectory, turn within it) of each counted turn.
    """

    rows: tuple[Tensor, ...]
    row: Tensor
    position: Tensor
    target: Tensor
    behaviour: Tensor
    turn: Tensor
    episode: Tensor
    kind: Tensor
    turns: tuple[tuple[int, int], ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(ids) for ids in self.rows)

    def per_turn(self, values: Tensor) -> Tensor:
        """Sum of per-token ``values`` [N] over each turn: [number of turns]."""
        return torch.zeros(len(self.turns), dtype=values.dtype).index_add(0, self.turn, values)

    def of_kinds(self, kinds: Sequence[SpanKind]) -> Tensor:
        """Which tokens stand in spans of these kinds: bool [N]."""
        return torch.isin(self.kind, torch.tensor([KINDS.index(kind) for kind in kinds]))

    def micro_batches(self, max_tokens: int, keep: Tensor | None = None) -> Iterator[MicroBatch]:
        """Padded batches of at most ``max_tokens`` (a longer row alone), rows of similar length together.

        ``keep`` (bool [N]) drops action tokens that nothing needs, and rows left without any.
        """
        index = torch.arange(len(self.target)) if keep is None else keep.nonzero().squeeze(1)
        by_row: dict[int, list[int]] = {}
        for token, row in zip(index.tolist(), self.row[index].tolist(), strict=True):
            by_row.setdefault(row, []).append(token)
        group: list[int] = []
        for row in sorted(by_row, key=lambda r: (len(self.rows[r]), r)):
            if group and (len(group) + 1) * len(self.rows[row]) > max_tokens:
                yield self._micro_batch(group, by_row)
                group = []
            group.append(row)
        if group:
            yield self._micro_batch(group, by_row)

    def _micro_batch(self, rows: list[int], by_row: dict[int, list[int]]) -> MicroBatch:
        ids = torch.zeros(len(rows), max(len(self.rows[row]) for row in rows), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(self.rows[row])] = self.rows[row]
        tokens = torch.tensor([token for row in rows for token in by_row[row]])
        batch_row = torch.tensor([i for i, row in enumerate(rows) for _ in by_row[row]])
        real = sum(len(self.rows[row]) for row in rows)
        return MicroBatch(ids, batch_row, self.position[tokens] - 1, tokens, real)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """``ids`` int64 [B, T], right-padded; the hidden state that predicts action token ``tokens[i]`` of the
    packed table stands at ``[row[i], column[i]]``. ``n_tokens`` counts ids without padding."""

    ids: Tensor
    row: Tensor
    column: Tensor
    tokens: Tensor
    n_tokens: int


_NONE = torch.zeros(0, dtype=torch.int64)
EMPTY = MicroBatch(torch.zeros(1, 1, dtype=torch.int64), _NONE, _NONE, _NONE, 0)
"""One position and no action token: a pass over it gives zeros."""


def range_of(turn: int) -> int:
    """The range of depths that a turn (from 0) is of: turn 1, 2, 3-4, 5-8 and so on, counted from 1."""
    return turn.bit_length()


def turns_of(number: int) -> tuple[int, int]:
    """The first and the last turn, counted from 1, of a range of depths."""
    return 2**number // 2 + 1, 2**number


def pack(trajectories: Sequence[Trajectory]) -> Packed:
    """Rows and action tokens of all trajectories, in their order.

    Raises AlignmentError for a turn without ids, log-probs that do not match the ids one to one, or a first
    action without any context.
    """
    rows: list[Tensor] = []
    row: list[int] = []
    position: list[int] = []
    target: list[int] = []
    behaviour: list[float] = []
    turn_of: list[int] = []
    episode: list[int] = []
    kind: list[int] = []
    turns: list[tuple[int, int]] = []
    for number, trajectory in enumerate(trajectories):
        for start, stop in trajectory.segments():
            ids: list[int] = []
            for index in range(start, stop):
                turn = trajectory.turns[index]
                if not turn.action_ids or not turn.context_ids:
                    raise AlignmentError(
                        f"{trajectory.uid}, turn {index}: no token ids; roll out with a chat to train."
                    )
                if turn.logprobs is not None and len(turn.logprobs) != len(turn.action_ids):
                    raise AlignmentError(
                        f"{trajectory.uid}, turn {index}: {len(turn.logprobs)} log-probs "
                        f"for {len(turn.action_ids)} ids."
                    )
                ids += turn.context_ids
                kinds = _kinds(turn)
                chosen = [i for i, one in enumerate(kinds) if one != KINDS.index(SpanKind.FORCED)]
                count = len(chosen)
                row += [len(rows)] * count
                position += [len(ids) + i for i in chosen]
                target += [turn.action_ids[i] for i in chosen]
                behaviour += [turn.logprobs[i] if turn.logprobs else float("nan") for i in chosen]
                kind += [kinds[i] for i in chosen]
                turn_of += [len(turns)] * count
                episode += [number] * count
                turns.append((number, index))
                ids += turn.action_ids
            rows.append(torch.tensor(ids))
    return Packed(
        tuple(rows), torch.tensor(row, dtype=torch.int64), torch.tensor(position, dtype=torch.int64),
        torch.tensor(target, dtype=torch.int64), torch.tensor(behaviour, dtype=torch.float32),
        torch.tensor(turn_of, dtype=torch.int64), torch.tensor(episode, dtype=torch.int64),
        torch.tensor(kind, dtype=torch.int64), tuple(turns),
    )  # fmt: skip


def _kinds(turn: Turn) -> list[int]:
    """The span of each id of a turn's action."""
    kinds = [-1] * len(turn.action_ids)
    for span in turn.spans:
        kinds[span.start : span.stop] = [KINDS.index(span.kind)] * (span.stop - span.start)
    return kinds
