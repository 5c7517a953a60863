"""A teacher that only acts, over an API: runs against a server whose model is the scripted expert."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from api_server import ApiServer, Expert
from typer.testing import CliRunner

from opd_agents.cli import app
from opd_agents.config import load_config
from opd_agents.errors import BudgetSpent, ConfigError
from opd_agents.report import write_report
from opd_agents.trainer import train
from opd_agents.types import Actor

TASKS = 50
KEY = "sk-very-secret-4711"
CE = {"ce": {"kind": "ce", "select": {"actor": "teacher"}}}
ORACLE = Expert(tiny.DESK["id"], tiny.DESK["options"], tasks=TASKS)
SPENT = ("cached", "paid", "retries", "failures")  # of this process, not of the run


def desk(output: Path, url: str, *overrides: str, endpoint: Any = None, **changes: Any) -> Any:
    """A tiny student that imitates the API's model on OrderDesk."""
    endpoint = {"base_url": url, "key": "DESK_KEY"} | (endpoint or {})
    raw = tiny.sft(output, environments=[tiny.DESK | {"limit": TASKS}], method=None)
    raw |= {
        "teacher": {"kind": "api", "model": "oracle", "endpoint": endpoint},
        "loss": {"components": CE},
        "student": {"build": tiny.BUILD | {"tokenizer_episodes": 40}},
        "rollout": {"source": "teacher", "episodes_per_step": 8, "max_context_tokens": 256},
        "trainer": {
            "steps": 3, "learning_rate": 0.02, "optimizer": "muon", "checkpoint_every": 2,
            "tensorboard": False,
        },
    }  # fmt: skip
    return load_config(raw | changes, *overrides)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("DESK_KEY", KEY)
    with ApiServer(ORACLE, key=KEY) as server:
        yield server


def test_a_student_imitates_a_teacher_that_only_acts(server, tmp_path):
    prices = {"prices": {"input": 1.0, "output": 4.0}}
    run = train(desk(tmp_path / "run", server.url, "trainer.steps=6", endpoint=prices))
    rows, summary = tiny.metrics(run), json.loads((run / "summary.json").read_text())
    assert all(row["rollout/success"] == 1 for row in rows)
    assert rows[-1]["loss/ce"] < 0.8 * rows[0]["loss/ce"]
    first = json.loads((run / "trajectories" / "step-000001.jsonl").read_text().splitlines()[0])["trajectory"]
    assert {turn["actor"] for turn in first["turns"]} == {Actor.TEACHER}
    assert all(turn["logprobs"] is None and turn["action_ids"] for turn in first["turns"])
    assert sum(row["api/requests"] for row in rows) == summary["total/api/requests"] > 0
    assert summary["total/api/cost"] >= summary["total/api/paid"] > 0  # some states come up again
    tokens = summary["total/api/prompt_tokens"] + summary["total/api/completion_tokens"]
    assert summary["total/teacher_tokens"] == summary["total/uncounted_tokens"] == tokens
    page = write_report([run], tmp_path / "report.html").read_text()
    successes = sum(row["rollout/episodes"] for row in rows)
    assert f"<dt>API cost per successful episode</dt><dd>{summary['total/api/cost'] / successes:.2g}" in page
    lines = (run / "transcripts" / "step-000001.jsonl").read_text().splitlines()
    assert len(lines) == rows[0]["api/requests"]
    assert json.loads(lines[0]).keys() == {"model", "request", "sample", "answer"}


