import dataclasses
import json

import pytest
import torch
from rolling import LIMITS, Scripted, desk_episodes, rolled

from opd_agents import envs
from opd_agents.batch import pack
from opd_agents.config import Correction
from opd_agents.correction import correct, earliest_errors
from opd_agents.correction.states import restore
from opd_agents.envs.orderdesk import OrderDesk
from opd_agents.errors import ReplayDivergence
from opd_agents.policies import Action
from opd_agents.types import Actor, Branch, Outcome, StopReason

SETTINGS = Correction(trials=3, episodes_per_step=4)
CLOSE = '{"name":"close_ticket","arguments":{}}'
LOOK_UP = '{"name":"get_policy","arguments":{"topic":"orders"}}'
WRONG = {"refund_order": "cancel_order", "cancel_order": "recall_order", "recall_order": "refund_order"}
LIMIT = dataclasses.replace(LIMITS, max_context_tokens=2000)


def expert(history):
    return history.env.expert_action()


def first_settling_goes_wrong(history):
    """Like the expert, but closes the ticket in place of its first change of an order."""
    action = expert(history)
    settles = json.loads(action)["name"] in WRONG
    return CLOSE if settles and not history.env.database.rows("SELECT * FROM changes") else action


def careless(chat):
    return Scripted(first_settling_goes_wrong, chat=chat)


def hopeless(chat):
    """Closes the ticket at once, always."""
    return Scripted(lambda history: CLOSE, chat=chat)


def perfect(chat):
    return Scripted(expert, Actor.TEACHER, chat)


@pytest.fixture(scope="module")
def failed(desk_chat):
    """Episodes that go well until the first order is to be settled, each failed by one premature action."""
    trajectories = rolled(desk_episodes(6, timeout_rate=0.0), careless(desk_chat), desk_chat, limits=LIMIT)
    assert all(t.outcome is Outcome.FAILURE and t.turns[-1].action == CLOSE for t in trajectories)
    return trajectories


def doubts(trajectories, turns):
    """Teacher log-probs that find turn ``turns[i]`` of trajectory i improbable, and all after it."""
    packed = pack(trajectories)
    doubted = torch.tensor([t >= turns[e] for e, t in packed.turns])[packed.turn]
    return packed, torch.where(doubted, -5.0, -0.01)


def repair(trajectories, student, teacher, chat, *, turns=None, budget=1e6, settings=SETTINGS, stream=(1, 2)):
    turns = turns or [len(t.turns) - 1 for t in trajectories]
    packed, teacher_logprob = doubts(trajectories, turns)
    errors = earliest_errors(trajectories, packed, teacher_logprob, settings.propose.below)
    return correct(
        errors, settings, stream=stream, token_budget=budget, student=student, teacher=teacher,
        make=envs.make, chat=chat, limits=LIMIT, temperature=1.0,
    )  # fmt: skip


def test_the_state_before_an_action_is_restored(failed):
    for one in failed[:3]:
        for k, turn in enumerate(one.turns):
            env = restore(one, k, envs.make)
            assert env.state_digest() == turn.state_digest and env.turn == k
        assert not env.over  # the premature end has not happened
        assert env.database.rows("SELECT status FROM ticket") == [("open",)]
        assert json.loads(env.expert_action())["name"] in WRONG


def test_an_irreversible_action_is_undone_by_restoring(desk_chat):
    def wrong_tool(history):
        call = json.loads(expert(history))
        return json.dumps(call | {"name": WRONG.get(call["name"], call["name"])}, separators=(",", ":"))

    (one,) = rolled(desk_episodes(1, timeout_rate=0.0), Scripted(wrong_tool), limits=LIMIT)
    k = next(i for i, t in enumerate(one.turns) if t.calls[0].name in WRONG.values())
    before, after = restore(one, k, envs.make), restore(one, k + 1, envs.make)
    assert before.database.rows("SELECT * FROM changes") == []
    assert len(after.database.rows("SELECT * FROM changes")) == 1


