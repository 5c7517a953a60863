"""The image of the Docker sandbox, made without any registry of images."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from opd_agents.errors import MissingPart, UserError
from opd_agents.tools.sandbox.docker import IMAGE, connect
from opd_agents.tools.sandbox.host_python import LINKS, NOT_NEEDED, layout

Source: TypeAlias = Literal["host", "debian"]

# Folders of the standard library that need a screen or a network, or serve its own tests; installed packages.
LEFT_OUT = re.compile(
    r"site-packages|dist-packages|test|tests|idlelib|tkinter|turtledemo|ensurepip|lib2to3|config-\d.*"
)
OPTIMIZED = re.compile(r"\.opt-[12]\.pyc$")
ACCOUNTS = {
    "etc/passwd": b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/work:/bin/sh\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
}
DEBIAN = "bookworm"
DEBIAN_LEFT_OUT = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")


def build(source: Source = "host", name: str = IMAGE) -> str:
    """Build the image ``name`` and return its id.

    ``host``: this interpreter, its standard library and the shared libraries that they need, within seconds;
    ``debian``: Debian's Python in a minimal Debian, by debootstrap, as root, within minutes. The labels
    ``opd-agents.*`` say what is in it; an image that holds just that stays. Raises MissingPart without a
    Docker daemon or debootstrap, and UserError where debootstrap fails.
    """
    client = connect()
    repository, colon, tag = name.partition(":")
    with tempfile.TemporaryFile() as file:
        said = _write_debian(file) if source == "debian" else _write_host(file)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        said |= {"source": source, "digest": f"sha256:{digest}"}
        if labels(name) != said:
            changes = [f"LABEL opd-agents.{key}={json.dumps(value)}" for key, value in said.items()]
            client.api.import_image_from_data(file, repository, tag if colon else "latest", changes)
            # The image that had the name before, unless a container still runs of it.
            client.images.prune(filters={"dangling": True, "label": "opd-agents.digest"})
    return str(client.images.get(name).id)


def labels(name: str = IMAGE) -> dict[str, str] | None:
    """What the labels of an image say is in it; None if there is no such image."""
    import docker

    try:
        found = connect().images.get(name).labels
    except docker.errors.ImageNotFound:
        return None
    mine = {key: value for key, value in found.items() if key.startswith("opd-agents.")}
    return {key.removeprefix("opd-agents."): value for key, value in mine.items()}


def _write_host(file: BinaryIO) -> dict[str, str]:
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, target in sorted(LINKS.items()):
            link = tarfile.TarInfo(path)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for path, content in sorted(ACCOUNTS.items()):
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for place, origin in sorted(layout().items()):
            for path, real in _files(place, origin):
                with real.open("rb") as opened:
                    info = tar.gettarinfo(arcname=path, fileobj=opened)
                    info.uid = info.gid = 0
                    info.uname = info.gname = ""
                    info.mode = 0o755 if info.mode & 0o100 else 0o644
                    tar.addfile(info, opened)
    libraries = sorted(Path(place).name for place in layout() if ".so" in place)
    return {"python": platform.python_version(), "packages": " ".join(libraries)}


def _files(place: str, origin: Path) -> Iterator[tuple[str, Path]]:
    """What goes to ``place``: a file, or the files of a folder without those that are not needed."""
    if origin.is_file():
        yield place, origin
        return
    for folder, folders, names in os.walk(origin):
        folders[:] = sorted(name for name in folders if not LEFT_OUT.fullmatch(name))
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not NOT_NEEDED.fullmatch(name) and not OPTIMIZED.search(name):
                yield f"{place}/{path.relative_to(origin)}", path


def _write_debian(file: BinaryIO) -> dict[str, str]:
    if shutil.which("debootstrap") is None:
        raise MissingPart("`--from debian` needs debootstrap: apt-get install debootstrap.")
    if os.geteuid() != 0:
        raise UserError("`--from debian` runs debootstrap, which must be root: use sudo, or `--from host`.")
    with tempfile.TemporaryDirectory() as root:
        _run("debootstrap", "--variant=minbase", "--include=python3", DEBIAN, root)
        for folder in DEBIAN_LEFT_OUT:
            shutil.rmtree(Path(root, folder), ignore_errors=True)
        python = _run("chroot", root, "python3", "-c", "import platform; print(platform.python_version())")
        packages = _run("dpkg-query", "--root", root, "-W", "-f", "${Package}=${Version} ")
        Path(root, "usr/bin/python").symlink_to("python3")
        subprocess.run(
            ["tar", "--numeric-owner", "--sort=name", "-C", root, "-c", "."], stdout=file, check=True
        )
    return {"python": python, "packages": packages}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise UserError(f"{' '.join(command)} failed ({done.returncode}): {said}")
    return done.stdout.strip()
