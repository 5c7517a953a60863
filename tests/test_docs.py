"""The documents against the code: what README.md and docs/ show is run or compared."""

import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from test_layers import LAYERS, ROOT, SOURCES, part

from opd_agents.config import base, list_methods, loss, sections, teachers, weights

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)#]+)\)")


def shown(language: str) -> list[str]:
    """The code blocks of a language in README.md."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_environment_of_the_readme_works_as_shown(tmp_path: Path) -> None:
    (tmp_path / "my_desk.py").write_text(shown("python")[0], encoding="utf-8")
    commands = [line for block in shown("bash") for line in block.splitlines() if "my_desk" in line]
    assert len(commands) >= 3  # rollout, check_agent_env, evaluate
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        start = [sys.executable, "-m", "opd_agents"] if program == "opd-agents" else [sys.executable]
        done = subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_table_of_layers_is_the_one_that_is_enforced() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.MULTILINE)
    written = {int(level): set(re.findall(r"`(\w+)`", names)) for level, names in rows}
    present = {name for name in map(part, SOURCES) if not name.startswith("__")}
    assert written == {level: present & set(names) for level, names in enumerate(LAYERS)}


def test_what_documents_take_from_the_presets_and_the_config_is_up_to_date() -> None:
    program = runpy.run_path(str(ROOT / "docs" / "build_methods.py"))
    for document in program["DOCUMENTS"]:
        text = document.read_text(encoding="utf-8")
        assert program["build"](text) == text, f"{document.name}: run `python docs/build_methods.py`"


def test_the_page_of_methods_has_every_preset_and_every_key_of_the_loss() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"\n#### {row['name']}\n" in page for row in list_methods())
    named = vars(loss) | vars(weights) | vars(base) | vars(teachers)
    found = [one for one in named.values() if inspect.isclass(one) and issubclass(one, base.Section)]
    found += [sections.Rollout, sections.Demonstrations]
    keys = {key for one in found for key in one.model_fields}
    assert len(found) > 25 and not [key for key in keys - {"kind"} if f"`{key}`" not in page]


def test_links_between_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in LINK.findall(document.read_text(encoding="utf-8")):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"
