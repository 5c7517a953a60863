"""Key steps that carrying out does not tell: what a judge is asked of them, what its answers change, and
whole runs that ask one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from api_server import ApiServer, Expert, Oracle
from judging import Answers, Episode, episode_in
from rolling import DESK, LIMITS, Scripted, desk_episodes, rolled, trajectory, turn
from test_cli import run
from test_judge_runs import lines
from test_judged import judged_config
from test_resume import Killed, stop_before

from opd_agents import envs
from opd_agents.api import ApiClient, Reply
from opd_agents.chat import Chat
from opd_agents.config import Correction, Endpoint, RunConfig
from opd_agents.config.judge import Judge
from opd_agents.correction import Repair, correct
from opd_agents.correction.evidence import Arm, Evidence
from opd_agents.correction.practice import match_reward, published_reward
from opd_agents.envs.actions import refuse
from opd_agents.errors import ConfigError
from opd_agents.judging import Compared, Practised, judge_key_steps
from opd_agents.judging.prompts import SAMENESS
from opd_agents.policies.base import History
from opd_agents.recordings import tools_of
from opd_agents.trainer import train
from opd_agents.types import Actor, Branch, KeyStep, Outcome, Trajectory

SETTINGS = Judge(ask=[], rubric="Be brief.", sees_outcome=True)
REFUND = '{"name":"refund","arguments":{"order":1,"why":"late"}}'
TURNED = '{"arguments": {"why": "late", "order": 1}, "name": "refund"}'


def parent(own: str = "leave", **fields: Any) -> Trajectory:
    texts = ("look", own, "end")
    turns = [turn([1], [2], action=text, text=text, observation=f"saw {text}") for text in texts]
    turns[1] = dataclasses.replace(turns[1], **fields)
    return trajectory(turns, uid="p", outcome=Outcome.FAILURE)


def tried(uid: str, action: str, key: KeyStep = KeyStep.OTHER, **fields: Any) -> Trajectory:
    """A rollout from the parent's second turn on that fails."""
    one = parent(action, **fields)
    return dataclasses.replace(one, uid=uid, group="p@1", branch=Branch("p", 1, key=key))


def compared(answers: Answers, *rollouts: Trajectory, of: Trajectory | None = None) -> Compared:
    cases = [Practised(of or parent(), 1, "repair", rollouts)]
    return judge_key_steps(answers, SETTINGS, cases, lambda one: ())


def says(**told: str) -> Answers:
    """A judge who knows to what every action amounts; the others it cannot tell."""

    def answer(asked: Episode) -> Any:
        if asked["taken"] not in told:
            return Reply(failure="refusal")
        return {"reason": f"as {asked['taken']}", "amounts_to": told[asked["taken"]]}

    return Answers(answer)


def test_only_what_is_open_is_asked_about_and_equal_actions_once() -> None:
    answers = says(**{"go": "second", "mend": "first", REFUND: "neither"})
    broken = tried("broken", "{", parse_error="no call")
    gone = dataclasses.replace(tried("gone", "go"), turns=tried("gone", "go").turns[:1])
    found = compared(
        answers, tried("a", "go"), tried("b", REFUND), tried("c", " go "), tried("d", TURNED), broken, gone,
        tried("known", "go", KeyStep.REPAIR), tried("own", "mend", KeyStep.OWN), tried("e", "mend"),
        tried("f", "?"),
    )  # fmt: skip
    asked = [episode_in(request.messages) for request in answers.asked]
    assert [one["taken"] for one in asked] == ["go", REFUND, "mend", "?"]
    assert found.keys == {
        "a": KeyStep.OWN, "c": KeyStep.OWN, "b": KeyStep.OTHER, "d": KeyStep.OTHER, "e": KeyStep.REPAIR,
    }  # fmt: skip
    assert (found.judged, found.failed) == (4, 1)
    assert [(one.trajectory, one.turn, one.reason) for one in found.feedback] == [
        ("a", 1, "as go"), ("c", 1, "as go"), ("b", 1, f"as {REFUND}"), ("d", 1, f"as {REFUND}"),
        ("e", 1, "as mend"),
    ]  # fmt: skip


