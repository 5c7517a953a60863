import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from typing import ClassVar

import pytest
from rolling import DESK, LIMITS, Scripted, desk_episodes, rolled, sampler
from toy_envs import Counter

from opd_agents import envs
from opd_agents.batch import pack
from opd_agents.episode import Episode, Limits, Start
from opd_agents.errors import AlignmentError
from opd_agents.policies import Action, ExpertPolicy, MixturePolicy, RandomPolicy
from opd_agents.rollout import rollout
from opd_agents.types import Actor, Branch, Message, Outcome, SpanKind, StopReason, Task

ADD = '{"name":"add","arguments":{"number":1}}'
STOP = '{"name":"stop","arguments":{}}'
ROLL = '{"name":"roll","arguments":{}}'


class Watched(Counter):
    """A counter that fails where it is told to, and notes what is closed, and in which thread."""

    made: ClassVar[list["Watched"]] = []
    stuck: ClassVar[threading.Event] = threading.Event()

    def __init__(self, fails: str = "", offset: int = 3) -> None:
        super().__init__(offset)
        self.fails, self.closed, self.threads = fails, 0, set()
        Watched.made.append(self)
        self._fail("make")

    def _fail(self, where: str) -> None:
        self.threads.add(threading.get_ident())
        if self.fails == where:
            raise RuntimeError(f"broken in {where}")
        if self.fails == f"hang in {where}":
            self.stuck.wait(20)

    def begin(self, task: Task) -> str:
        self._fail("reset")
        return super().begin(task)

    def step(self, action):
        self._fail("step")
        if self.fails == "own timeout":
            raise TimeoutError("the server was slow")
        return super().step(action)

    def state_digest(self) -> str:
        self._fail("last digest" if self.over else "digest")
        return super().state_digest()

    def close(self) -> None:
        self._fail("close")
        self.closed += 1


@pytest.fixture(autouse=True)
def fresh():
    Watched.made, Watched.stuck = [], threading.Event()
    yield
    Watched.stuck.set()


def counter(uid, task="0", **kwargs):
    """Reach 3 from 0 (task "0"); max_turns is 6."""
    return Episode(
        uid=uid, env_id="counter", seed=0, task=Task(task, "train"), stream=(0, 0, 0), env_kwargs=kwargs
    )


def by_turn(*actions):
    """Action k in turn k: the opening is two messages, each turn adds one."""
    return Scripted(lambda history: actions[len(history.turns)], Actor.EXPERT)


def count(episodes, policy, chat=None, limits=LIMITS, **options):
    def make(id, **kwargs):
        return Watched(**kwargs)

    return rollout(episodes, policy, make=make, chat=chat, limits=limits, temperature=1.0, **options)


SOLVE = by_turn(ADD, ADD, ADD, STOP)
TIMED = dataclasses.replace(LIMITS, step_timeout=0.3)


@pytest.mark.parametrize("limits", [LIMITS, TIMED], ids=["direct", "timed"])
@pytest.mark.parametrize("where", ["make", "reset", "step", "digest", "last digest", "close"])
def test_a_failing_environment_ends_its_own_episode_alone(where, limits):
    finished = []
    trajectories = count(
        [counter("a"), counter("b", fails=where), counter("c")],
        SOLVE,
        limits=limits,
        on_finished=finished.append,
    )
    assert [t.uid for t in trajectories] == ["a", "b", "c"]
    assert sorted(t.uid for t in finished) == ["a", "b", "c"]
    a, b, c = trajectories
    assert (a.outcome, c.outcome, a.error, c.error) == (Outcome.SUCCESS, Outcome.SUCCESS, None, None)
    assert b.outcome is Outcome.ERROR and b.error == f"RuntimeError: broken in {where}"
    assert len(b.turns) == (4 if where in ("last digest", "close") else 0)
    assert a.final_digest and a.final_digest == c.final_digest
    waited_for = [env for env in Watched.made if env.fails not in ("make", "close")]
    give_up = time.monotonic() + 5
    while not all(env.closed for env in waited_for) and time.monotonic() < give_up:
        time.sleep(0.01)  # a failed environment is closed in its own thread, and not waited for
    assert [env.closed for env in waited_for] == [1] * len(waited_for)


