"""Where a failed episode first went wrong. What is found here only *proposes*: `verify` decides.

Wanted is the first action after which the student succeeds less often than before it. No measure finds it
for sure: a teacher finds unusual what is no mistake, and a student's chances need not fall at one action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.correction.evidence import Arm
from opd_agents.correction.states import Acted, Place
from opd_agents.correction.verify import Play, branched, generated
from opd_agents.envs import Snapshot
from opd_agents.policies.base import Policy
from opd_agents.types import Branch, Outcome, Trajectory

FIRST_LOCATING = 2**24  # stream numbers of the rollouts and the draws that locate errors


def may_be_repaired(trajectory: Trajectory) -> bool:
    """A failed episode of the rollout."""
    played = not (trajectory.recorded or trajectory.demonstration or trajectory.branch)
    return trajectory.outcome in (Outcome.FAILURE, Outcome.UNFINISHED) and played


def improbable(
    trajectories: Sequence[Trajectory], packed: Packed, teacher_logprob: Tensor, below: float
) -> list[Place]:
    """(failed trajectory, its first turn to which the teacher gives a log-prob under ``below``);
    ``teacher_logprob`` [N] belongs to ``packed``."""
    return _first(trajectories, packed, packed.per_turn(teacher_logprob) < below)


def divergent(trajectories: Sequence[Trajectory], packed: Packed, gap: Tensor, above: float) -> list[Place]:
    """(failed trajectory, its first turn on which student and teacher differ by more than ``above``);
    ``gap`` [N], of the tokens of ``packed``, is the difference of their log-probs in nats, whose absolute
    values are averaged over a turn's tokens."""
    mean = packed.per_turn(gap.abs()) / packed.per_turn(gap.new_ones(len(gap)))
    return _first(trajectories, packed, mean > above)


def _first(trajectories: Sequence[Trajectory], packed: Packed, wrong: Tensor) -> list[Place]:
    found: dict[int, int] = {}
    for (episode, turn), is_wrong in zip(packed.turns, wrong.tolist(), strict=True):
        if is_wrong and may_be_repaired(trajectories[episode]):
            found.setdefault(episode, turn)
    return [(trajectories[episode], turn) for episode, turn in sorted(found.items())]


def disagreed(
    trajectories: Sequence[Trajectory],
    policy: Policy,
    *,
    samples: int,
    stream: tuple[int, int],
    act: Callable[..., list[bool | None]],
) -> list[Place]:
    """(failed trajectory, its first action that is none of ``samples`` of ``policy`` in the same state, each
    carried out there: one with the same answer that leaves the same state is the same).

    ``act`` is `act_at` with its environments. One turn of all of them is asked about at a time, as ``policy``
    may cost; a turn that it has no answer for is passed over.
    """
    found: dict[str, Place] = {}
    left, turn = [one for one in trajectories if may_be_repaired(one)], 0
    while left := [one for one in left if one.uid not in found and turn < len(one.turns)]:
        places = [(one, turn) for one in left]
        asked = [
            act(places, policy, Acted.changes_nothing, streams=[
                (*stream, FIRST_LOCATING + (turn * len(trajectories) + number) * samples + draw)
                for number in range(len(left))
            ])
            for draw in range(samples)
        ]  # fmt: skip
        for one, answers in zip(left, zip(*asked, strict=True), strict=True):
            said = [answer for answer in answers if answer is not None]
            if said and not any(said):
                found[one.uid] = (one, turn)
        turn += 1
    return [found[one.uid] for one in trajectories if one.uid in found]


def dropped(
    trajectories: Sequence[Trajectory],
    *,
    rollouts: int,
    stream: tuple[int, int],
    save: Callable[[Sequence[Place]], list[Snapshot | None]],
    play: Play,
) -> tuple[list[Place], int]:
    """(failed trajectory, the action with which the student's success falls below half of what it is from the
    start), by bisection with ``rollouts`` from each state that it looks at; and the tokens generated.

    ``save`` is `saved_at` with its environments. Bisection finds *a* fall: success need not fall once and for
    all. Where the student does not succeed from the start either, there is nothing to fall.
    """
    failed = [one for one in trajectories if may_be_repaired(one)]
    ends = {one.uid: (0, len(one.turns)) for one in failed}  # all is well at the first, not at the second
    tokens = looks = 0

    def shares(places: Sequence[Place]) -> list[float]:
        nonlocal tokens, looks
        episodes = []
        for (one, turn), state in zip(places, save(places), strict=True):
            first, looks = FIRST_LOCATING + looks * rollouts, looks + 1
            if state is not None:
                names = {first + number: f"value{turn}-{number}" for number in range(rollouts)}
                episodes += [
                    branched(one, turn, state, None, name, (*stream, place)) for place, name in names.items()
                ]
        played = {one.uid: one for one in play(episodes)} if episodes else {}
        tokens += sum(generated(t.turns[t.branch.turn :]) for t in played.values() if t.branch)
        by = [[t for t in played.values() if t.branch == Branch(one.uid, turn)] for one, turn in places]
        return [Arm.of(found).share or 0.0 for found in by]

    places = [(one, 0) for one in failed]
    values = {one.uid: share for (one, _), share in zip(places, shares(places), strict=True)}
    alive = [one for one in failed if values[one.uid]]
    while places := [
        (one, sum(ends[one.uid]) // 2) for one in alive if ends[one.uid][1] - ends[one.uid][0] > 1
    ]:
        for (one, turn), share in zip(places, shares(places), strict=True):
            low, high = ends[one.uid]
            ends[one.uid] = (turn, high) if share >= values[one.uid] / 2 else (low, turn)
    return [(one, ends[one.uid][0]) for one in alive], tokens
