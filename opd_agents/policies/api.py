"""A model behind an API as the agent: it reads the conversation as text and answers with text or calls."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from opd_agents.api import ApiClient, Reply, Request
from opd_agents.api.conversation import messages_of
from opd_agents.envs.actions import format_calls
from opd_agents.policies.base import Action, History
from opd_agents.types import Actor, StopReason


class ApiPolicy:
    """The model of ``client`` acts, with at most ``max_tokens`` (its own) an action. At a ``temperature`` of
    0 equal histories have one answer; at others every episode draws its own, the same one when it is played
    again. ``system`` replaces the environment's system prompt. A request that fails ends its episode."""

    def __init__(
        self,
        client: ApiClient,
        *,
        actor: Actor,
        temperature: float,
        max_tokens: int = 1024,
        system: str | None = None,
    ) -> None:
        self.client, self.actor, self.system = client, actor, system
        self.temperature, self.max_tokens = temperature, max_tokens

    def act(self, histories: Sequence[History]) -> list[Action]:
        """Raises what :meth:`ApiClient.ask` raises."""
        replies = self.client.ask([self._request(history) for history in histories])
        return [self._action(reply) for reply in replies]

    def _request(self, history: History) -> Request:
        tools = history.env.tools
        return Request(
            messages_of(history.opening, history.turns, tools, self.system), tools,
            temperature=self.temperature, max_tokens=self.max_tokens,
            sample=zlib.crc32(repr(history.stream).encode()) if self.temperature else 0,
        )  # fmt: skip

    def _action(self, reply: Reply) -> Action:
        if reply.failure is not None:
            why = f"{self.client.model} gave no action ({reply.failure}): {reply.detail}"
            return Action(self.actor, StopReason.NOT_SAMPLED, failure=why)
        text = format_calls(reply.calls) if reply.calls else reply.text
        return Action(self.actor, StopReason.NOT_SAMPLED, text=text)
