"""The command line: help, exit codes, messages, clean JSON."""

import errno
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from opd_agents import cli, cli_rollout
from opd_agents.config import list_methods
from opd_agents.errors import AlignmentError, UserError

COMMANDS = [
    *("quickstart", "train", "evaluate", "rollout", "envs", "methods", "report", "scaling", "export"),
    *("import-messages", "export-messages", "sandbox", "watch"),
]
DESK = "opd_agents/OrderDesk-v0"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "OPD_DEBUG": "0"})


def refused(*arguments: str) -> str:
    """The message of a command that the user got wrong, without line breaks."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: opd-agents {' '.join(command)}" in result.stdout


def test_help_lists_the_commands() -> None:
    assert all(command in run("--help").stdout for command in COMMANDS)


def test_unknown_environment_shows_the_nearest_and_the_command_that_lists_them() -> None:
    message = refused("envs", "opd_agents/OrderDsk-v0")
    assert DESK in message
    assert "`opd-agents envs`" in message


def test_unknown_method_shows_the_nearest_and_the_command_that_lists_them() -> None:
    message = refused("methods", "gkdd")
    assert "'gkd'" in message
    assert "`opd-agents methods`" in message


def test_unknown_key_shows_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        f"name: x\nmethod: sft\nstudent: {{model: m}}\nenvironments: [{{id: {DESK}}}]\ntrainer: {{step: 5}}\n"
    )
    message = refused("train", str(file))
    assert "`trainer.step`" in message
    assert "`trainer.steps`" in message or "`steps`" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "orderdesk_opdd"], "orderdesk_opd"),
        (["train", "orderdesk_opd", "trainer.steps"], "key=value"),
        (["train", "orderdesk_opd", "trainer.steps=many"], "trainer.steps"),
        (["train", "orderdesk_opd", "--seeds", "0..4"], "0-4"),
        (["train", "orderdesk_opd", "--seeds", "4-0"], "smaller number first"),
        (["evaluate", "orderdsk", "--policy", "expert"], "orderdesk"),
        (["evaluate", DESK, "--policy", "exprt"], "expert"),
        (["evaluate", DESK], "--policy"),
        (["rollout", "opd_agents/OrderDsk-v0", "--policy", "expert"], DESK),
        (["report", "no/such/run"], "no/such/run"),
        (["--import", "no_such_file.py", "envs"], "no_such_file.py"),
        (["evalute"], "evaluate"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(arguments: list[str], part: str) -> None:
    assert part in refused(*arguments)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("look at x"), 2, "error: look at x"),
        (AlignmentError("ids [1, 2] differ"), 1, "error: ids [1, 2] differ"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "The disk is full"),
        (KeyboardInterrupt("Stopped after step 3; go on with --resume."), 1, "go on with --resume"),
        (KeyboardInterrupt(), 1, "Interrupted"),
    ],
)
def test_errors_become_one_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("opd_agents.config.list_methods", fail)
    result = run("methods")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("opd_agents.config.list_methods", fail)
    assert isinstance(run("methods").exception, ZeroDivisionError)


def test_json_of_envs_and_methods() -> None:
    envs = json.loads(run("envs", "--json").stdout)
    assert DESK in [row["id"] for row in envs]
    assert all(
        set(row) >= {"id", "family", "fork_mode", "tools", "splits", "extra", "licence"} for row in envs
    )
    assert json.loads(run("envs", DESK, "--json").stdout) == [row for row in envs if row["id"] == DESK]
    methods = json.loads(run("methods", "--json").stdout)
    said = {"name", "title", "paper", "family", "signal", "formula", "cost", "verified"}
    assert all(set(row) == said | {"config"} for row in methods)
    assert [row["name"] for row in json.loads(run("methods", "gkd", "--json").stdout)] == ["gkd"]


def test_methods_lists_all_by_family() -> None:
    lines = run("methods").stdout.splitlines()
    assert lines[0].split() == ["name", "title", "paper"]
    families = [line.strip() for line in lines[1:] if line[0] != " "]
    assert families == sorted({row["family"] for row in list_methods()})
    names = {line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")}
    assert names == {row["name"] for row in list_methods()}


@pytest.mark.parametrize("name", ["gkd", "hdpo"])
def test_methods_shows_what_is_known_of_one_and_its_preset(name: str) -> None:
    shown = run("methods", name).stdout
    (row,) = (row for row in list_methods() if row["name"] == name)
    told, _, settings = shown.partition(f"\n# what `method: {name}` stands for")
    assert " ".join(row["formula"].split()) in " ".join(told.replace("formula ", "").split())
    assert yaml.safe_load(settings.partition("\n")[2]) == row["config"]


def test_import_loads_an_environment_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my_desk.py"
    file.write_text(
        "import opd_agents as opd\n"
        "opd.register('me/MyDesk-v0', 'opd_agents.envs.orderdesk:OrderDesk')\n",
        encoding="utf-8",
    )  # fmt: skip
    assert "me/MyDesk-v0" in run("--import", str(file), "envs").stdout


def test_rollout_shows_and_stores_the_episodes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "episodes.jsonl"
    result = run("rollout", DESK, "--policy", "expert", "--watch", "--episodes", "2", "--out", str(file))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("success") >= 2
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    assert all(turn["action"] in result.stdout for line in lines for turn in line["trajectory"]["turns"])


def test_evaluate_prints_one_json_document(tmp_path: Path) -> None:
    result = run("evaluate", DESK, "--policy", "expert", "--policy", "random", "--limit", "3", "--json")
    assert result.exit_code == 0, result.output
    expert, random = json.loads(result.stdout)["policies"]
    assert (expert["policy"], expert["episodes"], expert["success"]) == ("expert", 3, 1.0)
    assert random["success"] < 1
    low, high = expert["interval"]
    assert 0 < low < high <= 1


@pytest.mark.parametrize(("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("3", [3]), ("0,7,2-3", [0, 7, 2, 3])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert cli._seeds(text) == seeds


def test_train_ends_with_what_was_reached(tmp_path: Path) -> None:
    import tiny
    import yaml

    config = tiny.sft(tmp_path / "run", evaluation={"suite": tiny.SUITE, "limit": 4, "at_start": False})
    config["trainer"] |= {"steps": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(cli.app, ["train", str(tmp_path / "tiny.yaml")])
    assert done.exit_code == 0, done.stderr
    result = json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"]
    said = f"tiny, validation after step 2: success {100 * result['success']:.1f} %"
    assert said in done.stdout and f"{100 * result['success_greedy']:.1f} % greedy" in done.stdout


def test_an_interrupted_rollout_keeps_the_episodes_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "played.jsonl"
    command = ["rollout", DESK, "--policy", "expert", "--episodes", "4", "--out", str(file)]
    assert run(*command).exit_code == 0
    whole = file.read_text().splitlines()
    assert [json.loads(line)["trajectory"]["uid"] for line in whole] == ["0", "1", "2", "3"]
    assert [path.name for path in tmp_path.iterdir()] == ["played.jsonl"]
    shown: list[object] = []

    def interrupt(trajectory: object) -> None:
        shown.append(trajectory)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_rollout, "show_outcome", interrupt)
    file.unlink()
    assert run(*command).exit_code == 1
    kept = (tmp_path / "played.jsonl.part").read_text().splitlines()
    assert len(kept) == 3 and set(kept) < set(whole) and not file.exists()
