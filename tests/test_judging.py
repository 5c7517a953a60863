"""What a judge is asked about an episode, how its answers are read, and what a correction must not tell."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from judging import Answers, episode_in, scores
from rolling import trajectory, turn

from opd_agents.api import Reply
from opd_agents.config.judge import Judge
from opd_agents.judging import Judged, Opinions, judge_corrections, judge_episodes, leaks
from opd_agents.judging.prompts import CORRECTION, judgement, judging_messages, transcript
from opd_agents.types import (
    ActionFeedback,
    Actor,
    Branch,
    Message,
    Outcome,
    Span,
    SpanKind,
    ToolSpec,
    Verdict,
    from_dict,
    to_dict,
)

SCORE = Judge(ask=["score"])
CANCEL = '{"name":"cancel_order","arguments":{"order_id":"ORD-17","refund":12.5,"force":true}}'
TOOLS = (
    ToolSpec("get_order", "Show one order.", {"properties": {"order_id": {"type": "string"}}}),
    ToolSpec(
        "cancel_order", "Cancel.", {"properties": {"order_id": {}, "refund": {}, "force": {}, "reason": {}}}
    ),
)
OPENING = (Message("system", "You run a shop."), Message("user", "Please cancel my order."))


def episode(uid: str = "t", actors: str = "sss", **fields: Any) -> Any:
    who = {"s": Actor.STUDENT, "t": Actor.TEACHER}
    turns = [
        turn([1], [2], action=f"do {i}", text=f"do {i}", observation=f"saw {i}", actor=who[actor])
        for i, actor in enumerate(actors, start=1)
    ]
    return trajectory(turns, uid=uid, messages=OPENING, **fields)


def no_tools(one: Any) -> tuple[ToolSpec, ...]:
    return ()


def judged(answers: Answers, made: Judge, *episodes: Any, stream: tuple[int, int] = (0, 0)) -> Judged:
    return judge_episodes(answers, made, episodes, no_tools, stream)


def test_one_request_an_episode_asks_for_all_of_the_students_actions() -> None:
    answers = Answers(scores(7, 0))
    found = judged(answers, SCORE, episode("a", "sts"), episode("b", "ss"))
    assert len(answers.asked) == 2 and (found.asked, found.failed, found.missing) == (2, 0, 0)
    assert [(one.trajectory, one.turn, one.score, one.reason) for one in found.feedback] == [
        ("a", 0, 7, "r1"), ("a", 2, 0, "r3"), ("b", 0, 7, "r1"), ("b", 1, 0, "r2"),
    ]  # fmt: skip
    asked = episode_in(answers.asked[0].messages)
    assert [action["number"] for action in asked["actions"]] == [1, 2, 3]
    assert asked["actions"][1] == {"number": 2, "action": "do 2", "answer": "saw 2"}  # the teacher's
    assert asked["task"] == [{"role": m.role, "content": m.content} for m in OPENING]
    assert "outcome" not in asked


def test_an_episode_is_judged_as_a_whole() -> None:
    made = Judge(ask=["score", "verdict"], per="episode", sees_outcome=True, rubric="Be brief.")
    answers = Answers(lambda e: {"score": 3, "verdict": "weak", "reason": e["outcome"]})
    (said,) = judged(answers, made, episode(outcome=Outcome.UNFINISHED)).feedback
    assert said == ActionFeedback("t", None, 3, Verdict.WEAK, reason="unfinished")
    assert "Be brief." in answers.asked[0].messages[0]["content"]
    assert from_dict(ActionFeedback, to_dict(said)) == said


def test_others_episodes_and_the_environments_failures_are_not_judged() -> None:
    answers = Answers(scores(1, 1, 1))
    others = [
        episode("demo", demonstration=True), episode("branch", branch=Branch("x", 1)),
        episode("broken", outcome=Outcome.ERROR), episode("teacher", "ttt"), episode("none", ""),
    ]  # fmt: skip
    assert judged(answers, SCORE, *others) == Judged() and answers.asked == []


def test_an_answer_that_failed_is_no_feedback_and_what_is_left_out_is_counted() -> None:
    def answer(asked: Any) -> Any:
        return Reply(failure="timeout") if len(asked["actions"]) == 2 else scores(None, 4)(asked)

    found = judged(Answers(answer), SCORE, episode("a", "ss"), episode("b", "sss"))
    assert [(one.trajectory, one.turn) for one in found.feedback] == [("b", 1)]
    assert (found.asked, found.failed, found.missing) == (2, 1, 2)
    row = found.metrics()
    assert row["judge/score"] == 4 and row["judge/failed"] == 1 and "judge/skip" not in row


def test_of_an_action_that_is_named_twice_or_does_not_exist_the_first_answer_counts() -> None:
    def answer(asked: Any) -> Any:
        given = [(1, 8), (1, 2), (9, 5), (-3, 5), (0, 5)]
        return {"actions": [{"number": n, "score": s, "reason": ""} for n, s in given]}

    found = judged(Answers(answer), SCORE, episode("a", "ss"))
    assert [(one.turn, one.score) for one in found.feedback] == [(0, 8)] and found.missing == 1


def test_a_share_of_the_episodes_is_drawn_by_seed_and_step() -> None:
    episodes = [episode(f"e{i}", "s") for i in range(20)]

    def drawn(stream: tuple[int, int], share: float = 0.25) -> list[str]:
        made = Judge(ask=["score"], share=share)
        found = judged(Answers(scores(1)), made, *episodes, stream=stream)
        return [one.trajectory for one in found.feedback]

    assert len(drawn((0, 1))) == 5 and drawn((0, 1)) == drawn((0, 1)) != drawn((0, 2))
    assert len(drawn((0, 1), 0.01)) == 1


def test_a_thought_and_what_could_not_be_read_stand_in_the_transcript() -> None:
    think = Span(SpanKind.THINK, 0, 1)
    plain = turn([1], [2], action='{"name":"x"}', text="<tool_call>x</tool_call>", observation="1")
    thought = dataclasses.replace(plain, text="hm <tool_call>x</tool_call>", spans=(think,))
    broken = dataclasses.replace(plain, action="\x15bad\x15<tool", text="<tool", parse_error="bad")
    told = transcript(trajectory([plain, thought, broken]), TOOLS)
    actions = [action["action"] for action in told["actions"]]
    assert actions == ['{"name":"x"}', "hm <tool_call>x</tool_call>", "<tool"]
    assert told["tools"][0]["name"] == "get_order"


@pytest.mark.parametrize("per", ["action", "episode"])
@pytest.mark.parametrize("ask", [["score"], ["verdict"], ["score", "verdict"]])
def test_schemas_are_strict_and_the_instructions_name_all_that_they_ask_for(per: Any, ask: Any) -> None:
    made = Judge(ask=ask, per=per)
    schema = judgement(made)
    Draft202012Validator.check_schema(schema)
    text = judging_messages(made, episode(), TOOLS, [0])[0]["content"]
    closed = [schema] if per == "episode" else [schema, schema["properties"]["actions"]["items"]]
    for one in [*closed, CORRECTION]:
        assert one["additionalProperties"] is False and set(one["required"]) == set(one["properties"])
    for name in closed[-1]["properties"]:
        assert f"`{name}`" in text
    assert not {"score", "verdict"} - set(ask) & closed[-1]["properties"].keys()


# ---- who was told what ----


def test_an_actions_own_judgement_stands_before_its_episodes() -> None:
    said = [
        ActionFeedback("a", None, score=2), ActionFeedback("a", 1, score=8),
        ActionFeedback("b", 0, score=3), ActionFeedback("b", 2, score=6),
        ActionFeedback("a", 0, replacement="x"),
    ]  # fmt: skip
    opinions = Opinions(said)
    scored = [opinions.of("a", number) for number in range(3)]
    assert [one.score if one else None for one in scored] == [2, 8, 2]
    assert opinions.of("b", 1) is None and opinions.of("c", 0) is None
    assert opinions.episode_score(episode("a")) == 2 and opinions.episode_score(episode("b")) == 4.5
    assert opinions.episode_score(episode("c")) is None


# ---- corrections ----


def seen(*observations: str) -> Any:
    turns = [turn([1], [2], action="look", text="look", observation=text) for text in observations]
    return trajectory([*turns, turn([1], [2], action="wrong", observation="ORD-17 12.5")], messages=OPENING)


@pytest.mark.parametrize(
    ("observation", "leaked"),
    [
        ('{"order_id":"ORD-17","total":12.50}', []),
        ("Order ORD-17, 12.5 euros.", []),
        ("Order ord-17 costs 12.5", []),
        ("Order ORD-170 costs 12.5", ["ORD-17"]),
        ("Orders 17 and ORD-1: 12.5", ["ORD-17"]),
        ("ORD-17 costs 112.5 or 12.55", ["12.5"]),
        ("nothing", ["ORD-17", "12.5"]),
    ],
)
def test_every_literal_of_a_correction_stands_in_the_students_history(
    observation: str, leaked: list[str]
) -> None:
    """Not in what came after; true and false say nothing, and names are the schemas'."""
    assert leaks(CANCEL, seen(observation), 1, TOOLS) == leaked


