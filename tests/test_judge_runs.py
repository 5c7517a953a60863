"""Whole runs with a judge behind an API: what a step leaves, what a resume asks again, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from api_server import ApiServer, Expert, Oracle
from judging import Answers, scores
from test_resume import Killed, stop_before

from opd_agents.config import PlugIn, RunConfig
from opd_agents.errors import ConfigError
from opd_agents.starting import check_inputs
from opd_agents.teachers import Capability
from opd_agents.teachers.plug_in import make_teacher
from opd_agents.trainer import train
from opd_agents.types import ActionFeedback, Actor, from_dict

RUBRIC = {
    "kind": "policy", "select": {"actor": "student", "source": "rollout"},
    "rewards": {"rubric": {"verbal": "action"}},
}  # fmt: skip
HEEDED = {"kind": "ce", "select": {"actor": "student", "source": "rollout"}, "weights": [
    {"kind": "verbal_score", "at_least": 5}, {"kind": "verdict", "skip": 1.0, "strong": 0.1}]}  # fmt: skip


OPENCLAW = {
    "kind": "policy", "select": {"actor": "student", "source": "rollout"},
    "references": {"teacher": {}}, "rewards": {"verifier": {"baseline": "none", "normalise": "none"}},
}  # fmt: skip


def letters(body: Mapping[str, Any]) -> Any:
    """A judge who counts the letters of an action."""
    episode = json.loads(body["messages"][-1]["content"])
    names = str(body["response_format"]["json_schema"]["schema"])

    def said(text: str) -> dict[str, Any]:
        size = len(text)
        whole = {"reason": "", "score": size % 10, "verdict": ("skip", "weak", "strong")[size % 3]}
        return {key: value for key, value in whole.items() if key in names}

    if "'actions'" not in names:
        return said("".join(action["action"] for action in episode["actions"]))
    return {
        "actions": [{"number": a["number"]} | said(a["action"]) for a in episode["actions"] if "judge" in a]
    }


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer(judge=letters) as server:
        yield server


def judged(output: Path, teacher: Path, url: str, *overrides: str, **changes: Any) -> RunConfig:
    """The tiny run of a student that a local teacher teaches and a model behind an API judges."""
    endpoint = {"base_url": url, "key": None}
    given = {
        "references": {"judge": {"kind": "api", "model": "m", "endpoint": endpoint}},
        "judge": {"by": "judge", "ask": ["score", "verdict"]}, "correction": None,
        "loss": {"components": {"rubric": RUBRIC, "heeded": HEEDED}},
    }  # fmt: skip
    return tiny.mix(output, teacher, "trainer.steps=4", *overrides, **given | changes)


def lines(run: Path, step: int) -> list[Any]:
    text = (run / "trajectories" / f"step-{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_what_the_judge_says_is_learned_from_and_kept(
    tmp_path: Path, tiny_teacher: Path, server: ApiServer
) -> None:
    run = train(judged(tmp_path / "run", tiny_teacher, server.url))
    for number, row in enumerate(tiny.metrics(run), start=1):
        assert (row["judge/asked"], row["judge/failed"], row["judge/missing"]) == (8, 0, 0)
        assert row["judge/skip"] + row["judge/weak"] + row["judge/strong"] == pytest.approx(1)
        assert row["advantage/rubric.rubric"] > 0 and row["groups/nonzero"] > 0 and row["loss/heeded"] > 0
        for line in lines(run, number):
            feedback = [from_dict(ActionFeedback, one) for one in line["feedback"]]
            assert [one.turn for one in feedback] == [*range(len(line["trajectory"]["turns"]))]
            for one, credit in zip(feedback, line["credit"], strict=True):
                assert (credit["score"], credit["verdict"]) == (one.score, one.verdict)
                action = line["trajectory"]["turns"][one.turn or 0]
                told = action["text"] if action["parse_error"] else action["action"]
                assert one.score == len(told) % 10


def test_a_run_that_died_asks_for_nothing_twice_and_ends_the_same(
    tmp_path: Path, tiny_teacher: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(run: Path) -> Any:
        found = tiny.final_state(run)
        kept = ("checkpoint", "trajectories", "model.safetensors", "optimizer.pt")
        return {key: value for key, value in found.items() if key in kept}

    whole = state(train(judged(tmp_path / "whole", tiny_teacher, server.url)))
    asked = len(server.bodies)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, 3)
        train(judged(tmp_path / "died", tiny_teacher, server.url))
    assert state(train(judged(tmp_path / "died", tiny_teacher, server.url), resume=True)) == whole
    assert len(server.bodies) == 2 * asked  # the third step was played twice


def test_where_no_answer_can_be_had_nothing_is_learned_from_scores(
    tmp_path: Path, tiny_teacher: Path, server: ApiServer
) -> None:
    server.judge = lambda body: {"nonsense": 1}
    run = train(judged(tmp_path / "run", tiny_teacher, server.url, "trainer.steps=1"))
    (row,) = tiny.metrics(run)
    assert (row["judge/asked"], row["judge/failed"], row["judge/feedback"]) == (8, 8, 0)
    assert row["loss/rubric"] == 0 and row["loss/heeded"] > 0  # what was not judged counts in full
    assert all(line["feedback"] == [] for line in lines(run, 1))


def test_rejected_episodes_give_way_to_the_experts(
    tmp_path: Path, tiny_teacher: Path, server: ApiServer
) -> None:
    extra = {"actor": "expert", "when": "rejected", "at_least": 5}
    rollout = {"episodes_per_step": 8, "group_size": 4, **tiny.LIMITS, "demonstrations": extra}
    policy = {"kind": "policy", "ratio": "none", "rewards": {"verifier": {}}}
    made = judged(
        tmp_path / "run", tiny_teacher, server.url, rollout=rollout,
        judge={"by": "judge", "ask": ["score"], "per": "episode"}, loss={"components": {"grpo": policy}},
    )  # fmt: skip
    run = train(made)
    rows = tiny.metrics(run)
    assert sum(row["demonstrations/rejected"] for row in rows) > 0
    for number, row in enumerate(rows, start=1):
        told = lines(run, number)
        out = [line for line in told if line["trajectory"]["replaced"]]
        shown = [line["trajectory"]["group"] for line in told if line["trajectory"]["demonstration"]]
        assert len(out) == row["demonstrations/rejected"] == row["demonstrations/episodes"] == len(shown)
        assert sorted(line["trajectory"]["group"] for line in out) == sorted(shown)
        assert all(line["feedback"][0]["score"] < 5 for line in out)
        assert row["rollout/episodes"] == 8  # those that were replaced count among them


DESK: dict[str, Any] = tiny.DESK | {"options": {"level": "easy", "timeout_rate": 0.0}}


def test_a_judge_proposes_the_corrections(tmp_path: Path) -> None:
    """The student writes noise: the first action of every episode is its earliest error."""
    oracle = Oracle(Expert(DESK["id"], DESK["options"], tasks=300))
    with ApiServer(judge=oracle) as server:
        teacher = {"kind": "api", "model": "m", "endpoint": {"base_url": server.url, "key": None}}
        limits = {"max_tokens_per_turn": 16, "max_context_tokens": 320, "max_turns": 2}
        own = {"kind": "ce", "select": {"source": "rollout"}}
        raw = tiny.sft(
            tmp_path / "run", environments=[DESK], method=None, teacher=teacher, judge={"ask": []},
            correction=tiny.LOOSE | {"propose": {"by": "judge"}, "episodes_per_step": 3, "token_share": 0.9},
            loss={"components": {"own": own, "fixed": tiny.REPAIRED}},
            rollout={"episodes_per_step": 4, **limits},
        ) | {"student": {"build": tiny.BUILD | {"tokenizer_episodes": 40}}}  # fmt: skip
        run = train(tiny.load_config(raw, "trainer.steps=2"))
    rows = tiny.metrics(run)
    assert [row["correction/asked"] for row in rows] == [3, 3]
    assert sum(row["correction/proposed"] for row in rows) > 0
    assert all(row["correction/leaked"] == row["correction/failed"] == 0 for row in rows)
    repaired = [line for line in lines(run, 1) + lines(run, 2) if line["repair"]]
    for line in repaired:
        (said,) = line["feedback"]
        assert said["turn"] == line["repair"]["turn"] == 0
        assert said["replacement"] == line["repair"]["teacher_action"] != line["repair"]["student_action"]


def test_a_teacher_that_cannot_judge_is_refused_before_anything_runs(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    made = judged(tmp_path / "run", tiny_teacher, "http://127.0.0.1:9/v1", "judge.by=teacher", references={})
    with pytest.raises(ConfigError, match=r"judge\.by asks teacher \(kind local\).*capability `judge`"):
        check_inputs(made)


class Mute:
    """Says that it can judge, and has no client."""

    can = frozenset({Capability.JUDGE})
    tokens = flops = 0

    def __init__(self, model: str | None, chat: Any, *, dtype: str, temperature: float, **_: Any) -> None:
        self.asked = 0


class Grader(Mute):
    """A judge of the user's own, without an API."""

    @property
    def client(self) -> Answers:
        return Answers(lambda episode: scores(*(len(a["action"]) % 10 for a in episode["actions"]))(episode))


