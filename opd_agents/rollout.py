"""Environments x policies -> trajectories. With ``episode.py``, the only place where a failure becomes data.

The live episodes of a call advance turn by turn in lock-step: one ``policy.act`` for all of them, one
``env.step`` each, side by side where the environments run in threads or processes. Episodes whose environment
may have only so many live (``max_live``) begin as others end. An environment that raises or is too slow ends
its own episode with ``Outcome.ERROR``; the others go on.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

from opd_agents.chat import Chat
from opd_agents.envs import AgentEnv
from opd_agents.episode import Episode, Limits, Live
from opd_agents.errors import ConfigError
from opd_agents.policies.base import Policy
from opd_agents.types import Message, ToolCall, Trajectory


def check_conversation(
    episode: Episode, *, make: Callable[..., AgentEnv], chat: Chat, limits: Limits
) -> None:
    """Begin ``episode`` and leave it, to find out before a run what would fail in each of its episodes.

    Raises ConfigError where the chat's template cannot carry this environment's messages or knows no tools,
    or the first prompt leaves no room for an action. An environment that fails is the rollout's matter.
    """
    live = Live(episode, chat, limits)
    live.make(make)
    try:
        if live.outcome is None:
            live.begin()()
        if live.outcome is None:
            chat.suffix_ids([Message("user", "-")], ended=True)
            for tool in live.env.tools[:1]:
                chat.suffix_ids([Message("tool", "-")], ended=True, calls=[ToolCall(tool.name, {})])
            chat.check_tools_shown(live.ids, live.env.tools)
            if live.over_budget() and live.exhausted == "context":
                raise ConfigError(
                    f"Task {episode.task.id!r} of {episode.env_id}: {live.error}. Raise"
                    " rollout.max_context_tokens, shorten the system prompt (chat.system), or leave such"
                    " tasks out."
                )
    finally:
        live.finish(temperature=1.0)


def rollout(
    episodes: Sequence[Episode],
    policy: Policy,
    *,
    make: Callable[..., AgentEnv],
    chat: Chat | None,
    limits: Limits,
    temperature: float,
    on_finished: Callable[[Trajectory], None] = lambda trajectory: None,
) -> list[Trajectory]:
    """Roll out all episodes in lock-step; results in the order given, failed ones included.

    ``temperature`` is recorded with each trajectory. ``on_finished`` is called once per episode as it ends.
    """
    waiting, running = deque(Live(episode, chat, limits) for episode in episodes), list[Live]()
    results: dict[str, Trajectory] = {}
    try:
        while waiting or running:
            fresh = _admit(waiting, running, make, limits)
            _together([one.begin for one in fresh if one.outcome is None])
            for one in running:
                if one.outcome is not None or one.over_budget():
                    results[one.episode.uid] = one.finish(temperature)
                    on_finished(results[one.episode.uid])
            ended = len(running)
            running = [one for one in running if one.outcome is None]
            if waiting and len(running) < ended:
                continue  # there may be room for more
            actions = policy.act([one.history() for one in running]) if running else []
            _together([partial(one.step, action) for one, action in zip(running, actions, strict=True)])
    except BaseException:  # an interrupt, or a policy that fails: what it leaves behind must end, too
        for one in running:
            if one.episode.uid not in results:
                one.host.leave()
        raise
    return [results[episode.uid] for episode in episodes]


def _admit(
    waiting: deque[Live], running: list[Live], make: Callable[..., AgentEnv], limits: Limits
) -> list[Live]:
    """Make those of ``waiting`` that may live beside ``running``, first come, first served, and put them
    there; returns them. How many of an id may live is known from the last one made."""
    live, max_live = Counter(one.episode.env_id for one in running), limits.max_live
    at_once = limits.concurrency or sys.maxsize
    most = {one.episode.env_id: max_live or one.env.max_live for one in running}
    fresh: list[Live] = []
    for one in [waiting.popleft() for _ in range(len(waiting))]:
        id = one.episode.env_id
        if len(running) >= at_once or (live[id] and live[id] >= (most[id] or sys.maxsize)):
            waiting.append(one)
            continue
        running.append(one)
        fresh.append(one)
        one.make(make)
        if one.outcome is None:  # one that could not be made just ends
            live[id] += 1
            most[id] = max_live or one.env.max_live
    return fresh


def _together(begin: Sequence[Callable[[], Callable[[], None]]]) -> None:
    """Begin all, then wait for each."""
    for wait in [one() for one in begin]:
        wait()
