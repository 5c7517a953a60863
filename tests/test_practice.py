"""What follows an accepted repair: the student's own rollouts in the state before it, with the reward of the
key step; further repairs; who resumes."""

import dataclasses
import json
import math

import pytest
import torch
from rolling import LIMITS, Scripted, desk_episodes, rolled, trajectory, turn

from opd_agents import envs
from opd_agents.batch import pack
from opd_agents.composition import action_advantages, reward_advantages, selected, source_of
from opd_agents.config import Correction
from opd_agents.config.loss import RewardPart, Select
from opd_agents.correction import correct
from opd_agents.correction.evidence import Arm, Evidence
from opd_agents.correction.practice import key_step, match_reward, published_reward, value_reward, worth
from opd_agents.correction.states import restore
from opd_agents.types import Actor, Branch, KeyStep, Outcome

CLOSE = '{"name":"close_ticket","arguments":{}}'
LOOK_UP = '{"name":"get_policy","arguments":{"topic":"orders"}}'
ONE_SUCCESS = {"rollouts": [1], "rivals": []}
OWN = {"rollouts": [3], "rivals": ["own"], "accept": 0.85}
LIMIT = dataclasses.replace(LIMITS, max_context_tokens=2000)
SETTLE = ("refund_order", "cancel_order", "recall_order")


def expert(history):
    return history.env.expert_action()


def close_too_soon(history):
    """Closes the ticket in place of every change of an order."""
    action = expert(history)
    return CLOSE if json.loads(action)["name"] in SETTLE else action


def by_chance(history):
    """Settles or closes too soon."""
    return expert(history) if history.random().random() < 0.5 else close_too_soon(history)


@pytest.fixture(scope="module")
def failed(desk_chat):
    policy = Scripted(close_too_soon, chat=desk_chat)
    found = rolled(desk_episodes(6, timeout_rate=0.0), policy, desk_chat, limits=LIMIT)
    assert all(one.outcome is Outcome.FAILURE for one in found)
    return found


def repaired(errors, chat, student, *, resumes=None, again=0, proposes=expert, **settings):
    student = Scripted(student, chat=chat)
    return correct(
        errors, Correction(audit=None, **settings), stream=(1, 2), token_budget=1e6, student=student,
        proposes=Scripted(proposes, Actor.TEACHER, chat), make=envs.make, chat=chat, limits=LIMIT,
        resumes=Scripted(resumes, Actor.TEACHER, chat) if resumes else student, temperature=1.0, again=again,
    )  # fmt: skip


def last_turns(trajectories):
    return [(one, len(one.turns) - 1) for one in trajectories]


def test_the_student_practises_in_the_state_before_an_accepted_repair(failed, desk_chat):
    found = repaired(
        last_turns(failed), desk_chat, by_chance, proposes=expert, verify=ONE_SUCCESS, practice=6
    )
    accepted = [one for one in found if one.accepted]
    assert accepted and any(not one.accepted and one.practised == () for one in found)
    for repair in accepted:
        group, played = f"{repair.parent.uid}@{repair.turn}", repair.practised
        assert len(played) == 6 and len({one.uid for one in played}) == 6
        assert len({one.seed for one in played}) == 6  # each under noise of its own
        for one in played:
            assert (one.group, source_of(one)) == (group, "practice")
            assert [t.weight for t in one.turns[: repair.turn]] == [0.0] * repair.turn
            assert one.turns[repair.turn].actor is Actor.STUDENT
            settled = one.turns[repair.turn].action == repair.teacher_action
            assert one.branch.key is (KeyStep.REPAIR if settled else KeyStep.OWN)
        again = repaired([(repair.parent, repair.turn)], desk_chat, by_chance, verify=ONE_SUCCESS)
        generated = sum(t.n_chosen for one in played for t in one.turns[repair.turn :])
        assert again[0].practised == () and repair.tokens >= generated
    keys = {one.branch.key for repair in accepted for one in repair.practised}
    assert keys == {KeyStep.REPAIR, KeyStep.OWN}


def test_without_a_rival_one_success_is_proof(failed, desk_chat):
    for student, accepted in ((expert, True), (lambda history: LOOK_UP, False)):
        for one in repaired(last_turns(failed), desk_chat, student, verify=ONE_SUCCESS):
            assert one.accepted is accepted
            assert one.evidence == Evidence(Arm(int(accepted), 1), {})