@pytest.mark.parametrize("tampered", ["first digest", "later digest", "action", "task"])
def test_a_record_that_does_not_replay_is_refused(failed, tampered):
    one = failed[0]
    k = len(one.turns) - 1
    turns = list(one.turns)
    match tampered:
        case "first digest":
            turns[0] = dataclasses.replace(turns[0], state_digest="0" * 16)
        case "later digest":
            turns[k] = dataclasses.replace(turns[k], state_digest="0" * 16)
        case "action":
            turns[k - 1] = dataclasses.replace(
                turns[k - 1], action=restore(one, k, envs.make).expert_action()
            )
        case "task":
            one = dataclasses.replace(one, task=dataclasses.replace(one.task, id="77"))
    with pytest.raises(ReplayDivergence, match=r"e0|Replaying"):
        restore(dataclasses.replace(one, turns=tuple(turns)), k, envs.make)


def test_a_repair_at_the_earliest_error_is_accepted(failed, desk_chat):
    repairs = repair(failed, careless(desk_chat), perfect(desk_chat), desk_chat)
    assert len(repairs) == SETTINGS.episodes_per_step
    for one in repairs:
        assert one.turn == len(one.parent.turns) - 1
        assert (one.accepted, one.trials, one.success_student, one.success_repair) == (True, 3, 0.0, 1.0)
        assert one.teacher_action == restore(one.parent, one.turn, envs.make).expert_action()
        branch = one.branch
        assert branch.success and branch.branch == Branch(one.parent.uid, one.turn) and branch.group == ""
        *inherited, repaired = branch.turns[: one.turn + 1]
        assert [t.weight for t in inherited] == [0.0] * one.turn
        assert [dataclasses.replace(t, weight=1.0) for t in inherited] == list(one.parent.turns[: one.turn])
        assert (repaired.actor, repaired.weight) == (Actor.TEACHER, 1.0)
        assert repaired.action == one.teacher_action
        assert repaired.context_ids == one.parent.turns[one.turn].context_ids
        assert repaired.state_digest == one.parent.turns[one.turn].state_digest
        later = branch.turns[one.turn + 1 :]
        assert later and all((t.actor, t.weight) == (Actor.STUDENT, 1.0) for t in later)
        assert branch.n_action_tokens == sum(len(t.action_ids) for t in (repaired, *later))
        assert len(pack([branch]).rows) == 1  # one linear history


def test_the_earliest_doubted_action_is_the_one_repaired(failed, desk_chat):
    """At turn 1 the careless student acted as the expert does, so the teacher repeats it: no repair."""
    teacher = Scripted(lambda history: LOOK_UP, Actor.TEACHER, desk_chat)
    repairs = repair(failed, careless(desk_chat), teacher, desk_chat, turns=[1] * 6)
    assert repairs and {one.turn for one in repairs} == {1}
    assert repair(failed, careless(desk_chat), perfect(desk_chat), desk_chat, turns=[1] * 6) == []


def test_solved_or_broken_episodes_and_approved_actions_are_left_alone(failed, desk_chat):
    student, teacher = careless(desk_chat), perfect(desk_chat)
    assert repair(failed, student, teacher, desk_chat, turns=[99] * 6) == []
    for outcome in (Outcome.SUCCESS, Outcome.ERROR):
        fine = [dataclasses.replace(t, outcome=outcome) for t in failed]
        assert repair(fine, student, teacher, desk_chat) == []
    unfinished = [dataclasses.replace(t, outcome=Outcome.UNFINISHED) for t in failed]
    assert repair(unfinished, student, teacher, desk_chat)


def test_a_teacher_that_repeats_the_students_action_is_refused(failed, desk_chat):
    assert repair(failed, careless(desk_chat), hopeless(desk_chat), desk_chat) == []

    class Rambling:
        """Does not come to an end."""

        def act(self, histories):
            return [Action(Actor.TEACHER, StopReason.LENGTH, (20, 21), (0.0, 0.0)) for _ in histories]

    assert repair(failed, careless(desk_chat), Rambling(), desk_chat) == []


def test_a_repair_that_does_not_help_is_rejected(failed, desk_chat):
    teacher = Scripted(lambda history: LOOK_UP, Actor.TEACHER, desk_chat)
    repairs = repair(failed, hopeless(desk_chat), teacher, desk_chat)
    assert len(repairs) == 4
    for one in repairs:
        assert (one.accepted, one.branch, one.success_repair) == (False, None, 0.0)