def test_a_judge_of_ones_own_needs_no_api(tmp_path: Path, tiny_teacher: Path, desk_chat: Any) -> None:
    own = {
        "references": {"judge": {"kind": "test_judge_runs:Grader"}},
        "judge": {"by": "judge", "ask": ["score"]},
    }
    made = judged(
        tmp_path / "run", tiny_teacher, "", "trainer.steps=1", **own, loss={"components": {"rubric": RUBRIC}}
    )
    (row,) = tiny.metrics(train(made))
    assert row["judge/feedback"] >= 8 and row["advantage/rubric.rubric"] > 0
    settings = PlugIn(kind="test_judge_runs:Mute")
    with pytest.raises(ConfigError, match=r"references\.judge\.kind test_judge_runs:Mute lacks client"):
        make_teacher("references.judge", settings, None, desk_chat, temperature=1.0)


# ---- what another would do at the student's states ----


def paired(output: Path, teacher: Path, *overrides: str, **changes: Any) -> RunConfig:
    pairs = {
        "kind": "preference", "form": "dpo", "beta": 0.5, "reference": "base", "pairs": "actions",
        "chosen": {"source": "alternative"}, "rejected": {"source": "rollout"},
    }  # fmt: skip
    labels = {"kind": "ce", "coef": 0.1, "select": {"source": "alternative"}}
    rollout = {"episodes_per_step": 8, "group_size": 1, **tiny.LIMITS}
    given = {
        "references": {"base": {"kind": "self"}}, "correction": None,
        "rollout": rollout | {"alternatives": {"actor": "expert", "states": 6}},
        "loss": {"components": {"pairs": pairs, "labels": labels}},
    }  # fmt: skip
    return tiny.mix(output, teacher, "trainer.steps=3", *overrides, **given | changes)


