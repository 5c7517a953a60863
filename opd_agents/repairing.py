"""The repairs of a step: where the student's failed episodes went wrong, as ``correction.propose`` has it,
and what is proved to be better there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from opd_agents import envs
from opd_agents.config import Correction
from opd_agents.correction import (
    Proposed,
    Repair,
    correct,
    disagreed,
    divergent,
    dropped,
    first_turn,
    improbable,
    may_be_repaired,
)
from opd_agents.correction.states import Place, act_at, saved_at
from opd_agents.experience import Experience, joined, score
from opd_agents.judging import NOT_ASKED, NOT_COMPARED, Compared, Judged
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.base import Policy
from opd_agents.rollout import rollout
from opd_agents.session import Session
from opd_agents.teachers.api import Writable
from opd_agents.types import Trajectory


@dataclass(frozen=True, slots=True)
class Located:
    """The errors that were found, who acts there instead, what a judge was asked for it, and the tokens that
    were generated to find them."""

    errors: Sequence[Place]
    policy: Policy
    judged: Judged = NOT_ASKED
    tokens: int = 0


def with_repairs(session: Session, experience: Experience) -> Experience:
    """The experience and its accepted repairs, within the share of tokens that the config grants them."""
    settings = session.config.correction
    if settings is None:
        return experience
    totals, share = session.totals, settings.token_share
    rolled_out = totals["generated_tokens"] - totals["correction_tokens"]
    rolled_out += sum(one.n_action_tokens for one in experience.trajectories if one.branch is None)
    token_budget = share / (1 - share) * rolled_out - totals["correction_tokens"]
    repairs: list[Repair] = []
    judged, locating_tokens, looked_at = NOT_ASKED, 0, experience
    for again in range(settings.repairs):
        if token_budget <= 0:  # before a judge is paid for no proof
            break
        located = _located(session, looked_at, settings, first=again * len(experience.trajectories))
        new = correct(
            located.errors, settings, stream=(session.config.seed, session.step),
            token_budget=token_budget - located.tokens, student=session.student_sampler,
            proposes=located.policy, resumes=session.policies[settings.resumes], make=envs.launch,
            chat=session.chat, limits=session.limits, temperature=session.config.rollout.temperature,
            world=session.world, again=again,
        )  # fmt: skip
        repairs += new
        judged, locating_tokens = judged.and_then(located.judged), locating_tokens + located.tokens
        token_budget -= located.tokens + sum(repair.tokens for repair in new)
        failed = [repair.failed for repair in new if repair.failed is not None]
        if not failed or again + 1 == settings.repairs:
            break
        looked_at = score(session, failed)
    repairs, keyed = _keyed(session, repairs, settings)
    practised = [one for repair in repairs for one in repair.practised]
    branches = [repair.branch for repair in repairs if repair.branch is not None]
    told = replace(experience, proposed=judged, locating_tokens=locating_tokens, keyed=keyed)
    learned = session.keep([*branches, *practised], settings.kept)
    if not learned:  # nobody is asked about nothing
        return replace(told, repairs=tuple(repairs))
    return joined(told, score(session, learned), tuple(repairs))


def _keyed(session: Session, repairs: list[Repair], settings: Correction) -> tuple[list[Repair], Compared]:
    """With the key steps of what was practised as a judge has them, where it is asked."""
    if settings.key_by != "judge":
        return repairs, NOT_COMPARED
    keyed = session.world.from_main(lambda: session.judge_key_steps(repairs))
    return [repair.with_keys(keyed.keys) for repair in repairs], keyed


def _located(session: Session, experience: Experience, settings: Correction, first: int) -> Located:
    """``first``: a number for the first of the episodes, the others' follow."""
    propose, trajectories = settings.propose, experience.trajectories
    if propose.by == "judge":
        return _judged(session, _some(session, trajectories, settings, first))
    policy: Policy = ExpertPolicy()
    if propose.by == "student":
        policy = session.student_sampler
    elif propose.by == "teacher" and session.teacher is not None:
        policy = session.teacher.greedy
    if propose.scored:
        terms = experience.frozen.references["teacher"]
        if propose.where == "improbable":
            errors = improbable(trajectories, experience.packed, terms.logprob, propose.below)
        else:
            gap = experience.frozen.logprob - terms.logprob
            errors = divergent(trajectories, experience.packed, gap, propose.above)
        return Located(errors, policy)
    failed = _some(session, trajectories, settings, first)
    turns, tokens = _tried(session, failed, settings, policy)
    return Located([(failed[number], turn) for number, turn in turns.items()], policy, tokens=tokens)


def _tried(
    session: Session, failed: Mapping[int, Trajectory], settings: Correction, policy: Policy
) -> tuple[dict[int, int], int]:
    """The turns at which the environments, played again, say that ``failed`` episodes went wrong; each rank
    tries its share."""
    propose, stream = settings.propose, (session.config.seed, session.step)
    limits, world = session.limits, session.world
    mine = {n: one for place, (n, one) in enumerate(failed.items()) if place % world.size == world.rank}
    if propose.where == "dropped":
        play = partial(
            rollout, policy=session.student_sampler, make=envs.launch, chat=session.chat, limits=limits,
            temperature=session.config.rollout.temperature,
        )  # fmt: skip
        save = partial(saved_at, make=envs.launch, limits=limits)
        found, tokens = dropped(mine, rollouts=propose.rollouts, stream=stream, save=save, play=play)
    else:
        several = session.teacher if propose.samples > 1 and session.teacher else policy
        act: Callable[..., list[bool | None]] = partial(
            act_at, make=envs.launch, chat=session.chat, limits=limits
        )
        found, tokens = disagreed(mine, several, samples=propose.samples, stream=stream, act=act), 0
    shares = world.gather((found, tokens))
    turns = {number: turn for found, _ in shares for number, turn in found.items()}
    return dict(sorted(turns.items())), sum(tokens for _, tokens in shares)


def _judged(session: Session, failed: Mapping[int, Trajectory]) -> Located:
    judged = session.world.from_main(lambda: session.judge_errors(list(failed.values())))
    texts = {one.trajectory: one.replacement or "" for one in judged.feedback}
    turns = {one.trajectory: one.turn or 0 for one in judged.feedback}
    errors = [
        (one, turns[one.uid])
        for one in failed.values()
        if one.uid in turns and turns[one.uid] >= first_turn(one)
    ]
    return Located(errors, Writable(Proposed(texts), session.chat), judged)


def _some(
    session: Session, trajectories: Sequence[Trajectory], settings: Correction, first: int
) -> dict[int, Trajectory]:
    """As many failed episodes as may be repaired in a step, drawn by it, with their numbers."""
    failed = {first + number: one for number, one in enumerate(trajectories) if may_be_repaired(one)}
    random = np.random.Generator(
        np.random.Philox(key=[session.config.seed, session.step], counter=[0, first, 7, 2**63])
    )
    some = sorted(random.permutation(list(failed))[: settings.episodes_per_step].tolist())
    return {number: failed[number] for number in some}
