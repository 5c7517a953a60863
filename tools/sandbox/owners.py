"""Who started a container, as its label says, and the end of those whose owner is gone.

A container ends with its owner by itself. What is left to remove are those whose owner ended between creating
and starting them, or whose daemon was away.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

LABEL = "opd-agents"


def owner() -> str:
    """The label of this process: the machine's boot, its process namespace, its number and when it began."""
    return f"{_here()} {os.getpid()} {began(os.getpid())}"


def is_gone(label: str) -> bool:
    """Whether the process of a label has ended; False where that cannot be seen from here."""
    place, pid, start = label.rsplit(" ", 2)
    if place != _here():
        return False
    try:
        return began(int(pid)) != int(start)
    except ProcessLookupError:
        return True


def containers(client: docker.DockerClient) -> list[Container]:
    """All containers of opd-agents, of any process, running or not."""
    return client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True)


def reap(client: docker.DockerClient) -> int:
    """Remove the containers whose owner is gone; how many they were."""
    dead = [container for container in containers(client) if is_gone(container.labels[LABEL])]
    for container in dead:
        remove(container)
    return len(dead)


def remove(container: Container) -> None:
    import docker

    try:
        container.remove(force=True, v=True)
    except docker.errors.APIError as error:
        if error.status_code not in (404, 409):  # gone, or going
            raise


def _here() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def began(pid: int) -> int:
    """When a process began, in the kernel's ticks since boot. Raises ProcessLookupError if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    state, *fields = text.rpartition(")")[2].split()
    if state == "Z":  # all that is left of it is an exit code that nobody has read
        raise ProcessLookupError(pid)
    return int(fields[18])
