"""A white-box teacher in this process: scores finished trajectories once, and can act at any state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.errors import ConfigError
from opd_agents.policies.base import Action, History
from opd_agents.policies.models import (
    forward_flops,
    head,
    hidden_states,
    load_chat,
    load_model,
    load_tokenizer,
)
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.teachers.base import HiddenStates
from opd_agents.types import Actor


class LocalTeacher:
    """A frozen model that shares the student's vocabulary and template (checked by fingerprint)."""

    def __init__(self, path: str, chat: Chat, *, dtype: str = "float32", temperature: float = 1.0) -> None:
        """Raises CheckpointError for an unreadable checkpoint, ConfigError for one of another chat."""
        settings = {"kwargs": chat.kwargs, "system": chat.system}
        own = load_chat(path, load_tokenizer(path), settings)
        if own.fingerprint != chat.fingerprint:
            raise ConfigError(
                f"The teacher {path} has another vocabulary or chat template than the student, so it cannot "
                "score the student's tokens. Use a teacher with the student's tokenizer, or build the "
                "student with `student.build.tokenizer` set to the teacher's folder."
            )
        self.model = load_model(path, dtype).requires_grad_(False)
        self.sampler = TransformersSampler(
            self.model, chat.end_ids, actor=Actor.TEACHER, temperature=temperature
        )
        self.greedy = TransformersSampler(
            self.model, chat.end_ids, actor=Actor.TEACHER, temperature=0.0, reuse=False
        )
        self.scored_tokens = 0
        self._scoring_flops = 0

    @property
    def tokens(self) -> int:
        """Tokens scored plus tokens written, so far."""
        return self.scored_tokens + self.sampler.generated_tokens + self.greedy.generated_tokens

    @property
    def flops(self) -> int:
        return self._scoring_flops + self.sampler.flops + self.greedy.flops

    def act(self, histories: Sequence[History]) -> list[Action]:
        return self.sampler.act(histories)

    @torch.no_grad()
    def score(self, packed: Packed, max_tokens: int) -> HiddenStates:
        """Hidden states before every action token of the student's own histories, one pass per trajectory."""
        hidden = torch.empty(len(packed.target), self.model.config.hidden_size, dtype=self.model.dtype)
        for micro in packed.micro_batches(max_tokens):
            hidden[micro.tokens] = hidden_states(self.model, micro.ids)[micro.row, micro.column]
            self.scored_tokens += micro.n_tokens
            self._scoring_flops += forward_flops(self.model, micro.n_tokens, micro.ids.shape[1] / 2)
        return HiddenStates(hidden, head(self.model))
