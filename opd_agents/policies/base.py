"""The policy contract, and the policies that need no model: expert, random, mixtures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opd_agents.envs import AgentEnv
from opd_agents.types import Actor, Message, StopReason, Turn


@dataclass(frozen=True, slots=True)
class History:
    """What a policy sees before one action of one live episode.

    ``ids`` are all tokens so far, the generation prompt included (empty without a chat); ``stream`` is
    (seed, step, episode): with the token position it keys every random draw, so that sampling does not
    depend on batching or on a resume. ``opening`` are the messages of the reset and ``turns`` all that came
    after them, whoever acted: the conversation, for a policy that reads text. ``env`` is the live
    environment, for the scripted expert; ``ask`` calls something of it where it runs, within its time-outs.
    """

    uid: str
    stream: tuple[int, int, int]
    ids: tuple[int, ...]
    opening: tuple[Message, ...]
    max_tokens: int
    env: AgentEnv
    ask: Callable[[Callable[[], str]], str] = lambda function: function()
    turns: tuple[Turn, ...] = ()

    def random(self, purpose: int = 0) -> np.random.Generator:
        """Counter-based uniforms of this episode from this token position on (Philox), a stream a purpose."""
        seed, step, episode = self.stream
        messages = len(self.opening) + len(self.turns)
        return np.random.Generator(
            np.random.Philox(
                key=[seed, step], counter=[0, len(self.ids), messages + 2**32 * purpose, episode]
            )
        )


@dataclass(frozen=True, slots=True)
class Action:
    """One action. A sampler gives ``ids`` and their log-probs; a text policy gives ``text`` (for the
    environment: JSON calls or words) and leaves ``ids`` empty for the chat to encode. ``forced`` are ranges
    of ids that were put there and not sampled, with a log-prob of 0. ``failure`` says why no action could be
    made: the episode ends in an error."""

    actor: Actor
    stop_reason: StopReason
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    text: str | None = None
    policy_version: int = 0
    forced: tuple[tuple[int, int], ...] = ()
    failure: str | None = None

    @property
    def n_sampled(self) -> int:
        return len(self.ids) - sum(stop - start for start, stop in self.forced)


class Policy(Protocol):
    def act(self, histories: Sequence[History]) -> list[Action]:
        """One action of each episode; there is at least one."""
        ...


class Sampler(Policy, Protocol):
    """The student as it acts: actions with ids and log-probs."""

    policy_version: int  # of the actions
    generated_tokens: int  # sampled so far; forced ones are not

    @property
    def flops(self) -> int:
        """Spent so far."""
        ...

    def reset(self, policy_version: int) -> None:
        """The weights have changed."""
        ...

    def release(self) -> None:
        """The episodes have ended: what is kept of them may go."""
        ...


class ExpertPolicy:
    """The environment's own scripted expert, which reads the true state."""

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [_expert_action(history) for history in histories]


def _expert_action(history: History) -> Action:
    try:
        text = history.ask(history.env.expert_action)
        return Action(Actor.EXPERT, StopReason.NOT_SAMPLED, text=text)
    except (
        Exception,
        SystemExit,
    ) as error:  # an environment's, like one of its step(): it ends its own episode
        failure = f"the scripted expert failed: {type(error).__name__}: {error}"
        return Action(Actor.EXPERT, StopReason.NOT_SAMPLED, failure=failure)


class RandomPolicy:
    """A uniformly drawn tool with arguments drawn from its JSON schema, or one character where there are no
    tools: the floor of every table."""

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [
            Action(Actor.RANDOM, StopReason.NOT_SAMPLED, text=self._call(history)) for history in histories
        ]

    def _call(self, history: History) -> str:
        random = history.random()
        if not history.env.tools:
            return str(_draw({}, random))
        tool = history.env.tools[int(random.integers(len(history.env.tools)))]
        properties: Mapping[str, Mapping[str, object]] = tool.parameters.get("properties", {})
        arguments = {name: _draw(schema, random) for name, schema in properties.items()}
        return json.dumps({"name": tool.name, "arguments": arguments}, separators=(",", ":"))


def _draw(schema: Mapping[str, object], random: np.random.Generator) -> object:
    choices = schema.get("enum")
    if isinstance(choices, list):
        return choices[int(random.integers(len(choices)))]
    match schema.get("type"):
        case "integer" | "number":
            return int(random.integers(10))
        case "boolean":
            return bool(random.integers(2))
        case "array":
            return []
        case "object":
            return {}
    return "0123456789abcdefghijklmnopqrstuvwxyz"[int(random.integers(36))]


class MixturePolicy:
    """Each turn is taken by one of several policies, drawn with the given probabilities."""

    def __init__(self, parts: Mapping[str, tuple[Policy, float]]) -> None:
        self._policies = [policy for policy, _ in parts.values()]
        shares = np.array([share for _, share in parts.values()], dtype=np.float64)
        self._edges = np.cumsum(shares / shares.sum())

    def act(self, histories: Sequence[History]) -> list[Action]:
        draws = [history.random(purpose=1).random() for history in histories]  # 0: the policies' own draws
        return _acted(self._policies, np.searchsorted(self._edges, draws, "right").tolist(), histories)


class RelayPolicy:
    """``first`` takes the first turns of an episode, so many as ``turns`` has by its uid, ``then`` the
    others."""

    def __init__(self, first: Policy, then: Policy, turns: Mapping[str, int]) -> None:
        self._policies, self._turns = (first, then), turns

    def act(self, histories: Sequence[History]) -> list[Action]:
        chosen = [int(len(history.turns) >= self._turns[history.uid]) for history in histories]
        return _acted(self._policies, chosen, histories)


def _acted(policies: Sequence[Policy], chosen: Sequence[int], histories: Sequence[History]) -> list[Action]:
    """What each history's policy, of the number that is ``chosen`` for it, does; one call a policy."""
    actions: list[Action | None] = [None] * len(histories)
    for index, policy in enumerate(policies):
        mine = [i for i, choice in enumerate(chosen) if choice == index]
        for i, action in zip(mine, policy.act([histories[i] for i in mine]) if mine else [], strict=True):
            actions[i] = action
    return [action for action in actions if action is not None]
