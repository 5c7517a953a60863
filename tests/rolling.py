"""Episodes, trajectories and policies that the tests of the engine share."""

from collections.abc import Callable, Sequence
from typing import Any

from opd_agents import envs
from opd_agents.chat import Chat
from opd_agents.episode import Episode, Limits
from opd_agents.policies import Action, History, Policy
from opd_agents.rollout import rollout
from opd_agents.types import Actor, Outcome, StopReason, Task, Trajectory, Turn

DESK = "opd_agents/OrderDesk-v0"
LIMITS = Limits(max_tokens_per_turn=8, max_context_tokens=320)


def desk_episodes(n: int, *, group_size: int = 1, **options: Any) -> list[Episode]:
    """``n`` episodes of the easy OrderDesk, a task for every ``group_size`` of them."""
    return [
        Episode(
            uid=f"e{i}", env_id=DESK, seed=i, task=Task(str(i // group_size), "train"), stream=(5, 0, i),
            env_kwargs={"level": "easy"} | options, group=f"g{i // group_size}" if group_size > 1 else "",
        )
        for i in range(n)
    ]  # fmt: skip


def rolled(
    episodes: Sequence[Episode],
    policy: Policy,
    chat: Chat | None = None,
    *,
    limits: Limits = LIMITS,
    temperature: float = 1.0,
    make: Callable[..., envs.AgentEnv] = envs.make,
) -> list[Trajectory]:
    return rollout(episodes, policy, make=make, chat=chat, limits=limits, temperature=temperature)


def sampler(model: Any, chat: Chat, *, temperature: float = 1.0, **options: Any) -> Any:
    from opd_agents.policies.sampler import TransformersSampler

    options = {"actor": Actor.STUDENT, "temperature": temperature} | options
    return TransformersSampler(model, chat.end_ids, **options)


class Scripted:
    """Acts by a function from the history to the action's text; with a ``chat`` as token ids that count as
    sampled with probability 1."""

    def __init__(
        self, choose: Callable[[History], str], actor: Actor = Actor.STUDENT, chat: Chat | None = None
    ) -> None:
        self.choose, self.actor, self.chat = choose, actor, chat

    def act(self, histories: Sequence[History]) -> list[Action]:
        return [self._action(self.choose(history)) for history in histories]

    def _action(self, text: str) -> Action:
        if self.chat is None:
            return Action(self.actor, StopReason.NOT_SAMPLED, text=text)
        ids = self.chat.encode_action(text)
        return Action(self.actor, StopReason.END, ids, (0.0,) * len(ids))


def turn(context: Sequence[int], action: Sequence[int], /, **fields: Any) -> Turn:
    """A turn by hand, sampled by the student with log-probs of -1."""
    defaults: dict[str, Any] = {
        "context_ids": tuple(context), "action_ids": tuple(action), "logprobs": (-1.0,) * len(action),
        "actor": Actor.STUDENT, "policy_version": 0, "text": "", "action": "", "observation": "",
        "reward": 0.0, "terminated": False, "truncated": False, "stop_reason": StopReason.END,
        "state_digest": "",
    }  # fmt: skip
    return Turn(**defaults | fields)


def trajectory(turns: Sequence[Turn], **fields: Any) -> Trajectory:
    defaults: dict[str, Any] = {
        "uid": "t", "env_id": DESK, "env_kwargs": {}, "seed": 0, "task": Task("0", "train"),
        "outcome": Outcome.FAILURE, "reward": 0.0,
    }  # fmt: skip
    return Trajectory(turns=tuple(turns), **defaults | fields)
