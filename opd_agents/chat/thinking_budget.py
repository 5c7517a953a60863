"""A budget of thought: when it is used up, the thought is closed for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from opd_agents.chat.reasoning import Thought


class ThinkingBudget:
    """After ``tokens`` tokens of one action written inside a thought, ``close_ids`` follow.

    Text decides what a marker is, as where the action is read: any ids that decode to it. ``vocabulary`` maps
    the tokenizer's pieces to their ids.
    """

    def __init__(
        self,
        thought: Thought,
        tokens: int,
        close_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        vocabulary: Mapping[str, int],
    ) -> None:
        self.thought, self.tokens, self.close_ids, self.decode = thought, tokens, tuple(close_ids), decode
        # Only a token with a marker's last character can complete it; all others need no decoding.
        self.completing = {
            marker: frozenset(i for piece, i in vocabulary.items() if marker[-1] in piece)
            for marker in (thought.open, thought.close)
        }

    def follow(self, context_ids: Sequence[int]) -> WrittenAction:
        """An action that is about to be written after ``context_ids``."""
        end = self.decode(list(context_ids[-2 * len(self.thought.open) :]))
        return WrittenAction(self, inside=self.thought.opens(end))


class WrittenAction:
    """One action while it is written. ``forced`` are the ranges in it of the ids that closed a thought,
    ``is_forced`` says whether the newest id is one of them."""

    def __init__(self, budget: ThinkingBudget, *, inside: bool) -> None:
        self.forced: list[tuple[int, int]] = []
        self.is_forced = False
        self._budget, self._inside = budget, inside
        self._length = self._spent = 0
        self._due: tuple[int, ...] = ()
        self._tail: list[int] = []  # ids since the last marker, as many as may be part of the next

    def write(self, sampled: int) -> int:
        """The next id: the ``sampled`` one, or in its stead one that closes a thought."""
        token = sampled
        if self._due:
            token, self._due = self._due[0], self._due[1:]
            start = self.forced.pop()[0] if self.is_forced else self._length
            self.forced.append((start, self._length + 1))
            self.is_forced = True
        else:
            self.is_forced = False
            self._read(token)
        self._length += 1
        return token

    def _read(self, token: int) -> None:
        budget, thought = self._budget, self._budget.thought
        self._spent += self._inside
        marker = thought.close if self._inside else thought.open
        self._tail = [*self._tail[-2 * len(marker) :], token]
        if token in budget.completing[marker] and marker in budget.decode(self._tail):
            self._inside, self._tail = not self._inside, []
        if self._inside and self._spent >= budget.tokens:
            self._due, self._inside, self._tail = budget.close_ids, False, []
