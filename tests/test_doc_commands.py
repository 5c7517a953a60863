"""Every command and every file of settings that README.md and docs/ show, against the real command line and
the real config; nothing is run.

A document gives a file its name in the first line of a block: ``# my.yaml``, ``# my_desk.py``.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_layers import ROOT

from opd_agents import cli
from opd_agents.config import load_config, merge, method_text
from opd_agents.envs import list_envs
from opd_agents.envs.adapters.install import PACKAGES
from opd_agents.errors import ConfigError
from opd_agents.evaluation import load_suite
from opd_agents.evaluation.suites import Suite
from opd_agents.runs import RunFolder
from opd_agents.starting import check_inputs, load_session
from opd_agents.teachers.local import LocalTeacher

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"(?:#|\{#-?) (?P<name>[\w./-]+\.(?:yaml|py|jinja|jsonl))\b")
LAUNCHERS = ("torchrun", "accelerate")
# A run that a block of settings is added to, where it is not a whole one.
BASE = {
    "name": "x", "method": "gkd", "student": {"model": "s"}, "teacher": {"model": "t"},
    "environments": [{"id": "opd_agents/OrderDesk-v0"}],
}  # fmt: skip


def blocks(document: Path, *languages: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return [body for language, body in BLOCK.findall(text) if language in languages]


def named(document: Path) -> dict[str, str]:
    """The files that a document shows, by name."""
    matches = [(NAMED.match(body), body) for body in blocks(document, "yaml", "python", "jinja")]
    return {match["name"]: body for match, body in matches if match}


def commands(document: Path) -> Iterator[list[str]]:
    """The words of each command of the bash blocks, those of a pipe apart."""
    for body in blocks(document, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars="|;&>")
            words.whitespace_split = True
            command: list[str] = []
            for word in words:
                if not set(word) <= set("|;&"):
                    command.append(word)
                    continue
                yield command
                command = []
            if command:
                yield command


SHOWN = [
    pytest.param(document, command, id=f"{document.stem}: {shlex.join(command)}")
    for document in DOCUMENTS
    for command in commands(document)
]


@cache
def group() -> Any:
    """The command line, whose commands return their arguments instead of doing anything."""
    made = typer.main.get_command(cli.app)
    answer_with_arguments(made)
    return made


def answer_with_arguments(made: Any) -> None:
    made.callback = None
    for name, command in made.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            answer_with_arguments(command)
        else:
            command.callback = lambda _name=name, **given: (_name, given)


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and what it is given. Raises click's errors of usage."""
    return group().main(arguments, "opd-agents", standalone_mode=False)


def own_arguments(command: list[str]) -> list[str] | None:
    """Those of opd-agents, also behind a launcher or ``python -m``; None for another program."""
    while "=" in command[0] and command[0].partition("=")[0].isupper():  # a variable of the environment
        command = command[1:]
    if command[0] == "opd-agents":
        return command[1:]
    if "opd_agents" in command and command[0] in (*LAUNCHERS, "python"):
        return command[command.index("opd_agents") + 1 :]
    return None