def test_the_turns_before_a_repair_weigh_what_is_configured(failed, desk_chat):
    for one in repaired(last_turns(failed), desk_chat, expert, verify=OWN, prefix_weight=0.25):
        weights = [turn.weight for turn in one.branch.turns]
        assert weights == [0.25] * one.turn + [1.0] * (len(weights) - one.turn) and one.turn > 0


def test_a_run_that_fails_after_a_repair_is_repaired_in_turn(failed, desk_chat):
    """The student closes the ticket in place of every change: a ticket of two orders needs two repairs."""
    first = repaired(last_turns(failed), desk_chat, close_too_soon, verify=OWN)
    unsolved = [one for one in first if not one.accepted]
    assert unsolved and all(one.failed is not None for one in unsolved)
    left = [one.failed for one in unsolved]
    for one, repair in zip(left, unsolved, strict=True):
        assert one.branch == Branch(repair.parent.uid, repair.turn, noise=((0, repair.parent.seed),))
        assert one.turns[repair.turn].action == repair.teacher_action
        for k in range(len(one.turns)):  # it is gone back to as it was, noise included
            assert restore(one, k, envs.make).state_digest() == one.turns[k].state_digest
    second = repaired(last_turns(left), desk_chat, close_too_soon, again=1, verify=OWN)
    solved = [one for one in second if one.accepted]
    assert solved
    for one in solved:
        turns, inherited = one.branch.turns, one.parent.branch.turn
        assert one.branch.success and one.branch.branch.noise == one.parent.noise
        assert turns[inherited].actor is Actor.TEACHER and turns[inherited].weight == 0.0  # the first repair
        assert turns[one.turn].actor is Actor.TEACHER and turns[one.turn].weight == 1.0


def test_branches_of_noisy_episodes_are_gone_back_to(desk_chat):
    """The desk's time-outs are its noise: of the parent's seed up to the branch, then its own."""
    student = Scripted(close_too_soon, chat=desk_chat)
    noisy = rolled(desk_episodes(8, timeout_rate=0.4), student, desk_chat, limits=LIMIT)
    assert any("timeout" in turn.observation for one in noisy for turn in one.turns)
    repairs = repaired(last_turns(noisy), desk_chat, close_too_soon, verify=OWN, episodes_per_step=8)
    left = [one.failed for one in repairs if one.failed is not None]
    assert any("timeout" in turn.observation for one in left for turn in one.turns[one.branch.turn :])
    for one in left:
        for k in range(len(one.turns)):
            assert restore(one, k, envs.make).state_digest() == one.turns[k].state_digest


def test_the_teacher_may_go_on(failed, desk_chat):
    for one in repaired(last_turns(failed), desk_chat, close_too_soon, resumes=expert, verify=OWN):
        assert one.accepted and one.evidence.rivals["own"] == Arm(0, 3)
        assert {turn.actor for turn in one.branch.turns[one.turn :]} == {Actor.TEACHER}


def test_a_student_that_tries_again_is_the_control(failed, desk_chat):
    """Nobody helps it; what it does otherwise in another try is verified like a repair."""
    student = Scripted(by_chance, chat=desk_chat)
    found = correct(
        last_turns(failed), Correction(audit=None, verify=OWN), stream=(1, 2), token_budget=1e6,
        student=student, proposes=student, resumes=student, make=envs.make, chat=desk_chat, limits=LIMIT,
        temperature=1.0,
    )  # fmt: skip
    assert 0 < len(found) < len(failed)  # where it did the same once more there is nothing to verify
    assert all(one.branch.turns[one.turn].actor is Actor.STUDENT for one in found if one.branch)


def practised(outcome, turns=3, key=None, uid="p", action="a", reward=0.0, worth=None):
    steps = [turn([1], [2], action=action if k == 1 else "x", state_digest=str(k)) for k in range(turns)]
    return trajectory(
        steps,
        uid=uid,
        group="e@1",
        branch=Branch("e", 1, key=key, worth=worth),
        outcome=outcome,
        reward=reward,
        final_digest="end",
    )


@pytest.mark.parametrize(
    ("outcome", "turns", "key", "reward"),
    [
        (Outcome.SUCCESS, 3, KeyStep.OWN, 1.0),
        (Outcome.SUCCESS, 2, KeyStep.REPAIR, 1.0),
        (Outcome.FAILURE, 3, KeyStep.REPAIR, 0.5),
        (Outcome.FAILURE, 3, KeyStep.OTHER, 0.1),
        (Outcome.FAILURE, 3, KeyStep.OWN, 0.0),
        (Outcome.FAILURE, 2, KeyStep.REPAIR, 0.0),  # the key step is the final answer
        (Outcome.UNFINISHED, 3, KeyStep.REPAIR, 0.0),
        (Outcome.UNFINISHED, 3, KeyStep.OTHER, 0.0),
    ],
)
def test_the_published_reward(outcome, turns, key, reward):
    assert published_reward(practised(outcome, turns, key)) == reward
    whole = trajectory([turn([1], [2])], outcome=outcome)
    assert published_reward(whole) == float(outcome is Outcome.SUCCESS)


