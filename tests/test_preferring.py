"""Two actions at one state: which one a judge prefers, how often another does what the student did, and what
a run learns from either. Whole runs ask an oracle, who plays every state on by the environment's expert."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from api_server import ApiServer, Expert, Oracle
from judging import Answers, Episode, episode_in
from rolling import DESK, LIMITS, Scripted, desk_episodes, rolled, trajectory, turn
from test_judge_runs import lines

from opd_agents import envs
from opd_agents.api import ApiClient, Reply
from opd_agents.chat import Chat
from opd_agents.config import Endpoint, RunConfig, load_config
from opd_agents.config.judge import Judge
from opd_agents.correction import act_otherwise
from opd_agents.envs.actions import same_action
from opd_agents.errors import ConfigError
from opd_agents.judging import Preferred, judge_corrections, judge_episodes, judge_preferences
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.base import Action, History
from opd_agents.recordings import tools_of
from opd_agents.trainer import train
from opd_agents.types import Actor, Branch, Outcome, StopReason, Trajectory, Verdict

OPTIONS = {"level": "easy", "timeout_rate": 0.0}
NOTHING = Judge(ask=[])


@pytest.fixture(scope="module")
def expert() -> Expert:
    return Expert(DESK, OPTIONS, tasks=40)


@pytest.fixture(scope="module")
def oracle(expert: Expert) -> Iterator[ApiServer]:
    with ApiServer(expert, Oracle(expert)) as server:
        yield server


WIDE = dataclasses.replace(LIMITS, max_tokens_per_turn=128, max_context_tokens=4096)


def expert_of(history: History) -> str:
    return history.env.expert_action()


def acted(choose: Callable[[History], str], chat: Chat, count: int) -> list[Trajectory]:
    """The student's episodes, whose actions ``choose`` takes."""
    return rolled(desk_episodes(count, timeout_rate=0.0), Scripted(choose, chat=chat), chat, limits=WIDE)


# ---- what is asked, and how answers are read ----


def parent() -> Trajectory:
    texts = ("look", "wait", "leave")
    return trajectory(
        [turn([1], [2], action=text, text=text, observation=f"saw {text}") for text in texts],
        uid="p", outcome=Outcome.SUCCESS,
    )  # fmt: skip


def other(place: int, action: str = "jump") -> Trajectory:
    """Another action at ``place`` of the parent."""
    one, branch = parent(), Branch("p", place, tried=False)
    instead = dataclasses.replace(one.turns[place], action=action, text=action, observation="")
    turns = (*one.turns[:place], instead)
    return dataclasses.replace(one, uid=f"p-other{place}", turns=turns, branch=branch)


def preferred(answers: Answers, *others: Trajectory, settings: Judge = NOTHING) -> Preferred:
    return judge_preferences(answers, settings, others, lambda one: parent(), lambda one: ())


def prefers(*ranking: str) -> Callable[[Episode], Any]:
    """A judge who knows which is better, the best first, wherever it stands."""

    def answer(asked: Episode) -> Any:
        first, second = (ranking.index(asked[place]) for place in ("first", "second"))
        return {"reason": "r", "better": "first" if first < second else "second"}

    return answer


def test_both_orders_are_asked_about_the_state_alone() -> None:
    answers = Answers(prefers("jump", "wait"))
    found = preferred(answers, other(1), settings=Judge(ask=[], rubric="Be brief.", sees_outcome=True))
    one, two = (episode_in(request.messages) for request in answers.asked)
    assert (one["first"], one["second"], two["first"], two["second"]) == ("wait", "jump", "jump", "wait")
    assert one["actions"] == two["actions"] == [{"number": 1, "action": "look", "answer": "saw look"}]
    assert "outcome" not in one and "saw wait" not in str(one)
    assert "Be brief." in answers.asked[0].messages[0]["content"]
    assert found.better == {"p-other1": True} and (found.judged, found.ties, found.failed) == (1, 0, 0)
    assert [(f.trajectory, f.turn, f.reason) for f in found.feedback] == [("p-other1", 1, "r")]


def test_the_students_own_action_may_be_the_better_one() -> None:
    found = preferred(Answers(prefers("wait", "jump", "leave")), other(1), other(2))
    assert found.better == {"p-other1": False, "p-other2": True}
    assert found.metrics()["alternatives/better"] == 0.5


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_judge_who_prefers_a_place_prefers_nothing(place: str) -> None:
    found = preferred(Answers(lambda asked: {"reason": "", "better": place}), other(0), other(2))
    assert found == Preferred({}, (), 2, ties=2) and found.metrics()["alternatives/better"] is None


