import dataclasses
import functools
import json

import pytest
import torch
from rolling import LIMITS, Scripted, desk_episodes, rolled

from opd_agents import envs
from opd_agents.batch import pack
from opd_agents.config import Correction
from opd_agents.correction import correct, disagreed, divergent, dropped, improbable
from opd_agents.correction.evidence import Arm, Evidence
from opd_agents.correction.states import act_at, restore, saved_at
from opd_agents.envs.orderdesk import OrderDesk
from opd_agents.errors import ReplayDivergence
from opd_agents.policies import Action
from opd_agents.rollout import rollout
from opd_agents.types import Actor, Branch, Outcome, StopReason

OWN = {"rollouts": [3], "rivals": ["own"], "accept": 0.85}  # a gain of two of three
SETTINGS = Correction(verify=OWN, audit=None, episodes_per_step=4)
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
    errors = improbable(trajectories, packed, teacher_logprob, settings.propose.below)
    return correct(
        errors, settings, stream=stream, token_budget=budget, student=student,
        proposes=teacher, resumes=student, make=envs.make, chat=chat, limits=LIMIT, temperature=1.0,
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
        assert (one.accepted, one.evidence) == (True, Evidence(Arm(3, 3), {"own": Arm(0, 3)}))
        assert one.teacher_action == restore(one.parent, one.turn, envs.make).expert_action()
        branch = one.branch
        assert branch.branch == Branch(one.parent.uid, one.turn, noise=((0, one.parent.seed),))
        assert branch.success and branch.group == ""
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
        assert (one.accepted, one.branch, one.evidence.repair) == (False, None, Arm(0, 3))


def test_a_failure_that_fresh_noise_alone_mends_is_rejected(failed, desk_chat):
    """The student's own action does as well when it is tried again: the failed episode is no evidence."""
    early = [t for t in failed if len(t.turns) > 2]
    teacher = Scripted(lambda history: LOOK_UP, Actor.TEACHER, desk_chat)
    reformed = Scripted(expert, chat=desk_chat)
    repairs = repair(early, reformed, teacher, desk_chat, turns=[1] * len(early))
    even = Evidence(Arm(3, 3), {"own": Arm(3, 3)})
    assert repairs and all((r.evidence, r.accepted) == (even, False) for r in repairs)


def test_generated_tokens_are_counted_and_kept_within_the_budget(failed, desk_chat):
    student, teacher = careless(desk_chat), perfect(desk_chat)
    everything = repair(
        failed,
        student,
        teacher,
        desk_chat,
        settings=SETTINGS.model_copy(update={"episodes_per_step": 99}),
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
        settings, student = (
            Correction(verify=OWN | {"rollouts": [6]}, audit=None),
            Scripted(coin, chat=desk_chat),
        )
        return repair(failed, student, perfect(desk_chat), desk_chat, settings=settings, stream=stream)

    repairs = run((1, 2))
    assert run((1, 2)) == repairs and run((1, 3)) != repairs
    assert any(0 < one.evidence.repair.wins < 6 for one in repairs)


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


def test_looks_go_on_until_the_evidence_decides(failed, desk_chat):
    """A repair that always helps is decided at once; one that helps as much as chance is looked at again."""

    def coin(history):
        return CLOSE if history.random().random() < 0.15 else expert(history)

    looks = Correction(verify={"rollouts": [4, 8, 16], "rivals": ["own"]}, audit=None)
    for one in repair(failed, careless(desk_chat), perfect(desk_chat), desk_chat, settings=looks):
        helped = one.evidence.repair.wins == 4
        assert not helped or (one.accepted and one.evidence == Evidence(Arm(4, 4), {"own": Arm(0, 4)}))
    early = [1] * len(failed)
    teacher = Scripted(lambda history: LOOK_UP, Actor.TEACHER, desk_chat)
    played = [
        one.evidence.repair.played
        for one in repair(
            failed, Scripted(coin, chat=desk_chat), teacher, desk_chat, turns=early, settings=looks
        )
    ]
    assert set(played) <= {4, 8, 16} and max(played) > 4


def test_a_student_that_would_mend_itself_is_not_corrected(failed, desk_chat):
    """After its own action it fails, but trying again in that state it does as well as the teacher."""
    reformed = Scripted(expert, chat=desk_chat)
    both = Correction(verify={"rollouts": [4]}, audit=None)
    own = repair(failed, reformed, perfect(desk_chat), desk_chat)
    assert own and all(one.accepted for one in own)
    for one in repair(failed, reformed, perfect(desk_chat), desk_chat, settings=both):
        assert one.evidence == Evidence(Arm(4, 4), {"own": Arm(0, 4), "retry": Arm(4, 4)})
        assert not one.accepted and one.evidence.gain == 0.0
        again = sum(len(t.action_ids) for t in one.parent.turns[one.turn :])
        assert one.tokens > 4 * again  # a retry's first action is new


def test_an_audit_plays_anew_whatever_the_verdict_was(failed, desk_chat):
    audit = Correction(verify=OWN, audit={"share": 1.0, "rollouts": 5})
    plain = repair(failed, careless(desk_chat), perfect(desk_chat), desk_chat)
    audited = repair(
        failed, careless(desk_chat), perfect(desk_chat), desk_chat,
        settings=audit.model_copy(update={"episodes_per_step": 4}),
    )  # fmt: skip
    for one, other in zip(plain, audited, strict=True):
        assert other.audit == Evidence(Arm(5, 5), {"own": Arm(0, 5)}) and one.audit is None
        same = dataclasses.replace(other, audit=None, tokens=one.tokens)
        assert same == one and other.tokens > one.tokens  # the audit decides nothing
    some = Correction(verify=OWN, audit={"share": 0.5, "rollouts": 1}, episodes_per_step=6)
    drawn = [
        one.audit is not None
        for step in range(4)
        for one in repair(
            failed, careless(desk_chat), hopeless_look(desk_chat), desk_chat, settings=some, stream=(1, step)
        )
    ]
    assert 0 < sum(drawn) < len(drawn)


def hopeless_look(chat):
    return Scripted(lambda history: LOOK_UP, Actor.TEACHER, chat)


def test_random_actions_are_verified_as_a_control_and_never_trained_on(failed, desk_chat):
    settings = Correction(verify=OWN, audit=None, random=0.7, episodes_per_step=6)
    found = [
        one
        for step in range(4)
        for one in repair(
            failed, careless(desk_chat), perfect(desk_chat), desk_chat, settings=settings, stream=(1, step)
        )
    ]
    controls = [one for one in found if one.control]
    assert 0 < len(controls) < len(found)
    assert all(one.branch is None for one in controls)
    assert sum(one.accepted for one in controls) < len(controls) / 4
    assert {one.turn for one in controls} - {len(one.parent.turns) - 1 for one in controls}
    assert all(one.accepted for one in found if not one.control)


def test_a_repair_that_leads_to_the_same_state_and_answer_is_refused(failed, desk_chat):
    """Written otherwise, and yet the same call."""
    spaced = Scripted(lambda history: CLOSE.replace(":", ": "), Actor.TEACHER, desk_chat)
    assert repair(failed, careless(desk_chat), spaced, desk_chat) == []


def last_turns(failed):
    return [(one, len(one.turns) - 1) for one in failed]


def test_the_first_turn_on_which_student_and_teacher_differ_is_located(failed):
    """By the mean over a turn's tokens, of either sign."""
    packed = pack(failed)
    last = torch.tensor([t == len(failed[e].turns) - 1 for e, t in packed.turns])[packed.turn]
    for sign in (1, -1):
        assert divergent(failed, packed, torch.where(last, sign * 0.6, 0.1), 0.5) == last_turns(failed)
    assert divergent(failed, packed, torch.where(last, 0.4, 0.1), 0.5) == []


def numbered(failed):
    return dict(enumerate(failed))


def test_the_first_action_that_is_not_the_experts_is_located(failed, desk_chat):
    at = functools.partial(act_at, make=envs.make, chat=desk_chat, limits=LIMIT)
    first = functools.partial(disagreed, numbered(failed), samples=1, stream=(1, 2), act=at)
    assert first(perfect(desk_chat)) == {n: len(one.turns) - 1 for n, one in enumerate(failed)}
    assert first(careless(desk_chat)) == {}  # it does just what was done
    silent = Scripted(lambda history: LOOK_UP, Actor.TEACHER, desk_chat)
    assert set(first(silent).values()) == {0}


def test_one_of_several_samples_that_agrees_is_enough(failed, desk_chat):
    def now_and_then(history):
        return expert(history) if history.random().random() < 0.7 else LOOK_UP

    at = functools.partial(act_at, make=envs.make, chat=desk_chat, limits=LIMIT)
    teacher = Scripted(now_and_then, Actor.TEACHER, desk_chat)
    one, many = (
        disagreed(numbered(failed), teacher, samples=samples, stream=(1, 2), act=at) for samples in (1, 8)
    )
    assert many == {n: len(one.turns) - 1 for n, one in enumerate(failed)}
    assert sum(one.values()) < sum(many.values())
    alone = disagreed({3: failed[3]}, teacher, samples=1, stream=(1, 2), act=at)
    assert alone == {3: one[3]}  # whatever else is asked about, as on another rank


def test_the_action_with_which_success_falls_is_located(failed, desk_chat):
    save = functools.partial(saved_at, make=envs.make, limits=LIMIT)

    def located(student):
        play = functools.partial(
            rollout, policy=student, make=envs.make, chat=desk_chat, limits=LIMIT, temperature=1.0
        )
        return dropped(numbered(failed), rollouts=2, stream=(1, 2), save=save, play=play)

    turns, tokens = located(Scripted(expert, chat=desk_chat))
    assert turns == {n: len(one.turns) - 1 for n, one in enumerate(failed)} and tokens > 0
    assert located(careless(desk_chat))[0] == {}  # it does not succeed from the start either
