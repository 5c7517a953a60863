"""LockChain's scripted expert as a teacher with a distribution, for `exposure_bias.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.envs.actions import format_calls
from opd_agents.envs.lockchain import KEY_OF, KEYS, LOCK_SIGNS
from opd_agents.policies.base import Action, History
from opd_agents.teachers import Capability, HiddenStates
from opd_agents.types import Actor, Message, StopReason, ToolCall

ELSEWHERE = 1e-6  # probability of all tokens together that no key's call has in this place
AT_RANDOM = 7 / 8  # of the keys are wrong


class KeyTeacher:
    """Turns the key that fits the sign which the conversation shows with probability 1 - ``delta``, and each
    of the other keys with delta / 7; where no sign is shown, any key. What follows a wrong key in an action
    is the rest of its call; a token that belongs to no call is answered as if the call had gone on.

    What it gives as hidden states are its log-probs, and the head is the identity. It acts as it scores, or
    turns any key (``acts_at_random``), as the noise in another's demonstrations.
    """

    can: ClassVar[frozenset[Capability]] = frozenset({Capability.HIDDEN_STATES, Capability.ACT})

    def __init__(
        self,
        path: str | None,
        chat: Chat,
        *,
        dtype: str,
        temperature: float,
        delta: float,
        acts_at_random: bool = False,
    ) -> None:
        """Raises ConfigError for signs that are not one token each with the run's tokenizer."""
        self.delta, self.tokens, self.flops = delta, 0, 0
        calls = torch.tensor([chat.encode_action(_call(key)) for key in KEYS])  # [8, tokens of a call]
        self._place = int((calls != calls[0]).any(0).nonzero())  # of the key within the call
        self._key_of = torch.full((len(chat.tokenizer),), len(KEYS))  # by the token of a sign; else none
        for sign, key in KEY_OF.items():
            self._key_of[chat.token_id(f" {sign}")] = KEYS.index(key)
        asked = chat.prompt_ids([Message("tool", f"lock {LOCK_SIGNS[0]}")], [], "")
        self._back = len(asked) - asked.index(
            chat.token_id(f" {LOCK_SIGNS[0]}")
        )  # from an action to its sign
        self._table = self._distributions(calls, len(chat.tokenizer))
        self.greedy = _Acts(0.0)
        self._acts = _Acts(AT_RANDOM if acts_at_random else delta)

    def _distributions(self, calls: Tensor, size: int) -> Tensor:
        """Log-probs [9, tokens of a call, V] of each token of a call, by the key that fits; last, by none."""
        table = torch.full((len(KEYS) + 1, calls.shape[1], size), ELSEWHERE / size)
        for key, call in enumerate([*calls, calls[0]]):
            table[key, torch.arange(len(call)), call] = 1.0
            table[key, self._place, calls[:, self._place]] = self.delta / (len(KEYS) - 1)
            table[key, self._place, call[self._place]] = 1 - self.delta
        table[-1, self._place, calls[:, self._place]] = 1 / len(KEYS)
        return (table / table.sum(-1, keepdim=True)).log()

    def act(self, histories: Sequence[History]) -> list[Action]:
        return self._acts.act(histories)

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> HiddenStates:
        self.tokens += packed.n_tokens
        token = torch.arange(len(packed.target))
        first = torch.full((len(packed.turns),), len(token)).scatter_reduce(0, packed.turn, token, "amin")
        shown = [int(packed.rows[packed.row[i]][packed.position[i] - self._back]) for i in first.tolist()]
        key = self._key_of[torch.tensor(shown, dtype=torch.int64)][packed.turn]
        place = (token - first[packed.turn]).clamp(max=self._table.shape[1] - 1)
        return HiddenStates(self._table[key, place], torch.nn.Identity())


def _call(key: str) -> str:
    return format_calls([ToolCall("turn_key", {"key": key})])


class _Acts:
    """Turns the key of the sign that was shown last, or with probability ``delta`` another one."""

    def __init__(self, delta: float) -> None:
        self._delta = delta

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [
            Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=_call(self._key(history)))
            for history in histories
        ]

    def _key(self, history: History) -> str:
        told = [message.content for message in history.opening] + [turn.observation for turn in history.turns]
        right = next(KEY_OF[sign] for text in reversed(told) if (sign := text.split()[-1]) in KEY_OF)
        random = history.random()
        if random.random() >= self._delta:
            return right
        return KEYS.replace(right, "")[int(random.integers(len(KEYS) - 1))]