def test_one_answer_that_could_not_be_had_decides_nothing() -> None:
    def answer(asked: Episode) -> Any:
        return Reply(failure="refusal") if asked["first"] == "jump" else prefers("jump", "wait")(asked)

    assert preferred(Answers(answer), other(1)) == Preferred({}, (), 1, failed=1)
    assert preferred(answers := Answers(answer)) == Preferred() and not answers.asked


# ---- several actions at a state ----


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ('{"name":"a","arguments":{"x":1,"y":2}}', '{"arguments": {"y": 2, "x": 1}, "name": "a"}', True),
        ('{"name":"a","arguments":{}}', '[{"name":"a"}]', True),
        ('{"name":"a","arguments":{"x":1}}', '{"name":"a","arguments":{"x":2}}', False),
        ("Yes.", " Yes.", True),
        ("Yes.", "No.", False),
        ("Yes.", '{"name":"a"}', False),
        ('{"name":', '{"name":', True),
        ('{"name":', '{"name": ', False),
    ],
)  # fmt: skip
def test_actions_are_equal_in_what_they_ask_for(one: str, two: str, same: bool) -> None:
    assert same_action(one, two) is same_action(two, one) is same


class Drawn:
    """Does by turns what is told; None: what the expert does, with its arguments in another order."""

    def __init__(self, *choices: str | None) -> None:
        self.choices, self.numbers = choices, list[int]()

    def act(self, histories: Sequence[History]) -> list[Action]:
        self.numbers += [history.stream[-1] for history in histories]
        told = [self.choices[place % len(self.choices)] for place in range(len(histories))]
        texts = [
            turned(expert_of(history)) if text is None else text
            for history, text in zip(histories, told, strict=True)
        ]
        return [Action(Actor.TEACHER, StopReason.NOT_SAMPLED, text=text) for text in texts]


def turned(action: str) -> str:
    value = json.loads(action)
    arguments = dict(reversed(value["arguments"].items()))
    return json.dumps({"arguments": arguments, "name": value["name"]})


def test_agreement_is_the_share_of_anothers_actions_that_are_the_students(desk_chat: Chat) -> None:
    played = acted(expert_of, desk_chat, 2)
    policy = Drawn(None, "No.", "Yes.", "No.", None)
    made: list[envs.AgentEnv] = []

    def make(env_id: str, **options: Any) -> envs.AgentEnv:
        made.append(envs.make(env_id, **options))
        return made[-1]

    found = act_otherwise(played, 3, policy, samples=5, stream=(0, 1), make=make, chat=desk_chat, limits=WIDE)
    assert found.asked == len(made) == 3 and list(found.agreement.values()) == [0.4] * 3
    assert len(set(policy.numbers)) == 15  # each draw has a stream of its own
    assert [one.turns[-1].action for one in found.trajectories] == ["No."] * 3  # the most frequent other
    assert found.metrics()["alternatives/agreement"] == pytest.approx(0.4)
    same = act_otherwise(
        played, 2, ExpertPolicy(), stream=(0, 1), make=envs.make, chat=desk_chat, limits=WIDE
    )
    assert list(same.agreement.values()) == [1, 1] and same.trajectories == ()


# ---- the oracle ----


def test_an_oracle_finds_the_true_earliest_error(expert: Expert, oracle: ApiServer, desk_chat: Chat) -> None:
    """Of a student who plays like the expert, but at one turn says something else that ends the episode."""
    slips = {"e0": 0, "e1": 1, "e2": 2}

    def slip(history: History) -> str:
        own = expert_of(history)
        return "I cannot help you." if len(history.turns) == slips.get(history.uid) else own

    played = acted(slip, desk_chat, 4)
    client = ApiClient("m", Endpoint(base_url=oracle.url, key=None), store=None)
    found = judge_corrections(client, NOTHING, played, tools_of)
    assert {one.trajectory: one.turn for one in found.feedback} == slips and found.leaked == 0
    both = Judge(ask=["score", "verdict"])
    told = judge_episodes(client, both, played, tools_of, (0, 0)).feedback
    wrong = {(one.trajectory, one.turn) for one in told if one.score == 0}
    assert wrong == {(one.trajectory, one.turn) for one in told if one.verdict is Verdict.STRONG}
    assert {(uid, place) for uid, place in slips.items()} <= wrong
    assert not any(uid == "e3" or place < slips[uid] for uid, place in wrong)
    others = act_otherwise(
        [one for one in played if one.uid in slips], 99, ExpertPolicy(), stream=(0, 0), make=envs.make,
        chat=desk_chat, limits=WIDE,
    )  # fmt: skip
    parents = {one.uid: one for one in played}
    judged = judge_preferences(
        client, NOTHING, others.trajectories, lambda one: parents[one.uid.partition("-")[0]], tools_of
    )
    assert set(judged.better.values()) == {True} and judged.ties == judged.failed == 0 < judged.judged
    client.close()


