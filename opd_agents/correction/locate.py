"""Where a failed episode first went wrong. What is found here only *proposes*: `verify` decides.

Wanted is the first action after which the student succeeds less often than before it. No measure finds it
for sure: a teacher finds unusual what is no mistake, and a student's chances need not fall at one action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.correction.evidence import Arm
from opd_agents.correction.states import Acted, Place, first_turn, may_be_repaired
from opd_agents.correction.verify import Play, branched, generated
from opd_agents.envs import Snapshot
from opd_agents.policies.base import Policy
from opd_agents.types import Trajectory

FIRST_LOCATING = 2**24  # stream numbers of the rollouts and the draws that locate errors
MOST = 4096  # episodes of a step; keeps the streams of turns apart


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
        one = trajectories[episode]
        if is_wrong and may_be_repaired(one) and turn >= first_turn(one):
            found.setdefault(episode, turn)
    return [(trajectories[episode], turn) for episode, turn in sorted(found.items())]


def disagreed(
    failed: Mapping[int, Trajectory],
    policy: Policy,
    *,
    samples: int,
    stream: tuple[int, int],
    act: Callable[..., list[bool | None]],
) -> dict[int, int]:
    """Of each of the ``failed`` episodes, by its number in the step, the first action that is none of
    ``samples`` of ``policy`` in the same state, in words or in effect: these are carried out there, and one
    with the same answer that leaves the same state is the same. Not of one where there is no such action.

    ``act`` is `act_at` with its environments. One turn of all of them is asked about at a time, as ``policy``
    may cost; a turn that it has no answer for is passed over.
    """
    found: dict[int, int] = {}
    left, passed = dict(failed), 0
    while left := {
        n: one for n, one in left.items() if n not in found and first_turn(one) + passed < len(one.turns)
    }:
        places = [(one, first_turn(one) + passed) for one in left.values()]
        first = FIRST_LOCATING + passed * MOST * samples
        asked = [
            act(
                places, policy, Acted.changes_nothing,
                streams=[(*stream, first + number * samples + draw) for number in left],
            )
            for draw in range(samples)
        ]  # fmt: skip
        for number, (_, turn), answers in zip(left, places, zip(*asked, strict=True), strict=True):
            said = [answer for answer in answers if answer is not None]
            if said and not any(said):
                found[number] = turn
        passed += 1
    return found


def dropped(
    failed: Mapping[int, Trajectory],
    *,
    rollouts: int,
    stream: tuple[int, int],
    save: Callable[[Sequence[Place]], list[Snapshot | None]],
    play: Play,
) -> tuple[dict[int, int], int]:
    """Of each of the ``failed`` episodes, by its number in the step, the action with which the student's
    success falls below half of what it is from the start, by bisection with ``rollouts`` from each state that
    it looks at; and the tokens generated.

    ``save`` is `saved_at` with its environments. Bisection finds *a* fall: success need not fall once and for
    all. Where the student does not succeed from the start either, there is nothing to fall.
    """
    tokens = 0

    def shares(turns: Mapping[int, int]) -> dict[int, float]:
        nonlocal tokens
        states = save([(failed[number], turn) for number, turn in turns.items()])
        episodes = [
            branched(
                failed[number], turn, state, None, f"value{turn}-{trial}",
                (*stream, FIRST_LOCATING + (turn * MOST + number) * rollouts + trial),
            )
            for (number, turn), state in zip(turns.items(), states, strict=True)
            if state is not None
            for trial in range(rollouts)
        ]  # fmt: skip
        played = play(episodes) if episodes else []
        arms: dict[tuple[str, int], list[Trajectory]] = {}
        for one in played:
            if one.branch:
                arms.setdefault((one.branch.parent, one.branch.turn), []).append(one)
        tokens += sum(generated(one.turns[one.branch.turn :]) for one in played if one.branch)
        return {n: Arm.of(arms.get((failed[n].uid, k), ())).share or 0.0 for n, k in turns.items()}

    first = {n: first_turn(one) for n, one in failed.items() if first_turn(one) < len(one.turns)}
    start = shares(first) if first else {}
    ends = {n: (first[n], len(failed[n].turns)) for n, share in start.items() if share}  # well before it
    while turns := {n: (low + high) // 2 for n, (low, high) in ends.items() if high - low > 1}:
        for number, share in shares(turns).items():
            low, high = ends[number]
            well = share >= start[number] / 2
            ends[number] = (turns[number], high) if well else (low, turns[number])
    return {number: low for number, (low, _) in ends.items()}, tokens