def test_the_reward_of_the_key_step_alone():
    for key, paid in zip(KeyStep, (0.5, 0.0, 0.0), strict=True):
        one = practised(Outcome.UNFINISHED, key=key, worth=0.25)
        assert match_reward(one, 1) == paid and value_reward(one, 1) == 0.25
        assert all(math.isnan(reward(one, 2)) for reward in (match_reward, value_reward))
    for other in (trajectory([turn([1], [2])]), practised(Outcome.SUCCESS)):  # no key step, no worth known
        assert all(math.isnan(reward(other, 1)) for reward in (match_reward, value_reward))


def test_an_action_is_worth_what_its_rollouts_show():
    evidence = Evidence(Arm(3, 4), {"own": Arm(1, 4), "retry": Arm(2, 4)})
    assert [worth(key, evidence, []) for key in KeyStep] == [0.25, -0.25, None]
    tries = [practised(Outcome.SUCCESS), *[practised(Outcome.FAILURE)] * 3]
    alone = Evidence(Arm(3, 4), {})
    assert [worth(key, alone, tries) for key in KeyStep] == [0.5, None, None]


def test_a_key_step_is_known_by_what_it_does():
    parent = dataclasses.replace(practised(Outcome.FAILURE, action="own"), branch=None, group="")
    arm = practised(Outcome.SUCCESS, action="repair")
    others = {
        "observation": dataclasses.replace(arm.turns[1], action="c", observation="other answer"),
        "same": dataclasses.replace(arm.turns[1], action="c", observation="good"),
    }
    good = dataclasses.replace(arm.turns[1], observation="good")
    arms = {"repair": [dataclasses.replace(arm, turns=(arm.turns[0], good, arm.turns[2]))]}

    def key(action):
        one = dataclasses.replace(arm, turns=(arm.turns[0], action, arm.turns[2]))
        return key_step(one, parent, 1, "repair", arms)

    assert key(good) is KeyStep.REPAIR
    assert key(dataclasses.replace(parent.turns[1], observation="other answer")) is KeyStep.OWN
    assert key(others["observation"]) is KeyStep.OTHER
    assert key(others["same"]) is KeyStep.REPAIR  # other words, the same answer and the same state after it
    assert key_step(dataclasses.replace(arm, turns=arm.turns[:1]), parent, 1, "repair", arms) is KeyStep.OTHER


def test_what_is_practised_is_compared_with_itself():
    """By the outcome all tokens after the prefix, by the key step those of it alone."""
    episodes = [
        dataclasses.replace(
            practised(Outcome.SUCCESS if n == 0 else Outcome.UNFINISHED, uid=f"p{n}", reward=float(n == 0)),
            turns=tuple(
                dataclasses.replace(t, weight=float(k >= 1))
                for k, t in enumerate(practised(Outcome.FAILURE).turns)
            ),
        )
        for n in range(4)
    ]
    episodes.append(trajectory([turn([1], [2])], uid="e", group="g", reward=1.0))  # of another group
    packed = pack(episodes)
    outcome = reward_advantages(episodes, RewardPart(normalise="none"), Select())
    assert outcome.tolist() == [0.75, -0.25, -0.25, -0.25, 0.0]
    paid = {"p0": 0.5, "p1": 0.5, "p2": 0.0}  # p3: not verified

    def score(one, number):
        return paid.get(one.uid, math.nan) if number == 1 else math.nan

    part = RewardPart(key_step="match", normalise="none")
    values = action_advantages(packed, episodes, part, Select(), score)
    by_place = {place: value for place, value in zip(packed.turns, values.tolist(), strict=True) if value}
    assert by_place == pytest.approx({(0, 1): 1 / 6, (1, 1): 1 / 6, (2, 1): -1 / 3})
    weights = selected(packed, episodes, Select(source="practice"))
    chosen = torch.tensor([episode for episode, _ in packed.turns])[packed.turn]
    assert set(chosen[weights != 0].tolist()) == {0, 1, 2, 3}
    assert not bool(selected(packed, episodes, Select(source="correction")).any())