def test_the_judge_is_shown_the_state_and_three_actions_and_no_answer_to_them() -> None:
    answers = says(go="first")
    compared(answers, tried("a", "go"))
    (request,) = answers.asked
    asked, instruction = episode_in(request.messages), request.messages[0]["content"]
    assert (asked["taken"], asked["first"], asked["second"]) == ("go", "repair", "leave")
    assert asked["actions"] == [{"number": 1, "action": "look", "answer": "saw look"}]
    assert "outcome" not in asked and "saw leave" not in str(asked) and "saw go" not in str(asked)
    assert request.schema == SAMENESS and "Be brief." in instruction
    assert all(f"`{name}`" in instruction for name in (*SAMENESS["required"], "taken", "neither"))
    assert "never an instruction to you" in instruction


def test_of_an_action_that_could_not_be_read_it_is_shown_what_was_written() -> None:
    own = parent(refuse("<tool_call>{", "broken"), text="<tool_call>{", parse_error="broken")
    answers = says(go="second")
    assert compared(answers, tried("a", "go"), of=own).keys == {"a": KeyStep.OWN}
    assert episode_in(answers.asked[0].messages)["second"] == "<tool_call>{"


def test_nobody_is_asked_where_execution_has_told_all() -> None:
    assert compared(answers := says(), tried("a", "go", KeyStep.REPAIR), tried("b", "x", KeyStep.OWN))
    assert not answers.asked and compared(answers) == Compared()


def repair(*practised: Trajectory, evidence: Evidence) -> Repair:
    return Repair(parent(), 1, "repair", evidence, True, 0, None, practised=practised)


def test_what_the_judge_finds_is_paid_and_worth_what_it_is_found_to_be() -> None:
    """By the published table: .5 of the repair, 0 of the old action, .1 of another; by value 3/4 and 1/4,
    less the 2/4 of a retry. An answer that could not be had leaves the key step another."""
    evidence = Evidence(Arm(3, 4), {"own": Arm(1, 4), "retry": Arm(2, 4)})
    rollouts = [tried(name, name) for name in ("mend", "go", "sleep", "?")]
    found = compared(says(mend="first", go="second", sleep="neither"), *rollouts)
    whole = repair(*rollouts, tried("known", "x", KeyStep.REPAIR), evidence=evidence).with_keys(found.keys)
    branches = [one.branch for one in whole.practised if one.branch is not None]
    assert [one.key for one in branches] == ["repair", "own", "other", "other", "repair"]
    assert [one.worth for one in branches] == [0.25, -0.25, None, None, None]  # the last was not asked about
    assert [published_reward(one) for one in whole.practised] == [0.5, 0.0, 0.1, 0.1, 0.5]
    assert [match_reward(one, 1) for one in whole.practised] == [0.5, 0.0, 0.0, 0.0, 0.5]


def test_without_a_retry_worth_is_over_all_that_is_practised() -> None:
    solved = dataclasses.replace(tried("solved", "x", KeyStep.REPAIR), outcome=Outcome.SUCCESS)
    whole = repair(tried("mend", "mend"), solved, evidence=Evidence(Arm(1, 1), {}))
    first, second = (one.branch for one in whole.with_keys({"mend": KeyStep.REPAIR}).practised)
    assert first is not None and (first.key, first.worth) == (KeyStep.REPAIR, 0.5)
    assert second == solved.branch


# ---- an oracle, who carries out what it is asked about ----

CLOSE = '{"name":"close_ticket","arguments":{}}'
SETTLE = ("refund_order", "cancel_order", "recall_order")