def test_a_failure_that_fresh_noise_alone_mends_is_rejected(failed, desk_chat):
    """The student's own action does as well when it is tried again: the failed episode is no evidence."""
    early = [t for t in failed if len(t.turns) > 2]
    teacher = Scripted(lambda history: LOOK_UP, Actor.TEACHER, desk_chat)
    reformed = Scripted(expert, chat=desk_chat)
    repairs = repair(early, reformed, teacher, desk_chat, turns=[1] * len(early))
    assert repairs and all(
        (r.success_student, r.success_repair, r.accepted) == (1.0, 1.0, False) for r in repairs
    )


def test_generated_tokens_are_counted_and_kept_within_the_budget(failed, desk_chat):
    student, teacher = careless(desk_chat), perfect(desk_chat)
    everything = repair(
        failed, student, teacher, desk_chat, settings=Correction(trials=3, episodes_per_step=99)
    )
    assert len(everything) == 6
    for one in everything:  # both arms of three trials; the branch is one of three equal ones
        rest = sum(len(t.action_ids) for t in one.branch.turns[one.turn + 1 :])
        teachers = len(one.branch.turns[one.turn].action_ids)
        assert one.tokens >= teachers + rest
    assert repair(failed, student, teacher, desk_chat, budget=0) == []
    last = {t.uid: 2 * 3 * len(t.turns[-1].action_ids) for t in failed}  # both arms as long as the rest
    budget = sum(sorted(last.values())[:3])
    some = repair(failed, student, teacher, desk_chat, budget=budget)
    assert 0 < len(some) <= 3
    assert sum(last[one.parent.uid] for one in some) <= budget


def test_trials_have_noise_of_their_own_and_the_same_stream_repeats_them(failed, desk_chat):
    def coin(history):
        """Gives up now and then."""
        return CLOSE if history.random().random() < 0.2 else expert(history)

    def run(stream):
        settings, student = Correction(trials=6, min_gain=0.01), Scripted(coin, chat=desk_chat)
        return repair(failed, student, perfect(desk_chat), desk_chat, settings=settings, stream=stream)

    repairs = run((1, 2))
    assert run((1, 2)) == repairs and run((1, 3)) != repairs
    assert any(0 < one.success_repair < 1 for one in repairs)


def test_an_environment_that_fails_takes_no_other_correction_with_it(failed, desk_chat, monkeypatch):
    student, teacher = careless(desk_chat), perfect(desk_chat)
    whole = repair(failed, student, teacher, desk_chat)
    broken, replayed = whole[0].parent.task, OrderDesk.replay

    def failing(env, actions, digests):
        if env.task == broken:
            raise ConnectionError("the server is gone")
        replayed(env, actions, digests)

    monkeypatch.setattr(OrderDesk, "replay", failing)
    with pytest.warns(UserWarning, match="not gone back to, its environment failed: ConnectionError"):
        rest = repair(failed, student, teacher, desk_chat)
    assert {one.parent.uid for one in rest} == {one.parent.uid for one in whole[1:]}


def test_an_environment_that_fails_in_a_trial_is_no_evidence(failed, desk_chat, monkeypatch):
    """Else a teacher's action that changes nothing would look better than the student's."""
    student = careless(desk_chat)
    whole = repair(failed, student, perfect(desk_chat), desk_chat)
    step, fails = OrderDesk.step, [CLOSE]

    def failing(env, action):
        if action in fails:
            raise ConnectionError("the server is gone")
        return step(env, action)

    monkeypatch.setattr(OrderDesk, "step", failing)
    assert all(one.accepted for one in whole)
    assert not any(one.accepted for one in repair(failed, student, perfect(desk_chat), desk_chat))


def test_every_environment_is_closed(failed, desk_chat, monkeypatch):
    made, closed = [], []
    init, close = OrderDesk.__init__, OrderDesk.close
    monkeypatch.setattr(
        OrderDesk, "__init__", lambda env, **options: (made.append(env), init(env, **options))[1]
    )
    monkeypatch.setattr(OrderDesk, "close", lambda env: (closed.append(env), close(env))[1])
    assert repair(failed, careless(desk_chat), perfect(desk_chat), desk_chat)
    assert repair(failed, careless(desk_chat), hopeless(desk_chat), desk_chat) == []
    assert len(made) > 20
    assert sorted(map(id, made)) == sorted(map(id, closed))