@pytest.mark.parametrize("where", ["make", "reset", "step", "digest", "last digest", "close"])
def test_a_hanging_environment_times_out_and_the_others_finish(where):
    started = time.monotonic()
    episodes = [counter("a"), counter("b", fails=f"hang in {where}"), counter("c")]
    a, b, c = count(episodes, SOLVE, limits=TIMED)
    assert time.monotonic() - started < 5
    assert (a.outcome, b.outcome, c.outcome) == (Outcome.SUCCESS, Outcome.ERROR, Outcome.SUCCESS)
    assert b.error == "TimeoutError: no answer within 0.3 s"
    assert Watched.made[0].closed == 1
    assert all(len(env.threads) == 1 for env in Watched.made)  # each environment in one thread only
    if where in ("reset", "step", "digest", "last digest"):
        hung = next(env for env in Watched.made if env.fails)
        assert hung.closed == 0
        Watched.stuck.set()
        while not hung.closed and time.monotonic() < started + 10:
            time.sleep(0.01)
        assert hung.closed == 1


def test_a_hanging_environment_is_waited_for_once():
    started = time.monotonic()
    count([counter("a", fails="hang in step")], SOLVE, limits=dataclasses.replace(LIMITS, step_timeout=1.0))
    assert 1.0 <= time.monotonic() - started < 1.9  # closing it is not waited for


def test_a_time_out_of_the_environment_itself_is_told_as_it_is():
    for limits in (LIMITS, TIMED):
        (one,) = count([counter("a", fails="own timeout")], SOLVE, limits=limits)
        assert one.error == "TimeoutError: the server was slow"


