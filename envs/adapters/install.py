"""Installing benchmarks whose packages ask for far more than their tasks need."""

from __future__ import annotations

import subprocess
import sys

from opd_agents.errors import UnknownName, UserError

# Arguments of pip, one run each. bfcl-eval asks for 6 GB of libraries; its simulators need one small one.
PACKAGES = {"bfcl": (("mpmath>=1.3,<2",), ("--no-deps", "bfcl-eval==2026.3.23"))}


def install(name: str) -> None:
    """Install a benchmark into the running Python with pip, whose output is shown. Raises UserError."""
    if name not in PACKAGES:
        raise UnknownName("benchmark to install", name, PACKAGES, "opd-agents envs --help")
    for arguments in PACKAGES[name]:
        done = subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=False)
        if done.returncode != 0:
            raise UserError(
                f"pip install {' '.join(arguments)} failed (exit code {done.returncode}); see above. "
                f"Without pip in {sys.executable}, run this with the installer of that Python."
            )
