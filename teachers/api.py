"""A model behind an API as the teacher: it has no log-probs to give, so it acts and judges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from opd_agents.api import ApiClient
from opd_agents.chat import Chat
from opd_agents.config import Api
from opd_agents.envs import AgentEnv
from opd_agents.errors import ConfigError
from opd_agents.policies.api import ApiPolicy
from opd_agents.policies.base import Action, History, Policy
from opd_agents.teachers.base import Capability, Teacher
from opd_agents.types import Actor


@dataclass(frozen=True, slots=True)
class Writable:
    """The actions of ``policy``; where the student's ``chat`` cannot write one, the failure to act."""

    policy: Policy
    chat: Chat

    def act(self, histories: Sequence[History]) -> list[Action]:
        actions = self.policy.act(histories)
        return [self._checked(*pair) for pair in zip(histories, actions, strict=True)]

    def _checked(self, history: History, action: Action) -> Action:
        problem = None if action.text is None else self._problem(action.text, history.env)
        if problem is None:
            return action
        why = f"the student's chat cannot write the teacher's action {action.text!r:.200}: {problem}"
        return dataclasses.replace(action, text=None, failure=why)

    def _problem(self, text: str, env: AgentEnv) -> str | None:
        chat, tokenizer = self.chat, self.chat.tokenizer
        if spelled := chat.spells_control(text):
            return f"it spells {spelled!r}"
        try:
            ids = chat.encode_action(text, tools=env.tools, text_only=env.text_only)
        except ConfigError as error:
            return str(error)
        unknown = tokenizer.unk_token_id in set(ids) - chat.end_ids
        return "the tokenizer has no token for some of it" if unknown else None


class ApiTeacher(Teacher):
    """The model that ``settings`` name. Its actions are written in the student's ``chat``; one that cannot be
    ends its episode. ``client`` answers other questions, too. ``store`` is the file of its answers.

    Raises ConfigError where a key is needed and its environment variable is not set.
    """

    can: ClassVar[frozenset[Capability]] = frozenset({Capability.ACT, Capability.JUDGE})

    def __init__(self, settings: Api, chat: Chat, *, store: Path) -> None:
        self.client = ApiClient(settings.model, settings.endpoint, store=store)
        self._acting, self._best = (
            Writable(
                ApiPolicy(
                    self.client, actor=Actor.TEACHER, temperature=temperature,
                    max_tokens=settings.max_tokens, system=settings.system,
                ),
                chat,
            )
            for temperature in (settings.temperature, 0.0)
        )  # fmt: skip

    @property
    def greedy(self) -> Policy:
        return self._best

    @property
    def tokens(self) -> int:
        """Of prompts and answers, as the endpoint counts them; those of stored answers, too."""
        return int(self.client.counts["prompt_tokens"] + self.client.counts["completion_tokens"])

    @property
    def flops(self) -> None:
        """Nobody tells the size of what answers."""
        return None

    def act(self, histories: Sequence[History]) -> list[Action]:
        """Raises what :meth:`ApiClient.ask` raises."""
        return self._acting.act(histories)
