"""The programs of benchmarks/: sweeps of tiny runs, and the arms of the rollout benchmark on a small case."""

import csv
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
import yaml
from api_server import ApiServer, Expert
from typer.testing import CliRunner

from opd_agents import cli, envs
from opd_agents.errors import UserError

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import cases
import compute
import correction
import environments
import fuzz
import gpu
import loss
import rollout as benchmark
import step
import sweep
import sweep_results


def by_path(name: str) -> Any:
    """A benchmark whose name another module has in a checkout."""
    path = Path(benchmark.__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


teachers = by_path("teachers")


class Commands:
    """`opd-agents` in this process, which has torch loaded; all but ``broken`` commands are run."""

    def __init__(self, broken: Callable[[Sequence[str]], bool] = lambda arguments: False) -> None:
        self.broken, self.seen = broken, list[str]()

    def __call__(self, arguments: Sequence[str], log: Path) -> str:
        self.seen.append(" ".join(arguments))
        if self.broken(arguments):
            raise OSError("killed")
        done = CliRunner().invoke(cli.app, list(arguments))
        if done.exit_code:
            raise OSError(done.stderr)
        return done.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sweep of two learning rates and two seeds; its config lies beside it."""
    config = tiny.sft(tmp_path / "unused")
    config["trainer"] |= {"steps": 3}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    raw = {
        "name": "rates",
        "output": str(tmp_path / "out"),
        "seeds": [0, 1],
        "runs": {
            "high": {"config": "tiny.yaml"},
            "low": {"config": "tiny.yaml", "set": ["trainer.learning_rate=1e-4"]},
        },
        "evaluate": {"suite": tiny.SUITE, "limit": 3},
        "metrics": ["success", "loss", "total/flops", "succes"],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_sweep_trains_evaluates_and_compares_every_cell(file: Path, tmp_path: Path) -> None:
    loaded, cells = sweep.load_sweep(file)
    first = Commands(broken=lambda words: "evaluate" in words and "low/seed-1" in " ".join(words))
    rows = sweep.run_cells(cells, 1, first)
    assert [(row["label"], row["seed"], row["status"]) for row in rows] == [
        ("high", 0, "done"), ("low", 0, "done"), ("high", 1, "done"), ("low", 1, "failed"),
    ]  # fmt: skip
    assert rows[3]["error"] == "killed"
    assert rows[0]["values"]["loss"] < rows[1]["values"]["loss"]
    steps = [json.loads(line) for line in (cells[0].folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["values"]["total/flops"] == steps[-1]["total/flops"] > 0

    again = Commands()
    rows = sweep.run_cells(cells, 1, again)
    assert [row["status"] for row in rows] == ["skipped", "skipped", "skipped", "done"]
    assert len(again.seen) == 2 and all("low/seed-1" in command for command in again.seen)
    assert again.seen[0].endswith("--resume")
    assert [row["status"] for row in sweep.run_cells(cells, 1, Commands())] == ["skipped"] * 4

    view = sweep_results.write(loaded.folder, loaded.name, loaded.metrics, rows)
    assert "'succes' (did you mean 'success'?)" in str(view.caption)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    flops = [row["values"]["total/flops"] for row in rows if row["label"] == "low"]
    assert results["labels"]["low"]["total/flops"]["mean"] == pytest.approx(sum(flops) / 2)
    assert results["labels"]["low"]["succes"] == {"n": 0, "mean": None, "half": None}
    with (tmp_path / "out" / "results.csv").open() as table:
        assert [row["label"] for row in csv.DictReader(table)] == ["high", "low", "high", "low"]
    assert "<svg" in (tmp_path / "out" / "results.svg").read_text()


def test_a_changed_config_is_not_passed_off_as_finished(file: Path) -> None:
    raw = yaml.safe_load(file.read_text()) | {"seeds": [0]}
    raw["runs"].pop("low")
    file.write_text(yaml.safe_dump(raw))
    _, cells = sweep.load_sweep(file)
    assert [row["status"] for row in sweep.run_cells(cells, 1, Commands())] == ["done"]
    raw["evaluate"]["limit"] = 2
    file.write_text(yaml.safe_dump(raw))
    assert [row["status"] for row in sweep.run_cells(sweep.load_sweep(file)[1], 1, Commands())] == ["done"]
    raw["runs"]["high"]["set"] = ["trainer.steps=4"]
    file.write_text(yaml.safe_dump(raw))
    (row,) = sweep.run_cells(sweep.load_sweep(file)[1], 1, Commands())
    assert row["status"] == "failed"
    assert "trainer.steps: 3 -> 4" in row["error"]


def test_a_run_starts_from_the_student_of_another_of_its_seed(file: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    raw["runs"]["low"] |= {"student": "high", "set": ["student.build="]}
    file.write_text(yaml.safe_dump(raw))
    _, cells = sweep.load_sweep(file)
    commands = Commands(broken=lambda words: True)
    assert {row["status"] for row in sweep.run_cells(cells, 2, commands)} == {"failed"}
    place = {
        words.split("output=")[1].split()[0]: n for n, words in enumerate(commands.seen) if "output=" in words
    }
    for cell in cells[1::2]:
        start = tmp_path / "out" / "high" / cell.folder.name
        assert cell.config.student.model == str(start)
        assert place[str(start)] < place[str(cell.folder)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": [1, 1]}, "`seeds`: Value error, each seed once"),
        ({"sedes": [1]}, "`sedes`: Extra inputs are not permitted"),
        ({"runs": {"../x": {"config": "tiny.yaml"}}}, "`runs.../x.[key]`"),
        ({"runs": {"a": {"config": "missing.yaml"}}}, "runs.a: No config file missing.yaml"),
        ({"runs": {"a": {"config": "tiny.yaml", "set": ["trainer.step=1"]}}}, "did you mean `steps`"),
        ({"runs": {"a": {"config": "tiny.yaml", "student": "b"}}}, "no run 'b' stands above it"),
        ({"evaluate": {"suite": "orderdek"}}, "Unknown suite 'orderdek'"),
    ],
)
def test_mistakes_in_a_sweep_file_are_told_before_anything_runs(
    file: Path, change: dict[str, Any], told: str
) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(UserError) as caught:
        sweep.load_sweep(file)
    assert told in str(caught.value)


def test_the_program_says_what_is_wrong_and_exits_with_2(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(typer.Exit) as caught:
        sweep.main(tmp_path / "none.yaml")
    assert caught.value.exit_code == 2
    assert "error: No sweep file" in capsys.readouterr().err


def test_a_failing_command_is_told_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="error: Unknown method 'gkdd'"):
        sweep.execute(["methods", "gkdd"], tmp_path / "a" / "log")
    assert json.loads(sweep.execute(["methods", "gkd", "--json"], tmp_path / "log"))[0]["name"] == "gkd"


def test_all_arms_of_the_rollout_benchmark_play_the_same_and_one_feeds_each_token_once() -> None:
    result = benchmark.measure([2], [2, 4], 1)  # asserts that all arms give the same tokens
    kept, fed, trl = ([row for row in result["rows"] if row["arm"] == arm] for arm in benchmark.ARMS)
    assert all(a["fed"] < b["fed"] < c["fed"] for a, b, c in zip(kept, fed, trl, strict=True))
    assert kept[0]["slope"] < 1
    assert "| re-prefilled |" in benchmark.page(result) and "| TRL " in benchmark.page(result)


def test_both_arms_of_the_step_benchmark_train_on_the_same_loss() -> None:
    # it asserts equal losses and tokens; in this process, which has imported all that takes long
    result = step.measure(episodes=2, turns=2, repeats=1, threads=1, run=step.worker)
    assert result["action tokens"] == 2 * 2 * 16 and result["loss"] > 1
    assert all(seconds["median"] > 0 for seconds in result["seconds"].values())
    assert "| opd-agents " in step.page(result)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_all_contenders_of_the_loss_benchmark_have_the_same_loss_and_gradients(beta: float) -> None:
    case, names = (
        loss.Case(vocab=50, action_share=0.25, beta=beta, hidden=8, positions=16, threads=1),
        loss.installed(),
    )
    rows = loss.measure(case, names, 2, start=loss.calls)  # it asserts it
    assert [row["name"] for row in rows] == names
    assert {"trl_gkd", "trl_chunked", "naive", "opd_agents"} <= set(names)
    assert all(row["seconds"] > 0 and row["peak_mb"] > 0 for row in rows)


def test_the_loss_benchmark_tells_a_contender_with_another_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loss, "CONTENDERS", {**loss.CONTENDERS, "liger": lambda beta: loss.naive(beta + 0.01)}
    )
    case = loss.Case(vocab=50, action_share=1.0, beta=0.5, hidden=8, positions=16, threads=1)
    with pytest.raises(AssertionError, match="liger: loss is off by"):
        loss.measure(case, ["naive", "liger"], 1, start=loss.calls)


def test_the_loss_benchmark_runs_what_is_installed_in_processes_and_prints_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = dict.fromkeys(("trl_gkd", "trl_chunked", "liger"), "no_such_package")
    monkeypatch.setattr(loss, "PACKAGES", missing)
    options = "--vocab 50 --hidden 8 --positions 16 --action-share 0.25 --beta 1 --repeats 1 --json --out"
    app = typer.Typer()
    app.command()(loss.main)
    app([*options.split(), str(tmp_path)], standalone_mode=False)
    printed = capsys.readouterr()
    assert "liger is left out: no_such_package is not installed" in printed.err
    rows = json.loads(printed.out)["results"]
    assert [row["name"] for row in rows] == ["naive", "opd_agents"]
    assert rows[0]["seconds"] > 0
    assert " 50 8 25% 1 | opd_agents | " in (tmp_path / "loss.md").read_text()


def test_a_step_of_the_gpu_benchmark_on_a_tiny_model() -> None:
    result = gpu.measure(gpu.TINY, episodes=2, tokens=64, micro_batch_tokens=64, repeats=1, peak=0.5)
    whole = result["rows"][-1]
    assert whole["tflop"] == pytest.approx(sum(row["tflop"] for row in result["rows"][:-1]))
    assert whole["utilisation"] == pytest.approx(whole["tflop_per_second"] / 0.5)
    assert result["action tokens"] == 2 * 8 * 2 and "| update " in gpu.page(result)


WRONG = '''
import time

import opd_agents as opd
from opd_agents.envs import AgentEnv


class Wrong(AgentEnv):
    """Raises, hangs, ends the process or tells the time, when it is told to do so."""

    split_sizes = {"train": 3}

    def __init__(self, how: str = "") -> None:
        super().__init__([self.say])
        self.how, self.state = how, {}

    def begin(self, task):
        return "Go on."

    def say(self, word: str) -> str:
        """Say a word."""
        match self.how:
            case "raise":
                return str([][0])
            case "hang":
                time.sleep(60)
            case "exit":
                __import__("os")._exit(3)
            case "clock":
                return str(time.monotonic())
        return word.encode(errors="replace").decode()

    def success(self):
        return False


opd.register("wrong/Wrong-v0", "wrong_env:Wrong")
'''


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", "IndexError: list index out of range; it must be answered"),
        ("hang", "no answer: Timeout (0:00:0"),
        ("exit", "exit 3"),
        ("clock", "answered differently"),
        ("", None),
    ],
)
def test_the_fuzz_benchmark_tells_what_fails(how: str, told: str | None, tmp_path: Path) -> None:
    plugin = tmp_path / "wrong_env.py"
    plugin.write_text(WRONG)
    case = cases.Case("wrong/Wrong-v0", {"how": how} if how else {})
    row = fuzz.fresh_process(case, [str(plugin)], actions=60, seconds=30, silence=4 if how == "hang" else 60)
    if told is None:
        assert row["actions"] == 60 == row["fine"] + row["tool_error"] + row["parse_error"]
    else:
        assert told in row["problem"]
        assert f"Wrong: {row['problem']}" in fuzz.page({"rows": {"Wrong": row}})


def test_the_fuzz_benchmark_keeps_the_rows_of_the_last_run(tmp_path: Path) -> None:
    for name in ("OrderDesk", "LockChain"):
        fuzz.main([name], actions=40, seconds=30, plugins=None, as_json=True, out=tmp_path, work=None)
    rows = json.loads((tmp_path / "fuzz.json").read_text())["rows"]
    assert {name: row["actions"] for name, row in rows.items()} == {"OrderDesk": 40, "LockChain": 40}
    assert (tmp_path / "fuzz.md").read_text().count("all answered") == 2


def test_every_registered_environment_is_benchmarked(tmp_path: Path) -> None:
    known = cases.chosen([], tmp_path)
    ids = {case.id for case in known.values()}
    assert all("/MiniWoB." in id for id in set(envs.list_envs()) - ids)
    assert sum("/MiniWoB." in id for id in ids) == 8 and ids <= set(envs.list_envs())
    with pytest.raises(UserError, match="'OrderDesk'"):
        cases.chosen(["OrderDsk"], tmp_path)


def test_the_environments_benchmark_sends_all_arms_the_same(tmp_path: Path) -> None:
    def run(case: cases.Case, arm: str, actions: environments.Episodes, seconds: float) -> Any:
        if arm == "AsyncVectorEnv":  # forks: not in this process, which has threads
            arm = "SyncVectorEnv"
        return environments.in_process(case, arm, actions, seconds)

    known = cases.chosen(["OrderDesk", "GymText", "Shop"], tmp_path)
    known["Shop"] = cases.Case("opd_agents/ShopText-v0", {"level": "nowhere"})  # fails
    result = environments.measure(known, 1, 0.01, run)
    assert [(row["name"], row["arm"]) for row in result["rows"]] == [
        ("OrderDesk", "ours"), ("OrderDesk", "SyncVectorEnv"), ("OrderDesk", "AsyncVectorEnv"),
        ("GymText", "ours"), ("GymText", "raw"),
    ]  # fmt: skip
    assert all(row["steps"]["median"] > 0 for row in result["rows"])
    assert "nowhere" in result["left_out"]["Shop"]
    last = {"rows": [{"name": "GymText"}, {"name": "FileDesk"}], "left_out": {}}
    rows = environments.merged(last, result, list(known))["rows"]
    assert [row["name"] for row in rows] == ["FileDesk", *["GymText"] * 2, *["OrderDesk"] * 3]
    assert "| GymText " in environments.page(result) and "Left out: Shop: " in environments.page(result)


def test_the_teachers_benchmark_scores_the_same_in_all_arms(tmp_path: Path) -> None:
    shape = teachers.SHAPE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    bench = teachers.Bench(tmp_path, episodes=2, repeats=1, shape=shape)
    with ApiServer(Expert(teachers.DESK, {"level": "easy"}, tasks=2)) as server:
        rows = {"scoring": teachers.scoring(bench), "api": teachers.api(bench, server.url)}
    rows |= {"tokens": teachers.tokens(bench), "step": teachers.step(bench)}
    page = teachers.page({name: bench.facts | {"rows": part} for name, part in rows.items()})
    assert page.count("| local ") == 2 and page.count("| cached ") == 2 and "| local, played " in page
    assert all(row["tokens_per_core_second"]["median"] > 0 for row in rows["scoring"])
    assert rows["api"][0]["requests"] > 2 and rows["api"][-1]["arm"] == "stored"
    times = {(row["level"], row["arm"]): row["times"] for row in rows["tokens"]}
    for level in ("easy", "hard"):
        once, anew, api = (times[level, row["arm"]] for row in rows["tokens"][:3])
        assert once["min"] == once["max"] == 1 < anew["median"] <= api["median"]
    shares = {row["arm"]: row["share"]["median"] for row in rows["step"]}
    assert list(shares) == ["local, played", "local, stored", "cached, stored"]
    assert all(0 < share < 1 for share in shares.values())


def test_the_correction_benchmark_audits_every_proposal_and_goes_back_in_all_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(correction, "PROOFS", {"1, 2": [1, 2]})
    monkeypatch.setattr(correction, "AUDIT", {"share": 1.0, "rollouts": 1})
    monkeypatch.setattr(correction, "CASES", correction.CASES[:2])
    rows = {"repairs": correction.repairs(8), "returning": correction.returning(1)}
    told = [(row["arm"], row["proof"]) for row in rows["repairs"]]
    teachers = ("shipped teacher", "scripted expert", "random calls")
    assert told == [(name, proof) for name in teachers for proof in ("none", "1, 2")]
    for every, proved in zip(rows["repairs"][::2], rows["repairs"][1::2], strict=True):
        assert every["accepted"] == proved["proposed"] > 0
        assert 3 * 1 * proved["proposed"] <= proved["rollouts"] <= 3 * 2 * proved["proposed"]
    assert all(row["ratio"]["median"] > 0 for row in rows["returning"])
    assert [row["depth"] for row in rows["returning"]] == [*correction.DEPTHS] * 2
    page = correction.page({name: {"rows": part} for name, part in rows.items()})
    assert "| random calls " in page and "| ShopText " in page


COMPUTE = Path(benchmark.__file__).with_name("compute.yaml")


@pytest.mark.parametrize("study", compute.CLAIMS)
def test_the_claims_of_a_study_are_about_its_runs(study: str) -> None:
    given, cells = sweep.load_sweep(COMPUTE.with_name(f"{study}.yaml"))
    trained = {label for label, one in given.runs.items() if one.student is not None}
    assert {arm for a, b, _, _ in compute.CLAIMS[study].values() for arm in (a, b)} <= trained
    models = {
        cell.config.teacher.model for cell in cells if cell.config.teacher and cell.config.teacher.model
    }
    assert {Path(model).name for model in models} <= compute.TEACHERS.keys()


def test_tuning_tries_three_rates_of_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(compute, "call", lambda *command: told.append(command))
    with pytest.raises(UserError, match="no run folder"):  # none was trained here
        compute.tune(COMPUTE, 1)
    given, _ = sweep.load_sweep(COMPUTE)
    tuned, cells = sweep.load_sweep(Path(str(told[0][1])))
    assert len(cells) == len(tuned.runs) == 1 + 3 * (len(given.runs) - 1)
    rates = {cell.label: cell.config.trainer.learning_rate for cell in cells if cell.after}
    assert all(label.endswith(f"_{rate}") for label, rate in rates.items())


def test_compute_to_a_level_is_interpolated_and_what_nobody_reached_decides_nothing() -> None:
    rises = [(0.0, 0.3), (10.0, 0.5), (20.0, 0.9)]
    assert [compute.spent(rises, level) for level in (0.4, 0.7)] == pytest.approx([5.0, 15.0])
    assert compute.spent(rises, 0.95) is None and math.isnan(compute.spent(rises, 0.3) or 0.0)
    quick = {seed: [(0.0, 0.3), (10.0 + seed, 0.7)] for seed in range(5)}
    slow = {seed: [(0.0, 0.3), (200.0 + seed, 0.7)] for seed in range(5)}
    never = {seed: [(0.0, 0.3), (100.0, 0.5)] for seed in range(5)}
    curves = {"quick": quick, "slow": slow, "never": never}
    ends = {
        pair: compute.claim(curves, *pair, 1.0, 0.7)["verdict"] for pair in itertools.permutations(curves, 2)
    }
    assert ends["quick", "slow"] == ends["quick", "never"] == "reproduced"
    assert ends["slow", "quick"] == ends["never", "quick"] == "contradicted"
    assert ends["never", "slow"] == "undecided"  # 100 is all that it spent
    assert compute.claim(curves, "quick", "never", 0.1, 0.7)["verdict"] == "undecided"
    assert compute.claim(curves, "never", "quick", 1.0, 0.4)["reached"] == {"never": 5, "quick": 5}
    found = compute.arm(never, 2e12)
    assert found["70%"]["reached"] == 0 and found["best"]["mean"] == 0.5
    page = compute.page({"arms": {"never": found}, "claims": {}})
    assert "> 0.00 x/ 1.00 (0 of 5)" in page and "> 2.00" in page
    there = compute.arm({seed: [(0.0, 0.8), (5.0, 0.9)] for seed in range(2)}, 2e12)
    assert there["70%"] == {"mean": None, "half": None, "seeds": 0, "reached": 2}
    page = compute.page({"arms": {"there": there}, "claims": {}})
    assert "- (2 of 2)" in page and "80 ± 0" in page
    drawn = compute.plot(curves | {"there": {0: [(0.0, 0.8)]}}, dict.fromkeys([*curves, "there"], 0.7))
    assert drawn.count("#d62728") == 1 + len(never)  # the triangle's own style, and one a seed