@pytest.mark.parametrize("actor", ["expert", "teacher"])
def test_a_student_learns_to_prefer_what_another_does_at_its_states(
    tmp_path: Path, tiny_teacher: Path, actor: str
) -> None:
    run = train(paired(tmp_path / "run", tiny_teacher, f"rollout.alternatives.actor={actor}"))
    for number, row in enumerate(tiny.metrics(run), start=1):
        others = [line["trajectory"] for line in lines(run, number) if line["trajectory"]["branch"]]
        own = {line["trajectory"]["uid"]: line["trajectory"] for line in lines(run, number)}
        assert row["alternatives/asked"] == 6 and row["alternatives/pairs"] == len(others) > 0
        assert row["loss/pairs"] > 0 and row["loss/labels"] > 0 and row["rollout/episodes"] == 8
        for one in others:
            branch, parent = one["branch"], own[one["branch"]["parent"]]
            theirs, mine = one["turns"][-1], parent["turns"][branch["turn"]]
            assert not branch["tried"] and len(one["turns"]) == branch["turn"] + 1
            assert theirs["actor"] == Actor(actor) and theirs["action"] != mine["action"]
            assert (theirs["context_ids"], theirs["state_digest"]) == (
                mine["context_ids"],
                mine["state_digest"],
            )
            assert all(turn["weight"] == 0 for turn in one["turns"][:-1])


def test_what_the_judge_says_in_hindsight_the_student_is_told_as_its_own_teacher(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    """Those of an even number of actions get a hint, and a teacher that differs from the student."""

    def hint(body: Mapping[str, Any]) -> Any:
        actions = json.loads(body["messages"][-1]["content"])["actions"]
        return {"reason": "", "hint": "" if len(actions) % 2 else "close_ticket"}

    with ApiServer(judge=hint) as server:
        endpoint = {"base_url": server.url, "key": None}
        given = {
            "references": {"judge": {"kind": "api", "model": "m", "endpoint": endpoint}},
            "judge": {"by": "judge", "ask": ["hint"], "per": "episode"}, "correction": None,
            "teacher": {"kind": "self", "weights": "live", "conditioning": {"sources": ["hindsight"]}},
            "loss": {"components": {"combined": OPENCLAW}},
        }  # fmt: skip
        run = train(tiny.mix(tmp_path / "run", tiny_teacher, "trainer.steps=2", **given))
    for number, row in enumerate(tiny.metrics(run), start=1):
        assert row["judge/asked"] == 8 and 0 < row["taught/teacher"] < 1
        for line in lines(run, number):
            told = bool(len(line["trajectory"]["turns"]) % 2 == 0)
            assert line["trajectory"]["hint"] == ("close_ticket" if told else "")
            parts = [credit["advantage"]["combined.teacher"] for credit in line["credit"]]
            assert any(parts) is told
