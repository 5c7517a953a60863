"""A teacher whose log-probs were taken once, for experience that does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from opd_agents.batch import Packed, pack
from opd_agents.errors import AlignmentError
from opd_agents.teachers.base import Capability, SampledLogprobs, Teacher, TeacherSignal, TeacherTopK
from opd_agents.teachers.cache import Cache, rows_of
from opd_agents.teachers.log_probs import log_probs
from opd_agents.types import Trajectory

SHARD_EPISODES = 64


class CachedTeacher(Teacher):
    """Says what a :class:`Cache` holds: ``k`` of the most probable tokens, or with 0 the action token's
    log-prob alone. ``behind`` makes the teacher to be asked for what it lacks; ``tokens`` and ``flops`` were
    spent on that, in :meth:`fill`."""

    can: ClassVar[frozenset[Capability]] = frozenset({Capability.SAMPLED_LOGPROBS, Capability.TEACHER_TOP_K})

    def __init__(self, cache: Cache, k: int, behind: Callable[[], Teacher] | None = None) -> None:
        self.cache, self.k, self.behind = cache, k, behind
        self._tokens = 0
        self._flops: int | None = 0

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def flops(self) -> int | None:
        return self._flops

    def lacks(self, episode: Trajectory) -> bool:
        """Whether there is an action token of its that the cache does not hold."""
        return bool(self.cache.missing(pack([episode])).any())

    def reopen(self) -> None:
        """See what another process has filled in."""
        self.cache = Cache(self.cache.folder)

    def fill(self, teacher: Teacher, episodes: Iterable[Trajectory], size: int, max_tokens: int) -> None:
        """Ask ``teacher`` for what is missing of the ``size`` episodes; an interrupt loses one shard."""
        for batch in _shards(episodes, size):
            packed = pack(batch)
            if bool((missing := self.cache.missing(packed)).any()):
                signal = teacher.score(packed, max_tokens, missing)
                index = self.cache.index
                self.cache.add(packed, missing, log_probs(signal, packed.target, index.temperature, index.k))
        self._tokens, self._flops = teacher.tokens, teacher.flops

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> TeacherSignal:
        """Raises AlignmentError for tokens that the cache does not hold."""
        wanted = torch.ones(len(packed.target), dtype=torch.bool) if keep is None else keep
        if bool((wanted & self.cache.missing(packed)).any()):
            raise AlignmentError(
                f"The cache {self.cache.folder} does not hold these episodes, token by token as they are: the"
                " data has changed since it was checked, or the chat writes it otherwise."
            )
        size, width = len(packed.target), max(1, self.k)
        sampled, top = torch.zeros(size), torch.zeros(size, width)
        ids = torch.arange(width).expand(size, width).clone()
        for key, start, stop in rows_of(packed):
            if not bool(wanted[start:stop].any()):
                continue
            sampled[start:stop] = self.cache.read(key, "logprobs")
            if self.k:
                top[start:stop] = self.cache.read(key, "top_logprobs")[:, : self.k]
                ids[start:stop] = self.cache.read(key, "top_ids")[:, : self.k].long()
        return TeacherTopK(ids, top, sampled) if self.k else SampledLogprobs(sampled)


def _shards(episodes: Iterable[Trajectory], size: int) -> Iterable[list[Trajectory]]:
    """``size`` episodes in batches, with a bar where they are many."""
    shown = track(
        episodes, "Asking the teacher once", total=size, console=Console(stderr=True), transient=True,
        disable=size < SHARD_EPISODES,
    )  # fmt: skip
    batch: list[Trajectory] = []
    for episode in shown:
        batch.append(episode)
        if len(batch) == SHARD_EPISODES:
            yield batch
            batch = []
    if batch:
        yield batch