@pytest.mark.parametrize(("document", "command"), SHOWN)
def test_a_command_is_one_that_there_is(
    document: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # commands are given in a checkout, or in a copy of its examples
    for place in (ROOT / "examples", ROOT / "configs", ROOT / "benchmarks", *(ROOT / "examples").iterdir()):
        (tmp_path / place.name).symlink_to(place)
    for name, text in named(document).items():
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    arguments = own_arguments(command)
    if arguments is None:
        check_other(command)
        return
    if "--help" in arguments:
        arguments.remove("--help")
    imported = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--import"]
    for module in imported:
        assert Path(module).is_file(), f"no file {module}"
    name, given = parsed(arguments) if arguments else ("", {})
    known = {*list_envs(), *ids_registered(document)}
    if name == "train":
        config = load_config(given["config"], *given["overrides"] or ())
        used = [e.id for run in (config, *config.stages.values()) for e in run.environments]
        assert set(used) <= known
    elif name == "evaluate" and given["suite"] not in known:
        load_suite(given["suite"])
    elif name == "envs" and given["env_id"] == "install":
        assert given["benchmark"] in PACKAGES
    elif name == "rollout" and given["explain"]:
        subject = given["subject"]
        assert subject.startswith("runs/") or load_config(subject, *given["overrides"] or ())
    elif name == "rollout":
        assert given["subject"] in known
    elif name == "envs" and given["env_id"]:
        assert given["env_id"] in known
    elif name == "methods" and given["name"]:
        method_text(given["name"])


def ids_registered(document: Path) -> set[str]:
    """The environments that a document's own files, and those of examples/, register."""
    texts = [*named(document).values(), *(f.read_text() for f in (ROOT / "examples").glob("*.py"))]
    return {found for text in texts for found in re.findall(r"""register\(\s*["']([^"']+)["']""", text)}


def check_other(command: list[str]) -> None:
    if command[0] == "make":
        targets = [word for word in command[1:] if "=" not in word]
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    if command[0] == "python" and command[1].endswith(".py"):
        assert Path(command[1]).is_file() or (ROOT / command[1]).is_file(), f"no file {command[1]}"


SETTINGS = [
    pytest.param(document, body, id=f"{document.stem}: {body.splitlines()[0]}")
    for document in DOCUMENTS
    for body in blocks(document, "yaml")
]


@pytest.mark.parametrize(("document", "body"), SETTINGS)
def test_settings_are_of_a_run_or_of_a_suite(document: Path, body: str) -> None:
    settings = yaml.safe_load(body)
    of_a_run = {"student", "method", "trainer", "rollout", "chat", "loss"}
    if "limits" in settings or not settings.keys() & of_a_run:
        assert Suite.model_validate({"name": "x"} | settings).environments
        return
    try:
        config = load_config(settings)
    except ConfigError:
        config = load_config(merge(BASE, settings))
    assert config.model_fields_set >= settings.keys() - {"stages"}  # no key was passed over


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_python_compiles(document: Path) -> None:
    assert all(compile(body, str(document), "exec").co_code for body in blocks(document, "python"))


def test_the_tiny_models_of_the_examples_are_two_that_a_run_takes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "examples" / "tiny_models.py", tmp_path], check=True)
    config = load_config("hf_local", f"student.model={tmp_path}/student", f"teacher.model={tmp_path}/teacher")
    check_inputs(config)
    folder = RunFolder(tmp_path / "run", config.model_dump(mode="json"), resume=False)
    session = load_session(config, folder)
    assert isinstance(session.teacher, LocalTeacher)
    rows = {len(m.get_input_embeddings().weight) for m in (session.model, session.teacher.model)}
    assert rows == {608, 640} and len(session.tokenizer) < 608


def test_commands_and_settings_that_do_not_exist_are_found(tmp_path: Path) -> None:
    """Of the checks above."""
    assert len(SHOWN) > 10 and any(own_arguments(p.values[1]) is None for p in SHOWN)
    for wrong, message in (
        (["trian", "x"], "No such command 'trian'"),
        (["train", "x", "--seed", "3"], "No such option: --seed"),
        (["export", "runs/x"], "Missing .*to"),
    ):
        with pytest.raises(Exception, match=message):  # click's, of which typer may bring its own copy
            parsed(wrong)
    assert own_arguments(["torchrun", "--nproc-per-node", "2", "-m", "opd_agents", "train"]) == ["train"]
    document = tmp_path / "x.md"
    document.write_text("```bash\nA=1 opd-agents train x.yaml \\\n  a=1 | tee log; make test  # so\n```\n")
    assert list(commands(document)) == [
        ["A=1", "opd-agents", "train", "x.yaml", "a=1"], ["tee", "log"], ["make", "test"],
    ]  # fmt: skip
