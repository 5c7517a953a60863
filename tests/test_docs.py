"""The documents against the code: what README.md and docs/ show is run or compared."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from test_layers import LAYERS, ROOT, SOURCES, part

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


def test_links_between_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in LINK.findall(document.read_text(encoding="utf-8")):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"