# ---- runs ----

PAIRS = {
    "kind": "preference", "form": "orpo", "pairs": "actions",
    "chosen": {"source": "alternative"}, "rejected": {"source": "rollout"},
}  # fmt: skip
HEEDED = {
    "kind": "ce", "select": {"source": "rollout"}, "weights": [{"kind": "verbal_score", "at_least": 5}],
}  # fmt: skip


AGREED = {"kind": "ce", "select": {"source": "rollout"}, "weights": [{"kind": "agreement"}]}


def judged(output: Path, url: str, *overrides: str, **changes: Any) -> RunConfig:
    """The shipped student of OrderDesk, judged in every way."""
    raw = {
        "name": "judged", "output": str(output),
        "student": {"model": load_config("orderdesk_opd").student.model},
        "teacher": {"kind": "api", "model": "oracle", "endpoint": {"base_url": url, "key": None}},
        "environments": [{"id": DESK, "options": OPTIONS, "limit": 40}],
        "judge": {"ask": ["score", "verdict"]},
        "rollout": {
            "episodes_per_step": 4, "max_tokens_per_turn": 16, "max_context_tokens": 384, "temperature": 1.5,
            "alternatives": {"actor": "student", "states": 16, "samples": 3, "preferred_by": "judge"},
        },
        "loss": {"components": {"pairs": PAIRS, "heeded": HEEDED, "agreed": AGREED}},
        "trainer": {"steps": 1, "learning_rate": 1e-3, "tensorboard": False},
    }  # fmt: skip
    return load_config(raw | changes, *overrides)


def test_a_run_is_judged_by_the_oracle_and_learns_which_action_is_better_and_which_is_agreed_on(
    tmp_path: Path, oracle: ApiServer
) -> None:
    run = train(judged(tmp_path / "run", oracle.url))
    (row,) = tiny.metrics(run)
    assert (row["judge/asked"], row["judge/failed"], row["judge/missing"]) == (4, 0, 0)
    assert row["alternatives/judged"] == row["alternatives/pairs"] + row["alternatives/ties"] > 0
    assert row["alternatives/undecided"] == 0 < row["loss/pairs"]
    told = {line["trajectory"]["uid"]: line for line in lines(run, 1)}
    orders = {}
    for line in told.values():
        for one, credit in zip(line["feedback"], line["credit"], strict=False):
            if one["score"] is not None:
                assert (one["score"], one["verdict"]) in ((0, "strong"), (9, "skip")) and credit["score"] in (
                    0,
                    9,
                )
        if (branch := line["trajectory"]["branch"]) is None:
            continue
        (said,) = line["feedback"]  # the reason
        orders[line["trajectory"]["uid"]] = branch["better"]
        own = told[branch["parent"]]["credit"][branch["turn"]]["score"]
        assert said["turn"] == branch["turn"] and (not branch["better"] or own == 0)  # 9: none is better
    assert len(orders) == row["alternatives/pairs"] and set(orders.values()) == {True, False}
    assert row["alternatives/better"] == pytest.approx(sum(orders.values()) / len(orders))
    credits = [credit for line in told.values() for credit in line["credit"]]
    shares = [credit["agreement"] for credit in credits if credit["agreement"] is not None]
    assert 0 < len(shares) <= row["alternatives/asked"] == 16  # some answers do not come to an end
    assert row["alternatives/agreement"] == pytest.approx(sum(shares) / len(shares))
    assert 0 == min(shares) < max(shares) <= 1 and row["loss/agreed"] > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rollout.alternatives.preferred_by": "actor"}, "what the student does once more is no better"),
        ({"judge": "null", "loss.components.heeded": "null"}, "alternatives.preferred_by needs a judge"),
        ({"rollout.alternatives": "{actor: teacher, samples: 3}"}, "at teacher.temperature 0 a state has"),
        ({"rollout.alternatives": "{actor: expert, samples: 3}"}, "a scripted expert does one thing"),
        ({"loss.components.pairs": "null"}, "which only a `preference` with `pairs: actions` looks at"),
        ({"loss.components.heeded.select": "{source: alternative}"}, "that the judge finds worse"),
        (
            {"rollout.alternatives": "null", "loss.components.pairs": "null",
             "loss.components.heeded.weights": "[{kind: agreement}]"},
            "a weight agreement compares with `rollout.alternatives`",
        ),
    ],
)  # fmt: skip
def test_what_would_compare_nothing_is_refused(changes: dict[str, str], told: str, tmp_path: Path) -> None:
    overrides = [f"{key}={value}" for key, value in changes.items()]
    with pytest.raises(ConfigError, match=told):
        judged(tmp_path, "http://127.0.0.1:9/v1", *overrides)