def test_the_program_ends_although_an_environment_hangs_for_ever():
    code = """
import time
from rolling import Scripted
from toy_envs import Counter
from opd_agents.episode import Episode, Limits
from opd_agents.rollout import rollout
from opd_agents.types import Task

class Stuck(Counter):
    def step(self, action):
        time.sleep(3600)

episode = Episode(uid="a", env_id="x", seed=0, task=Task("0", "train"), stream=(0, 0, 0))
print(rollout([episode], Scripted(lambda history: "hi"), make=lambda id: Stuck(), chat=None,
              limits=Limits(step_timeout=0.1), temperature=1.0)[0].error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert "no answer within 0.1 s" in done.stdout


def test_an_episode_without_turns_is_packed_as_nothing(desk_chat):
    trajectories = count([counter("a", fails="reset"), counter("b")], SOLVE, chat=desk_chat)
    packed = pack(trajectories)
    assert len(packed.rows) == 1 and set(packed.episode.tolist()) == {1}


def test_misaligned_tokens_are_never_made_an_episodes_failure():
    def choose(history):
        raise AlignmentError("histories differ")

    with pytest.raises(AlignmentError):
        count([counter("a")], Scripted(choose))

    class Misaligned(Watched):
        def step(self, action):
            raise AlignmentError("tokens differ")

    with pytest.raises(AlignmentError):
        rollout(
            [counter("a")], SOLVE, make=lambda id: Misaligned(), chat=None, limits=LIMITS, temperature=1.0
        )


def test_max_turns_leaves_the_episode_unfinished():
    limits = dataclasses.replace(LIMITS, max_turns=2)
    (one,) = count([counter("a")], SOLVE, limits=limits)
    assert (len(one.turns), one.outcome, one.reward) == (2, Outcome.UNFINISHED, 0.0)
    assert one.final_digest == Watched.made[0].state_digest() and Watched.made[0].closed == 1


def test_how_an_episode_ended_is_recorded():
    (solved,) = count([counter("a")], SOLVE)
    (failed,) = count([counter("a")], by_turn(ADD, STOP))
    (cut,) = count([counter("a")], by_turn(*[ADD] * 6))
    assert (solved.outcome, solved.reward, solved.turns[-1].terminated) == (Outcome.SUCCESS, 1.0, True)
    assert (failed.outcome, failed.reward, len(failed.turns)) == (Outcome.FAILURE, 0.0, 2)
    assert (cut.outcome, cut.turns[-1].terminated, cut.turns[-1].truncated) == (
        Outcome.UNFINISHED,
        False,
        True,
    )
    assert solved.messages == (Message("system", "Reach the target."), Message("user", "Reach 3."))
    digests = [t.state_digest for t in solved.turns]
    assert len(set(digests)) == 4 and solved.final_digest == digests[-1]  # stop changes no state


def test_budgets_reach_the_policy(desk_chat):
    seen = []

    def choose(history):
        seen.append((history.max_tokens, len(history.ids)))
        return ADD

    limits = dataclasses.replace(LIMITS, max_tokens_per_turn=50, max_context_tokens=120)
    count([counter("a")], Scripted(choose, chat=desk_chat), chat=desk_chat, limits=limits)
    assert len(seen) > 1
    assert all(most == min(50, 120 - length) for most, length in seen)
    assert seen[0][0] == 50 and seen[-1][0] < 50


BAD = '<tool_call>{"name":"add","arguments":{"number":1}</tool_call>'


def test_errors_of_calls_and_of_parsing_are_recorded_and_cost_a_turn(desk_chat):
    actions = [
        '{"name":"add","arguments":{"number":-1}}',
        '{"name":"ad","arguments":{}}',
        BAD,
        '{"name":',
        ADD,
    ]
    for chat in (None, desk_chat):
        (one,) = count([counter("a")], Scripted(lambda h: actions[len(h.turns)], chat=chat), chat=chat,
                       limits=dataclasses.replace(LIMITS, max_turns=5))  # fmt: skip
        assert one.outcome is Outcome.UNFINISHED and len(one.turns) == 5
        negative, unknown, malformed, broken, fine = one.turns
        assert negative.tool_error == "number must not be negative" and "negative" in negative.observation
        assert "did you mean 'add'" in unknown.tool_error and negative.parse_error is None
        assert "malformed tool call" in malformed.observation and malformed.calls == ()
        assert malformed.parse_error and broken.parse_error
        assert "invalid JSON" in broken.observation or "Bad tool call" in broken.parse_error
        assert (fine.tool_error, fine.parse_error) == (None, None) and json.loads(fine.observation) == {
            "value": 1
        }
        assert [c.name for c in fine.calls] == ["add"]


def test_a_malformed_call_is_answered_and_the_policy_goes_on(desk_chat):
    actions = [BAD, ADD, ADD, ADD, STOP]
    (one,) = count([counter("a")], Scripted(lambda h: actions[len(h.turns)], chat=desk_chat), chat=desk_chat)
    assert one.success and len(one.turns) == 5
    answer = desk_chat.tokenizer.decode(list(one.turns[1].context_ids))
    assert "malformed tool call" in answer
    assert one.turns[0].state_digest == one.turns[1].state_digest


class Cut:
    """Writes half a call and is cut off by the token limit; then ends properly."""

    def __init__(self, chat):
        self.chat = chat

    def act(self, histories):
        full = self.chat.encode_action(ADD)
        return [
            Action(Actor.STUDENT, StopReason.LENGTH, full[:-2], (-0.5,) * (len(full) - 2))
            if not h.turns
            else Action(Actor.STUDENT, StopReason.END, full, (-0.5,) * len(full))
            for h in histories
        ]


def test_a_truncated_action_gets_its_end_token_as_context(desk_chat):
    limits = dataclasses.replace(LIMITS, max_turns=2)
    (one,) = count([counter("a")], Cut(desk_chat), chat=desk_chat, limits=limits)
    cut, whole = one.turns
    (end,) = desk_chat.end_ids
    assert end not in cut.action_ids and whole.context_ids[0] == end
    assert cut.parse_error and cut.calls == () and json.loads(whole.observation) == {"value": 1}
    assert whole.action_ids[-1] == end and whole.spans[-1].kind is SpanKind.SPECIAL
    again = count([counter("a")], Scripted(lambda h: ADD, chat=desk_chat), chat=desk_chat, limits=limits)[0]
    assert again.turns[1].context_ids[0] != end  # it was an action token there


@pytest.mark.parametrize("shown", [{}, {"include_tools": False}], ids=["tools", "no tools"])
def test_the_growing_history_is_the_templates_full_render(desk_chat, shown):
    from opd_agents.chat import Chat

    chat = Chat(desk_chat.tokenizer, kwargs=shown)
    limits = dataclasses.replace(LIMITS, max_context_tokens=4000)
    trajectories = rolled(desk_episodes(4, timeout_rate=0.3), ExpertPolicy(), chat, limits=limits)
    packed = pack(trajectories)
    assert any(turn.tool_error == "timeout" for t in trajectories for turn in t.turns)
    for number, one in enumerate(trajectories):
        env = envs.make(DESK, level="easy")
        tools = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
            }
            for t in env.tools
        ]
        messages = [{"role": m.role, "content": m.content} for m in one.messages]
        for turn in one.turns:
            messages.append({"role": "assistant", "content": f"<tool_call>{turn.action}</tool_call>"})
            messages.append({"role": "tool", "content": turn.observation})
        text = chat.tokenizer.apply_chat_template(messages[:-1], tools=tools, tokenize=False, **shown)
        assert packed.rows[number].tolist() == chat.tokenizer.encode(text, add_special_tokens=False)
        assert (one.outcome, len(packed.rows)) == (Outcome.SUCCESS, 4)


def test_the_expert_solves_and_chance_does_not():
    experts = rolled(desk_episodes(8), ExpertPolicy())
    assert all(t.success for t in experts)
    chance = rolled(desk_episodes(8), RandomPolicy())
    assert all(t.error is None for t in chance) and sum(t.success for t in chance) <= 1
    turns = [turn for t in chance for turn in t.turns]
    assert all(turn.parse_error is None and turn.actor is Actor.RANDOM for turn in turns)
    assert len({turn.calls[0].name for turn in turns}) > 4
    assert rolled(desk_episodes(8), RandomPolicy()) == chance


def test_a_mixture_of_student_and_expert_is_recorded_by_actor(student, desk_chat):
    def play():
        policy = MixturePolicy(
            {"student": (sampler(student, desk_chat), 1.0), "expert": (ExpertPolicy(), 1.0)}
        )
        return rolled(desk_episodes(12, max_turns=6), policy, desk_chat)

    trajectories = play()
    turns = [turn for t in trajectories for turn in t.turns]
    share = sum(turn.actor is Actor.EXPERT for turn in turns) / len(turns)
    assert 0.3 < share < 0.7
    for turn in turns:
        assert (turn.logprobs is None) == (turn.actor is Actor.EXPERT)
        assert (turn.stop_reason is StopReason.NOT_SAMPLED) == (turn.actor is Actor.EXPERT)
    assert any(len({turn.actor for turn in t.turns}) == 2 for t in trajectories)
    assert play() == trajectories


# ---- a budget of action tokens ----


def action_tokens(one):
    return sum(len(t.action_ids) for t in one.turns)


@pytest.mark.parametrize("most", [1, 5, 8, 13])
def test_the_action_tokens_of_an_episode_never_exceed_their_budget(student, desk_chat, most):
    limits = dataclasses.replace(LIMITS, max_action_tokens=most)
    bound = rolled(desk_episodes(6), sampler(student, desk_chat), desk_chat, limits=limits)
    free = rolled(desk_episodes(6), sampler(student, desk_chat), desk_chat)
    for one, other in zip(bound, free, strict=True):
        assert action_tokens(one) == min(most, action_tokens(other))
        assert (one.outcome, one.exhausted) == (Outcome.UNFINISHED, "actions")
        whole, last = one.turns[:-1], one.turns[-1]
        assert whole == other.turns[: len(whole)]  # what was written before is as it would have been
        assert last.action_ids == other.turns[len(whole)].action_ids[: len(last.action_ids)]
        assert last.stop_reason in (StopReason.ACTIONS, StopReason.END)


def test_an_action_that_comes_whole_is_not_cut_and_is_the_last(desk_chat):
    limits = dataclasses.replace(LIMITS, max_action_tokens=3)
    (one,) = rolled(desk_episodes(1), ExpertPolicy(), desk_chat, limits=limits)
    assert len(one.turns) == 1 and action_tokens(one) > 3
    assert (one.outcome, one.exhausted) == (Outcome.UNFINISHED, "actions")
    (whole,) = rolled(desk_episodes(1), ExpertPolicy(), desk_chat)
    assert whole.success and len(whole.turns) > 1 and whole.turns[0] == one.turns[0]


class Talk(Counter):
    """Ends with the first text, a success if that is long enough."""

    text_only = True

    def on_text(self, text):
        self.value = self.target if len(text) > 8 else 0
        self.finish()
        return ""


@pytest.mark.parametrize(
    ("most", "outcome", "exhausted"),
    [
        (4, Outcome.UNFINISHED, "actions"),  # a failure of the piece, not of the action
        (9, Outcome.SUCCESS, None),  # a piece that does it
        (20, Outcome.SUCCESS, None),
    ],
)
def test_what_the_environment_says_of_a_piece(most, outcome, exhausted, monkeypatch):
    from thinking import byte_tokenizer, chat_of

    chat = chat_of("qwen2_5")
    ids = tuple(byte_tokenizer().encode("a long word<|im_end|>"))

    class Cut:
        def act(self, histories):
            kept = ids[: min(one.max_tokens for one in histories)]
            reason = StopReason.END if kept == ids else StopReason.LENGTH
            return [Action(Actor.STUDENT, reason, kept, (-1.0,) * len(kept))]

    limits = dataclasses.replace(
        LIMITS, max_tokens_per_turn=64, max_context_tokens=4000, max_action_tokens=most
    )
    (one,) = rolled([counter("a")], Cut(), chat, limits=limits, make=lambda id, **options: Talk())
    assert (one.outcome, one.exhausted) == (outcome, exhausted)
    assert one.turns[0].stop_reason is (StopReason.END if most == 20 else StopReason.ACTIONS)


class Waiting(Counter):
    """A counter in a thread of its own, at most ``most`` of them at once; it notes how many live and step."""

    runs_in: ClassVar = "thread"
    live: ClassVar[set] = set()
    peak: ClassVar[int] = 0
    meeting: ClassVar[threading.Barrier | None] = None

    def begin(self, task: Task) -> str:
        Waiting.live.add(self)
        Waiting.peak = max(Waiting.peak, len(Waiting.live))
        return super().begin(task)

    def step(self, action):
        if self.meeting is not None:
            self.meeting.wait(10)  # raises unless all are in step() at the same time
        return super().step(action)

    def close(self) -> None:
        Waiting.live.discard(self)


class FewAtOnce(Waiting):
    max_live: ClassVar = 2


@pytest.fixture
def fresh_waiting():
    Waiting.live, Waiting.peak, Waiting.meeting = set(), 0, None


@pytest.mark.usefixtures("fresh_waiting")
def test_environments_in_threads_step_side_by_side():
    Waiting.meeting = threading.Barrier(5)
    episodes = [counter(str(i)) for i in range(5)]
    played = rollout(episodes, SOLVE, make=lambda id: Waiting(), chat=None, limits=LIMITS, temperature=1.0)
    assert all(t.success for t in played) and Waiting.peak == 5


@pytest.mark.usefixtures("fresh_waiting")
@pytest.mark.parametrize(
    ("cls", "limits", "most"),
    [
        (FewAtOnce, LIMITS, 2),
        (Waiting, Limits(max_live=3), 3),
        (Waiting, Limits(concurrency=4), 4),
        (FewAtOnce, Limits(concurrency=4), 2),
    ],
)
def test_no_more_environments_live_than_may(cls, limits, most):
    uids = [str(i) for i in range(7)]
    ended = []
    played = rollout(
        [counter(uid, task="0" if int(uid) % 2 else "1") for uid in uids],
        Scripted(lambda h: ADD if len(h.turns) < 3 + (int(h.uid) + 1) % 2 else STOP),
        make=lambda id: cls(), chat=None, limits=limits, temperature=1.0,
        on_finished=lambda t: ended.append(t.uid),
    )  # fmt: skip
    assert [t.uid for t in played] == uids and all(t.success for t in played)
    assert Waiting.peak == most and not Waiting.live and sorted(ended) == uids


@pytest.mark.parametrize("limits", [Limits(max_live=4), Limits(max_live=4, step_timeout=60.0)])
def test_many_episodes_wait_without_an_environment_or_a_thread(limits):
    """How many live at once changes nothing of what they do."""
    threads, made = [], []

    def make(id):
        made.append(id)
        return Counter()

    def wander(history):
        threads.append(threading.active_count())
        return ROLL if history.random().random() < 0.6 else STOP

    n = 400 if limits.step_timeout is None else 100
    episodes = [
        Episode(uid=str(i), env_id="counter", seed=i, task=Task(str(i % 40), "train"), stream=(0, 0, i))
        for i in range(n)
    ]
    before = threading.active_count()
    play = partial(rollout, policy=Scripted(wander), make=make, chat=None, temperature=1.0)
    few = play(episodes, limits=limits)
    assert max(threads) <= before + 8 and len(made) == n
    assert few == play(episodes, limits=Limits())


@pytest.mark.parametrize("limits", [LIMITS, TIMED], ids=["direct", "timed"])
def test_what_ends_a_rollout_leaves_no_environment(limits):
    def act(history):
        if len(history.turns) > 1:
            raise KeyboardInterrupt
        return ADD

    with pytest.raises(KeyboardInterrupt):
        count([counter(str(i)) for i in range(3)], Scripted(act), limits=limits)
    give_up = time.monotonic() + 5
    while not all(env.closed for env in Watched.made) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert [env.closed for env in Watched.made] == [1, 1, 1]


def test_an_environment_that_exits_does_not_end_the_program():
    class Exiting(Counter):
        def step(self, action):
            sys.exit(3)

    for limits in (LIMITS, TIMED):
        (one,) = rollout(
            [counter("a")], SOLVE, make=lambda id: Exiting(), chat=None, limits=limits, temperature=1.0
        )
        assert one.error == "SystemExit: 3"


def test_an_environment_that_is_made_too_late_is_closed():
    count([counter("a", fails="hang in make")], SOLVE, limits=TIMED)
    (late,) = Watched.made
    Watched.stuck.set()
    give_up = time.monotonic() + 5
    while not late.closed and time.monotonic() < give_up:
        time.sleep(0.01)
    assert late.closed == 1


def test_what_an_episode_takes_in_all_is_bounded():
    class Slow(Counter):
        def step(self, action):
            time.sleep(0.15)
            return super().step(action)

    def play(uid, cls, **limits):
        return rollout(
            [counter(uid)], SOLVE, make=lambda id: cls(), chat=None, limits=Limits(**limits), temperature=1.0
        )[0]

    slow = play("a", Slow, episode_timeout=0.4)
    assert slow.outcome is Outcome.ERROR and len(slow.turns) == 2
    assert slow.error == "TimeoutError: the environment took more than 0.4 s in this episode"
    assert play("b", Slow, episode_timeout=5.0, step_timeout=1.0).success
    assert play("c", Slow, step_timeout=0.4).success


def test_a_policy_without_an_action_ends_that_episode():
    class Broken:
        def act(self, histories):
            failure = "the server is gone"
            return [
                Action(Actor.TEACHER, StopReason.END, failure=failure) if h.uid == "a" else one
                for h, one in zip(histories, SOLVE.act(histories), strict=True)
            ]

    a, b = count([counter("a"), counter("b")], Broken())
    assert a.error == "OpdError: the server is gone" and a.outcome is Outcome.ERROR and not a.turns
    assert b.success


def test_a_branch_begins_within_the_time_outs():
    first = Watched()
    first.reset(seed=0, options={"task_id": "0", "split": "train"})
    action = Action(Actor.EXPERT, StopReason.END, text=ADD)
    start = Start(first.snapshot(), Branch("a", 0), (), (), (), True, action)
    rest = Scripted(lambda history: ADD if len(history.turns) < 3 else STOP)

    class Stuck(Watched):
        def restore(self, saved, reseed=None):
            self.stuck.wait(20)

    for cls, outcome in ((Watched, Outcome.SUCCESS), (Stuck, Outcome.ERROR)):
        (one,) = rollout(
            [dataclasses.replace(counter("b"), start=start)], rest,
            make=lambda id, cls=cls: cls(), chat=None, limits=TIMED, temperature=1.0,
        )  # fmt: skip
        assert one.outcome is outcome
