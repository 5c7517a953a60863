"""States of finished episodes, gone back to by verified replay, and what another would do in them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar

from opd_agents.chat import Chat
from opd_agents.envs import AgentEnv, Snapshot
from opd_agents.envs.actions import same_action
from opd_agents.episode import Limits, Said, read_action, segment_ids
from opd_agents.errors import NotForkable, ReplayDivergence
from opd_agents.hosting import Host
from opd_agents.policies.base import Action, History, Policy
from opd_agents.types import Outcome, StopReason, Trajectory

T = TypeVar("T")
Place: TypeAlias = tuple[Trajectory, int]
"""An episode, and the number (from 0) of one of its turns: the state before its action."""


def may_be_repaired(trajectory: Trajectory) -> bool:
    """A failed episode, of the rollout or after a repair."""
    played = not (trajectory.recorded or trajectory.demonstration)
    tried = trajectory.branch is None or trajectory.branch.tried
    return trajectory.outcome in (Outcome.FAILURE, Outcome.UNFINISHED) and played and tried


def first_turn(trajectory: Trajectory) -> int:
    """The first turn of a failed episode in which an error is looked for: after a repair, the next."""
    return 0 if trajectory.branch is None else trajectory.branch.turn + 1


@dataclass(frozen=True, slots=True)
class Acted:
    """What another did at turn ``turn`` of ``parent``, not carried out yet: ``said`` as a turn would hold it.
    ``host`` has the live environment in the state before."""

    parent: Trajectory
    turn: int
    action: Action
    said: Said
    host: Host

    @property
    def same(self) -> bool:
        """Whether it asks for what was done there."""
        return same_action(self.said.to_env, self.parent.turns[self.turn].action)

    @property
    def env(self) -> AgentEnv:
        """The live environment."""
        assert self.host.env is not None  # one that was restored
        return self.host.env

    def changes_nothing(self) -> bool:
        """Whether it is the same in effect: carried out (now, on the live environment) it has the same answer
        and leads to the same state, under the same noise."""
        if self.same:
            return True
        env = self.env
        observation, _, terminated, _, _ = self.host.call(lambda: env.step(self.said.to_env))
        digest = self.host.call(env.state_digest)
        return (observation, terminated, digest) == effect(self.parent, self.turn)


def act_at(
    places: Sequence[Place],
    policy: Policy,
    made_of: Callable[[Acted], T | None],
    *,
    make: Callable[..., AgentEnv],
    chat: Chat,
    limits: Limits,
    streams: Sequence[tuple[int, int, int]],
) -> list[T | None]:
    """Restore each state, let ``policy`` act in it once, and keep what is ``made_of`` that; None where the
    action does not come to an end, and, with a warning, where the environment fails. ``streams`` key the
    draws. A state that is named several times is restored once, and acted in as often."""
    if len(places) > (size := limits.max_live or len(places)):
        some = partial(act_at, policy=policy, made_of=made_of, make=make, chat=chat, limits=limits)
        parts = [slice(start, start + size) for start in range(0, len(places), size)]
        return [one for part in parts for one in some(places[part], streams=streams[part])]
    restored: dict[tuple[str, int], Host | None] = {}
    for parent, turn in places:
        if (parent.uid, turn) not in restored:
            restored[parent.uid, turn] = _restored(parent, turn, make, limits)
    hosts = [restored[parent.uid, turn] for parent, turn in places]
    try:
        histories = [
            _history(parent, turn, host.env, limits, stream)
            for (parent, turn), host, stream in zip(places, hosts, streams, strict=True)
            if host is not None and host.env is not None
        ]
        actions = iter(policy.act(histories) if histories else ())
        return [
            None if host is None else _kept(parent, turn, host, next(actions), chat, made_of)
            for (parent, turn), host in zip(places, hosts, strict=True)
        ]
    finally:
        for host in filter(None, restored.values()):
            with contextlib.suppress(Exception, SystemExit):
                host.close()


def effect(trajectory: Trajectory, turn: int) -> tuple[str, bool, str]:
    """The answer to an action, whether it ended the episode, and the digest of the state after it."""
    turns = trajectory.turns
    after = turns[turn + 1].state_digest if turn + 1 < len(turns) else trajectory.final_digest
    return turns[turn].observation, turns[turn].terminated, after


def role_before(parent: Trajectory, turn: int) -> str:
    """Of the message before the action of this turn."""
    last = parent.turns[turn - 1].messages[-1:] if turn else ()
    return last[0].role if last else "user"


def saved_at(
    places: Sequence[Place], *, make: Callable[..., AgentEnv], limits: Limits
) -> list[Snapshot | None]:
    """Each state as a value; None, with a warning, where the environment fails."""

    def saved(place: Place) -> Snapshot | None:
        if (host := _restored(*place, make, limits)) is None or host.env is None:
            return None
        try:
            return host.call(host.env.snapshot)
        except Exception as error:
            _may_fail(error, place[0])
            return None
        finally:
            with contextlib.suppress(Exception, SystemExit):
                host.close()

    return [saved(place) for place in places]


def _history(
    parent: Trajectory, turn: int, env: AgentEnv, limits: Limits, stream: tuple[int, int, int]
) -> History:
    before = parent.turns[:turn]
    most = min(limits.max_tokens_per_turn, limits.action_room(before))
    return History(parent.uid, stream, _ids_before(parent, turn), parent.messages, most, env, turns=before)


def _kept(
    parent: Trajectory,
    turn: int,
    host: Host,
    action: Action,
    chat: Chat,
    made_of: Callable[[Acted], T | None],
) -> T | None:
    ended = action.stop_reason in (StopReason.END, StopReason.NOT_SAMPLED)
    if action.failure is not None or not ended or host.env is None:
        return None
    context = parent.turns[turn].context_ids
    said = read_action(host.env, chat, action, context, after=role_before(parent, turn))
    try:
        return made_of(Acted(parent, turn, action, said, host))
    except Exception as error:
        _may_fail(error, parent)
        return None


def _restored(parent: Trajectory, turn: int, make: Callable[..., AgentEnv], limits: Limits) -> Host | None:
    """The environment in the state before ``turn``; None, with a warning, where it fails."""
    seconds = limits.episode_timeout or (limits.step_timeout and limits.step_timeout * (turn + 1))
    host = Host(None, seconds)
    try:
        env = host.make(lambda: make(parent.env_id, **parent.env_kwargs))
        host.call(lambda: _replay(parent, turn, env))
    except BaseException as error:
        host.leave()
        _may_fail(error, parent)
        return None
    return host


def _may_fail(error: BaseException, parent: Trajectory) -> None:
    """What an environment does ends no run, unless it is one that cannot be gone back in at all."""
    if isinstance(error, ReplayDivergence | NotForkable) or not isinstance(error, Exception | SystemExit):
        raise error
    problem = f"{type(error).__name__}: {error}"
    warnings.warn(f"{parent.uid}: not gone back to, its environment failed: {problem}", stacklevel=2)


def restore(parent: Trajectory, turn: int, make: Callable[..., AgentEnv]) -> AgentEnv:
    """A live environment in the state before ``turn``, by verified replay.

    Raises ReplayDivergence where a recorded digest is not met.
    """
    env = make(parent.env_id, **parent.env_kwargs)
    _replay(parent, turn, env)
    return env


def _replay(parent: Trajectory, turn: int, env: AgentEnv) -> None:
    (_, seed), *afresh = parent.noise
    env.reset(seed=seed, options={"task_id": parent.task.id, "split": parent.task.split})
    if env.state_digest() != parent.turns[0].state_digest:
        raise ReplayDivergence(
            f"{parent.uid}: resetting {parent.env_id} to {parent.task} gave another state than before."
        )
    actions = [t.action for t in parent.turns]
    digests = [t.state_digest for t in parent.turns[1:]] + [parent.final_digest]
    for branched, seed in ((at, seed) for at, seed in afresh if at <= turn):
        env.replay(actions[env.turn : branched], digests[env.turn : branched])
        env.restore(env.snapshot(), reseed=seed)
    env.replay(actions[env.turn : turn], digests[env.turn : turn])


def _ids_before(parent: Trajectory, turn: int) -> tuple[int, ...]:
    past = () if parent.turns[turn].starts_segment else segment_ids(parent.turns[:turn])
    return past + parent.turns[turn].context_ids