def test_the_key_is_in_no_file_log_or_error(server, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level("DEBUG")
    run = train(desk(tmp_path / "run", server.url, "trainer.steps=1"))
    monkeypatch.setenv("DESK_KEY", KEY + "-wrong")
    with pytest.raises(ConfigError, match="DESK_KEY") as caught:
        train(desk(tmp_path / "other", server.url, "trainer.steps=1"))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert (run / "answers.sqlite") in files
    for file in files:
        assert KEY.encode() not in file.read_bytes(), file
    assert KEY not in caplog.text and KEY not in "".join(capfd.readouterr())
    error = caught.value
    assert KEY not in str(error) and (error.__suppress_context__ or error.__context__ is None)


def test_a_missing_key_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("DESK_KEY", raising=False)
    with pytest.raises(ConfigError, match="DESK_KEY is not set"):
        train(desk(tmp_path / "run", "http://127.0.0.1:9/v1"))
    assert not (tmp_path / "run").exists()


def comparable(run: Path) -> Any:
    """What a run leaves, without what was paid by which process."""
    state = tiny.final_state(run)
    for row in [*state["metrics"], state["summary"], state["trainer.json"]["totals"]]:
        for key in [
            key for key in row if key.startswith(("api/", "total/api/")) and any(s in key for s in SPENT)
        ]:
            del row[key]
    return state


def test_a_spent_budget_stops_with_a_checkpoint_and_a_larger_one_goes_on(server, tmp_path):
    whole = train(desk(tmp_path / "whole", server.url))
    told = server.told.copy()
    most = json.loads((whole / "summary.json").read_text())["total/teacher_tokens"]
    server.told.clear()
    half = {"max_tokens": most // 2, "concurrency": 2}
    with pytest.raises(BudgetSpent, match="Stopped in step"):
        train(desk(tmp_path / "run", server.url, endpoint=half))
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    run = train(desk(tmp_path / "run", server.url, endpoint=half | {"max_tokens": 10 * most}), resume=True)
    assert server.told == told  # in two parts nothing more than at once
    assert comparable(run) == comparable(whole)


def test_what_a_loss_needs_and_no_api_gives_is_refused(server, tmp_path):
    loss = {"components": {"distill": {"kind": "distill"}}}
    with pytest.raises(ConfigError, match="`act` and `judge`"):
        train(desk(tmp_path / "run", server.url, loss=loss))


def test_turns_of_student_and_teacher_mix_and_both_learn(server, tmp_path):
    components = CE | {"verifier": tiny.POLICY}
    rollout = {"source": {"teacher": 0.5, "student": 0.5}, "episodes_per_step": 8, "group_size": 4}
    rollout |= {"max_tokens_per_turn": 12, "max_context_tokens": 256, "max_turns": 4}
    demonstrations = {"actor": "teacher", "when": "group_failed"}
    run = train(desk(
        tmp_path / "run", server.url, rollout=rollout | {"demonstrations": demonstrations},
        loss={"components": components},
    ))  # fmt: skip
    lines = (run / "trajectories" / "step-000001.jsonl").read_text().splitlines()
    actors = {turn["actor"] for line in lines for turn in json.loads(line)["trajectory"]["turns"]}
    assert actors == {Actor.STUDENT, Actor.TEACHER}
    rows = tiny.metrics(run)
    assert any(row["demonstrations/episodes"] for row in rows)
    student = [m for body in server.bodies for m in body["messages"] if m["role"] == "assistant"]
    assert any(message["content"] for message in student)  # what the student wrote and nobody could read


def test_a_teacher_that_fails_ends_its_episode_alone(server, tmp_path):
    server.plan = [None] * 3 + ["refusal"]
    run = train(desk(tmp_path / "run", server.url, "trainer.steps=1", endpoint={"concurrency": 1}))
    (row,) = tiny.metrics(run)
    assert row["rollout/errors"] == 1 and row["api/failures/refusal"] == 1
    lines = (run / "trajectories" / "step-000001.jsonl").read_text().splitlines()
    errors = [e for line in lines if (e := json.loads(line)["trajectory"]["error"])]
    assert len(errors) == 1 and "refusal" in errors[0]


def test_a_model_behind_an_api_stands_in_the_table_of_policies(server, tmp_path, capsys):
    arguments = ["evaluate", tiny.DESK["id"], "--option", "level=easy", "--limit", "3", "--split", "train"]
    arguments += ["--policy", "expert", "--policy", "api:oracle", "--base-url", server.url]
    result = CliRunner().invoke(app, [*arguments, "--key-env", "DESK_KEY", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    expert, api = json.loads(result.stdout)["policies"]
    assert (api["policy"], api["success"], api["errors"]) == ("api:oracle", 1.0, 0)
    assert api["turns"] >= 3 and api["spent"]["requests"] > 0 and "requests" not in expert["spent"]
    told = sum(server.told.values())
    again = CliRunner().invoke(app, [*arguments, "--key-env", "DESK_KEY", "--out", str(tmp_path), "--json"])
    assert json.loads(again.stdout)["policies"][1]["success"] == 1.0
    assert sum(server.told.values()) == told  # a rerun is free


def test_an_api_model_plays(server):
    arguments = ["rollout", tiny.DESK["id"], "--option", "level=easy", "--policy", "api:oracle"]
    arguments += ["--base-url", server.url, "--key-env", "DESK_KEY", "--episodes", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("success") >= 2


def test_an_api_without_its_key_is_the_users_mistake(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["evaluate", "orderdesk", "--policy", "api:gpt", "--limit", "1"])
    assert result.exit_code == 2 and "OPENAI_API_KEY is not set" in result.output
