"""This interpreter, its standard library and the shared libraries it needs, as a sandbox has them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from opd_agents.errors import UserError

PROGRAMS = ("sh", "env")  # what Python's shell=True and a script's first line ask for
NOT_NEEDED = re.compile(r"(_tkinter|_test|_ctypes_test|_xx|xx).*\.so")  # modules, with libraries of their own
# There is one folder of libraries, whatever the loader calls it.
LINKS = {
    "bin": "usr/bin",
    "lib": "usr/lib",
    "lib64": "usr/lib",
    "usr/lib64": "lib",
    "usr/bin/python": "python3",
}


@functools.cache
def layout() -> dict[str, Path]:
    """The place of each file or folder in a sandbox, and where it lies here.

    The places are fixed ones, so that no traceback tells where Python lies on this machine. Raises UserError
    if the libraries cannot be found out.
    """
    short = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    python = Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]
    library = Path(sysconfig.get_path("stdlib"))
    programs = {name: Path(os.path.realpath(path)) for name in PROGRAMS if (path := shutil.which(name))}
    modules = [path for path in library.glob("lib-dynload/*.so") if not NOT_NEEDED.fullmatch(path.name)]
    libraries = _libraries([python, *programs.values(), *modules])
    return {
        "usr/bin/python3": python,
        f"usr/lib/{short}": library,
        **{f"usr/bin/{name}": path for name, path in programs.items()},
        **{f"usr/lib/{path.name}": Path(os.path.realpath(path)) for path in libraries},
    }


def _libraries(programs: list[Path]) -> list[Path]:
    """The shared libraries that programs need, the loader included, under the names that they ask for."""
    done = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True)
    needed = re.findall(r"(?:=> |^\t)(/\S+) \(0x", done.stdout, flags=re.MULTILINE)
    if not needed:
        said = done.stderr.strip() or done.stdout.strip()
        raise UserError(f"ldd does not say which libraries {programs[0]} needs: {said}")
    return sorted(set(map(Path, needed)))