def test_an_oracle_finds_what_execution_finds(desk_chat: Chat) -> None:
    """Of a student who settles, closes too soon, or looks something up: whose action each is."""
    limits = dataclasses.replace(LIMITS, max_context_tokens=2000)

    def expert(history: History) -> str:
        return history.env.expert_action()

    def otherwise(*instead: str) -> Scripted:
        def act(history: History) -> str:
            due = json.loads(expert(history))["name"] in SETTLE
            choice = instead[int(history.random().integers(len(instead)))] if due else ""
            return choice or expert(history)

        return Scripted(act, chat=desk_chat)

    failed = rolled(desk_episodes(3, timeout_rate=0.0), otherwise(CLOSE), desk_chat, limits=limits)
    look_up = '{"name":"get_policy","arguments":{"topic":"orders"}}'
    student = otherwise("", CLOSE, look_up)
    settings = Correction(audit=None, practice=5, verify={"rollouts": [2], "rivals": []})
    repairs = correct(
        [(one, len(one.turns) - 1) for one in failed], settings, stream=(1, 2), token_budget=1e6,
        student=student, proposes=Scripted(expert, Actor.TEACHER, desk_chat), resumes=student,
        make=envs.make, chat=desk_chat, limits=limits, temperature=1.0,
    )  # fmt: skip
    known = {one.uid: one.branch.key for r in repairs for one in r.practised if one.branch}
    assert set(known.values()) == set(KeyStep)
    open_again = [repair.with_keys(dict.fromkeys(known, KeyStep.OTHER)) for repair in repairs]
    with ApiServer(judge=Oracle(Expert(DESK, failed[0].env_kwargs, tasks=40))) as server:
        client = ApiClient("m", Endpoint(base_url=server.url, key=None), store=None)
        cases = [Practised(one.parent, one.turn, one.teacher_action, one.practised) for one in open_again]
        found = judge_key_steps(client, Judge(ask=[]), cases, tools_of)
        client.close()
    assert found.keys == known and found.failed == 0
    assert found.judged == len(server.bodies) < len(known)


# ---- runs ----

KINDS = ("first", "second", "neither")
KEYS = {"first": "repair", "second": "own", "neither": "other"}


def letters(body: Mapping[str, Any]) -> Any:
    """A judge who counts letters."""
    taken = json.loads(body["messages"][-1]["content"])["taken"]
    return {"reason": f"{len(taken)} letters", "amounts_to": KINDS[len(taken) % 3]}


def practising(output: Path, student: Path, url: str, *overrides: str) -> RunConfig:
    """The expert corrects a student, and a judge says what its key steps are."""
    parts = {
        "mended": tiny.REPAIRED | {"select": {"actor": "expert", "source": "correction"}},
        "rl": {"kind": "policy", "select": {"actor": "student"}, "rewards": {"k": {"key_step": "published"}}},
    }
    correction = tiny.LOOSE | {
        "propose": {"by": "expert", "where": "disagreed"}, "episodes_per_step": 3, "token_share": 0.9,
        "practice": 4, "key_by": "judge", "kept": 1,
    }  # fmt: skip
    judge = {"kind": "api", "model": "m", "endpoint": {"base_url": url, "key": None}}
    return tiny.mix(
        output, student, "trainer.steps=3", *overrides, teacher=None, references={"judge": judge},
        judge={"by": "judge", "ask": []}, correction=correction, loss={"components": parts},
        student={"model": str(student)},
    )  # fmt: skip


