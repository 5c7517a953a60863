"""An evaluation that is interrupted goes on where it was, and one of something else is left alone."""

import json
import sys

import pytest
from tiny import timeless
from toy_envs import Counter
from typer.testing import CliRunner

from opd_agents import envs
from opd_agents.cli import app
from opd_agents.errors import ConfigError, RunFolderError
from opd_agents.evaluation import evaluate
from opd_agents.evaluation.records import Records, begin, stem

MODULE = sys.modules[evaluate.__module__]
SUITE = "environments: [{id: opd_agents/OrderDesk-v0, options: {level: easy}}]"
BROKEN: set[str] = set()  # tasks in which the environment fails


class Fragile(Counter):
    def begin(self, task):
        if task.id in BROKEN:
            raise RuntimeError("the server is down")
        return super().begin(task)


envs.register("resume/Fragile-v0", f"{__name__}:Fragile")


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE, encoding="utf-8")
    return str(path)


@pytest.fixture
def begun(monkeypatch):
    """The uids of all episodes that are played."""
    uids = []
    original = MODULE.rollout

    def counted(episodes, **given):
        uids.extend(episode.uid for episode in episodes)
        return original(episodes, **given)

    monkeypatch.setattr(MODULE, "rollout", counted)
    return uids


def test_an_interrupted_evaluation_goes_on_and_is_the_uninterrupted_one(suite, tmp_path, monkeypatch, begun):
    whole = evaluate(suite, ["random", "expert"], limit=5, samples=2, out=tmp_path / "whole")
    assert len(begun) == 2 * (10 + 5)
    original = Records.add

    def killed(self, trajectory, spent):
        if len(self.done) == 4:
            raise KeyboardInterrupt
        original(self, trajectory, spent)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Records, "add", killed)
        evaluate(suite, ["random", "expert"], limit=5, samples=2, out=tmp_path / "cut")
    file = tmp_path / "cut" / "eval-random.jsonl"
    assert len(file.read_text().splitlines()) == 4 and not (tmp_path / "cut" / "evaluation.json").exists()
    with file.open("a", encoding="utf-8") as cut:
        cut.write('{"spent":{"seconds":0.1},"traj')
    begun.clear()
    again = evaluate(suite, ["random", "expert"], limit=5, samples=2, out=tmp_path / "cut")
    assert len(begun) == 2 * (10 + 5) - 4 and timeless(again) == timeless(whole)
    for name in ("eval-random.jsonl", "eval-random.greedy.jsonl", "eval-expert.jsonl"):
        first, second = (
            [timeless(json.loads(line)) for line in (tmp_path / folder / name).read_text().splitlines()]
            for folder in ("whole", "cut")
        )
        assert first == second
    begun.clear()
    assert timeless(evaluate(suite, ["expert"], limit=5, samples=2, out=tmp_path / "cut"))["policies"]
    assert not begun  # all of it is there


def test_other_policies_join_and_are_compared_with_what_is_there(suite, tmp_path, begun):
    evaluate(suite, ["expert"], limit=3, out=tmp_path / "out")
    begun.clear()
    result = evaluate(suite, ["expert", "random"], limit=3, out=tmp_path / "out")
    assert len(begun) == 6 and result["comparisons"][0]["difference"] == -1.0
    assert set(json.loads((tmp_path / "out" / "how.json").read_text())["policies"]) == {"expert", "random"}


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"seed": 1}, "seed"), ({"limit": 3}, "limit"), ({"temperature": 0.5}, "suite.temperature"),
     ({"samples": 2}, "samples"), ({"split": "validation"}, "split")],
)  # fmt: skip
def test_an_evaluation_of_something_else_is_refused(suite, tmp_path, changes, what):
    evaluate(suite, ["expert"], limit=2, out=tmp_path)
    with pytest.raises(RunFolderError, match=f"differs in .*{what}"):
        evaluate(suite, ["expert"], **{"limit": 2, "out": tmp_path} | changes)
    evaluate(suite, ["expert"], limit=2, out=tmp_path, concurrency=1)  # which no figure depends on


def test_other_weights_of_a_policy_are_refused(tmp_path):
    begin(tmp_path, {"seed": 0}, {"runs/x": {"checkpoint": "step-3", "weights": "a"}})
    begin(tmp_path, {"seed": 0}, {"runs/y": {"checkpoint": "step-3", "weights": "b"}})
    with pytest.raises(RunFolderError, match="runs/x: weights"):
        begin(tmp_path, {"seed": 0}, {"runs/x": {"checkpoint": "step-3", "weights": "c"}})
    with pytest.raises(ConfigError, match="one file"):
        begin(tmp_path, {"seed": 0}, {"a/b": {}, "a-b": {}})
    assert stem("runs/x/") == "runs-x"


def test_folders_that_hold_something_else_are_left_alone(suite, tmp_path):
    (tmp_path / "eval-old.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"no how\.json"):
        evaluate(suite, ["expert"], limit=1, out=tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        evaluate(suite, ["expert"], limit=1, out=suite)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(RunFolderError, match="line 1"):
        Records(broken)
    (tmp_path / "how.json").write_text("[]")
    with pytest.raises(RunFolderError, match="not what an evaluation wrote"):
        evaluate(suite, ["expert"], limit=1, out=tmp_path)


def test_episodes_that_failed_by_an_error_are_played_again(tmp_path, begun):
    BROKEN.update({"1", "2"})
    (row,) = evaluate("resume/Fragile-v0", ["random"], limit=4, out=tmp_path)["policies"]
    assert row["errors"] == 2
    BROKEN.clear()
    begun.clear()
    (row,) = evaluate("resume/Fragile-v0", ["random"], limit=4, out=tmp_path)["policies"]
    assert row["errors"] == 0 and len(begun) == 4  # two tasks, sampled and greedy


def test_the_command_tells_and_fails_by_its_gates(suite, tmp_path):
    def run(*gates):
        words = ["evaluate", suite, "--policy", "expert", "--policy", "random", "--limit", "2", "--json"]
        return CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), *gates])

    done = run("--gate", "success >= baseline - 0.02", "--gate", "turns <= 99")
    assert done.exit_code == 1 and "gate failed: success >= baseline - 0.02: random has 0" in done.stderr
    result = json.loads(done.stdout)
    assert [gate["passed"] for gate in result["gates"]] == [False, True]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    assert run("--gate", "turns <= 99").exit_code == 0
    assert run("--gate", "turns =< 99").exit_code == 2
    assert run("--seed", "4").exit_code == 2
    shown = CliRunner().invoke(app, ["evaluate", suite, "--policy", "expert", "--policy", "random",
                                     "--limit", "2", "--samples", "2", "--gate", "turns <= 99"])  # fmt: skip
    assert shown.exit_code == 0
    for said in ("pass@2", "McNemar", "Gates", "passed", "recovered after an error", "by tool"):
        assert said in shown.stdout
