"""Whose thought stands before a corrected action."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from opd_agents.chat import Chat
from opd_agents.correction.states import Acted, role_before
from opd_agents.envs.actions import same_action
from opd_agents.errors import ConfigError
from opd_agents.policies.base import Action
from opd_agents.types import StopReason

Reasoning = Literal["replace", "keep", "drop"]


def with_reasoning(acted: Acted, chat: Chat, reasoning: Reasoning) -> Action | None:
    """The action with its own thought (``replace``), that which the student had there (``keep``) or none
    (``drop``), written by the chat, by nobody sampled. None where it is not read back as the same action."""
    if reasoning == "replace":
        return acted.action
    env, old, said = acted.env, acted.parent.turns[acted.turn], acted.said
    tools, text_only, context = env.tools, env.text_only, old.context_ids
    theirs = chat.read_message(said.ids, ended=True, context_ids=context, tools=tools, text_only=text_only)
    own = chat.read_message(
        old.action_ids, ended=old.stop_reason is StopReason.END, context_ids=context, tools=tools,
        text_only=text_only,
    )  # fmt: skip
    thought = own.reasoning if reasoning == "keep" else None
    after = role_before(acted.parent, acted.turn)
    try:
        ids = chat.encode_message(replace(theirs, reasoning=thought), after=after, tools=tools)
    except ConfigError:  # a template that cannot write the student's thought
        return None
    parsed = chat.parse(ids, ended=True, context_ids=context, tools=tools, text_only=text_only)
    if not same_action(parsed.action, said.to_env):
        return None
    return Action(acted.action.actor, StopReason.END, ids, policy_version=acted.action.policy_version)