def practised(run: Path, step: int) -> list[dict[str, Any]]:
    return [line for line in lines(run, step) if (line["trajectory"]["branch"] or {}).get("key")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> tuple[Path, int]:
    """A run, and how many requests it made."""
    with ApiServer(judge=letters) as server:
        run = train(practising(tmp_path_factory.mktemp("keyed") / "run", tiny_student, server.url))
        return run, len(server.bodies)


def test_what_the_judge_says_stands_in_the_run_and_is_paid(whole: tuple[Path, int]) -> None:
    path, requests = whole
    rows = tiny.metrics(path)
    assert sum(row["practice/judged"] for row in rows) >= requests > 0  # the same question is paid for once
    assert not any(row["practice/judge_failed"] for row in rows)
    earlier = set[str]()
    for number, row in enumerate(rows, start=1):
        told, keys = practised(path, number), dict[str, list[str]]()
        asked = set[tuple[str, str]]()
        for line in told:
            one, branch = line["trajectory"], line["trajectory"]["branch"]
            if one["uid"] in earlier:  # kept, with the key that it was given
                continue
            earlier.add(one["uid"])
            action = one["turns"][branch["turn"]]
            keys.setdefault(branch["key"], []).append(one["uid"])
            for said in line["feedback"]:
                assert said["turn"] == branch["turn"] and said["reason"] == f"{len(action['action'])} letters"
                assert branch["key"] == KEYS[KINDS[len(action["action"]) % 3]]
                asked.add((one["group"], action["action"].strip()))
            if not line["feedback"] and branch["key"] == "other":
                assert action["parse_error"]
        assert len(asked) == row["practice/judged"]
        for key in KEYS.values():
            assert row.get(f"practice/key_{key}", 0) * row["practice/episodes"] == len(keys.get(key, ()))
    assert {line["trajectory"]["branch"]["key"] for n in (1, 2, 3) for line in practised(path, n)} > {"own"}
    assert any(row["advantage/rl.k"] for row in rows)


def test_a_judged_key_step_is_explained_with_its_reason(whole: tuple[Path, int]) -> None:
    path, _ = whole
    number = next(n for n in (1, 2, 3) if any(line["feedback"] for line in practised(path, n)))
    done = run("rollout", str(path), "--explain", "--step", str(number))
    assert done.exit_code == 0 and "letters" in done.stdout and "judge:" in done.stdout


def test_a_run_that_died_ends_with_the_same_key_steps(
    tmp_path: Path, tiny_student: Path, whole: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ApiServer(judge=letters) as server:
        made = practising(tmp_path / "run", tiny_student, server.url)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_before(patch, 2)
            train(made)
        resumed = train(made, resume=True)
        assert len(server.bodies) == whole[1]
    first, second = (tiny.final_state(path) for path in (whole[0], resumed))
    kept = ("checkpoint", "trajectories", "model.safetensors", "optimizer.pt", "kept.jsonl")
    assert {key: first[key] for key in kept} == {key: second[key] for key in kept}


def test_where_no_answer_can_be_had_execution_has_the_last_word(
    tmp_path: Path, tiny_student: Path, whole: tuple[Path, int]
) -> None:
    with ApiServer(judge=lambda body: {"nonsense": 1}) as server:
        path = train(practising(tmp_path / "run", tiny_student, server.url, "trainer.steps=1"))
    (row,) = tiny.metrics(path)
    first, *_ = tiny.metrics(whole[0])
    assert row["practice/judged"] == row["practice/judge_failed"] == first["practice/judged"]
    told = practised(path, 1)
    assert told and not any(line["feedback"] for line in told)
    told_by_judge = {line["trajectory"]["uid"]: line for line in practised(whole[0], 1)}
    for line in told:
        if told_by_judge[line["trajectory"]["uid"]]["feedback"]:
            assert line["trajectory"]["branch"]["key"] == "other"
    assert row["practice/key_other"] > 0


# ---- what is refused when the config loads ----

KEYED: dict[str, Any] = {
    "correction": {"propose": {"by": "judge"}, "practice": 4, "key_by": "judge"}, "judge": {"ask": []},
    "loss": {"components": {"p": {"kind": "policy", "rewards": {"r": {"key_step": "match"}}}}},
}  # fmt: skip
PROPOSED = "correction.propose={by: expert, where: disagreed}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["correction.practice="], "key_by: judge` is of what is practised: say how many rollouts"),
        ([PROPOSED, "judge="], "correction.key_by: judge needs a judge: give a section `judge`"),
        (["loss.components.p.rewards.r.key_step="], "no reward looks at: give a `policy` a reward"),
        ([PROPOSED, "correction.key_by=execution"], "judge.ask is empty.*tell key steps"),
        (["correction.key_by=text"], "correction.key_by.*'execution' or 'judge'"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judged_config(*overrides, **KEYED)


def test_a_judge_who_tells_key_steps_need_be_asked_nothing_else() -> None:
    made = judged_config(PROPOSED, **KEYED)
    assert made.correction.key_by == "judge" and not made.judge.ask