def test_unknown_tools_arguments_words_and_broken_actions_leak() -> None:
    one = seen("ORD-17")
    assert leaks('{"name":"wipe","arguments":{"order_id":"ORD-17"}}', one, 1, TOOLS) == ["wipe"]
    assert leaks('{"name":"get_order","arguments":{"secret":"ORD-17"}}', one, 1, TOOLS) == ["secret"]
    assert leaks('{"name":"get_order","arguments":{"order_id":["ORD-9"]}}', one, 1, TOOLS) == ["ORD-9"]
    assert leaks("Please cancel ORD-17, now!", one, 1, TOOLS) == ["now"]
    assert leaks('{"name":', one, 1, TOOLS) == ['{"name":']
    nested = '{"name":"cancel_order","arguments":{"reason":"please cancel your 44 orders"}}'
    assert leaks(nested, one, 1, TOOLS) == ["your", "44", "orders"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_no_text_breaks_the_filter_and_a_new_secret_never_passes(text: str, value: Any) -> None:
    one = seen(text)
    for action in (text, json.dumps({"name": "get_order", "arguments": {"order_id": value}})):
        leaks(action, one, 1, TOOLS)
    secret = json.dumps({"name": "get_order", "arguments": {"order_id": [value, "S3CR3T"]}}, allow_nan=True)
    assert leaks(secret, one, 1, TOOLS)


def test_a_judge_names_the_earliest_error_and_what_should_have_been_done() -> None:
    def answer(asked: Any) -> Any:
        number = len(asked["actions"])
        action = '{"name": "get_order", "arguments": {"order_id": "ORD-17"}}'
        return {"number": number, "reason": "why", "replacement": action}

    known, unknown = seen("ORD-17"), dataclasses.replace(seen("ORD-1"), uid="u")
    found = judge_corrections(Answers(answer), SCORE, [known, unknown], lambda one: TOOLS)
    canonical = '{"name":"get_order","arguments":{"order_id":"ORD-17"}}'
    assert found.feedback == (ActionFeedback("t", 1, replacement=canonical, reason="why"),)
    assert (found.asked, found.failed, found.leaked) == (2, 0, 1)


@pytest.mark.parametrize(("number", "replacement"), [(0, "look"), (3, "look"), (-1, "look"), (2, "  ")])
def test_no_error_or_no_replacement_is_no_correction(number: int, replacement: str) -> None:
    answers = Answers(lambda e: {"number": number, "reason": "", "replacement": replacement})
    found = judge_corrections(answers, SCORE, [seen("x")], no_tools)
    assert found == Judged((), 1)


def test_a_correction_that_could_not_be_had_is_counted() -> None:
    answers = Answers(lambda e: Reply(failure="refusal"))
    assert judge_corrections(answers, SCORE, [seen("x")], no_tools) == Judged((), 1, failed=1)
