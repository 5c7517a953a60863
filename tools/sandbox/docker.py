"""The Docker sandbox: a container that has nothing, no network, no rights, and a few megabytes of memory.

A container lives as long as the line to it: when the process that holds the line ends, in whatever way, the
daemon closes the container's standard input, the program inside ends, and the daemon removes the container.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from opd_agents.errors import MissingPart, UserError
from opd_agents.tools.sandbox.base import Limits
from opd_agents.tools.sandbox.owners import LABEL, owner, reap, remove
from opd_agents.tools.sandbox.supervised import WRITABLE, Line, SupervisedSandbox, program

if TYPE_CHECKING:
    import docker

IMAGE = "opd-agents/sandbox:latest"
SPARES = 2  # containers of one kind that wait, started, for who takes them
START_SECONDS = 60.0
NOBODY = 65534
STREAMS = ("stdin", "stdout", "stderr", "stream")


class DockerSandbox(SupervisedSandbox):
    """Commands in a container of its own; see ``open_sandbox``."""

    def __init__(self, image: str, limits: Limits) -> None:
        super().__init__(limits)
        self._image = image
        spares(image, limits)  # says at once what is missing, and starts the first containers

    def _open(self) -> Line:
        return spares(self._image, self.limits).take()


class Spares:
    """Started containers of one image and one set of limits, so that nobody waits for a start."""

    def __init__(self, image: str, limits: Limits) -> None:
        client = connect()
        reap(client)
        check_image(client, image)
        self._image, self._limits = image, limits
        self._ready: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread()
        self._refill()

    def take(self) -> Line:
        """A spare, or a new one where none is ready."""
        line = self._spare() or start(own_client(), self._image, self._limits)
        self._refill()
        return line

    def _spare(self) -> Line | None:
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._ready.get_nowait()
                if line.is_open():
                    return line
                line.close()
        return None

    def _refill(self) -> None:
        with self._lock:
            if not self._thread.is_alive():
                self._thread = threading.Thread(target=self._fill, name="sandbox-spares", daemon=True)
                self._thread.start()

    def _fill(self) -> None:
        with contextlib.suppress(MissingPart):  # whoever takes one then starts it himself, and is told why
            while self._ready.qsize() < SPARES and not self._over.is_set():
                self._ready.put(start(own_client(), self._image, self._limits))

    def stop(self) -> None:
        """End the spares; without it the end of a process in the midst of a start would leave a container."""
        self._over.set()
        self._thread.join(START_SECONDS)
        while line := self._spare():
            line.close()


_POOLS: dict[tuple[str, Limits], Spares] = {}
_LOCK = threading.Lock()
_OWN = threading.local()


def spares(image: str, limits: Limits) -> Spares:
    """The spares of this process. Raises what ``connect`` and ``check_image`` raise, the first time."""
    with _LOCK:
        if (image, limits) not in _POOLS:
            _POOLS[image, limits] = Spares(image, limits)
        return _POOLS[image, limits]


def _after_fork() -> None:  # neither its parent's threads are there, nor are the lines its own
    global _LOCK, _OWN
    _LOCK, _OWN = threading.Lock(), threading.local()
    _POOLS.clear()


@atexit.register
def _stop() -> None:
    for pool in _POOLS.values():
        pool.stop()


os.register_at_fork(after_in_child=_after_fork)


def connect() -> docker.DockerClient:
    """A client of the Docker daemon. Raises MissingPart if none answers."""
    import docker

    try:
        client = docker.from_env(timeout=int(START_SECONDS))
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise MissingPart(
            f"The Docker sandbox needs a Docker daemon, and none answers ({error}). Start it "
            "(`systemctl start docker`, or `dockerd`), or let DOCKER_HOST name another."
        ) from error
    return client


def own_client() -> docker.DockerClient:
    """The client of this thread, made when it first asks. docker's clients cannot be shared: they keep the
    connections of few addresses, and a container's is one, so that a thread may close another's."""
    if "client" not in vars(_OWN):
        _OWN.client = connect()
    client: docker.DockerClient = _OWN.client
    return client


def check_image(client: docker.DockerClient, image: str) -> None:
    """Raise MissingPart for an image that is not there, and UserError for one that cannot be contained."""
    import docker

    try:
        found = client.images.get(image)
    except docker.errors.ImageNotFound as error:
        how = "build it with `opd-agents sandbox build`" if image == IMAGE else "build or load it first"
        raise MissingPart(
            f"The Docker sandbox needs the image {image}, which is not there: {how}."
        ) from error
    if volumes := found.attrs["Config"].get("Volumes"):
        raise UserError(
            f"The image {image} declares volumes ({', '.join(volumes)}), which commands could fill without "
            "limit. Use an image without VOLUME."
        )


def start(client: docker.DockerClient, image: str, limits: Limits) -> Line:
    """The line to a new container. Raises MissingPart if it does not start."""
    import docker

    try:
        container = client.containers.create(image, **options(limits))
        try:
            stream = client.api.attach_socket(str(container.id), params=dict.fromkeys(STREAMS, 1))
            container.start()
        except BaseException:
            remove(container)  # what never started does not end either
            raise
    except (docker.errors.DockerException, OSError) as error:
        raise MissingPart(f"A container of the image {image} does not start: {error}") from error
    connection = stream if isinstance(stream, socket.socket) else stream._sock
    line = ContainerLine(connection, str(container.id))
    try:
        line.answer(START_SECONDS)
    except (OSError, ValueError) as error:
        line.kill()
        raise MissingPart(
            f"A container of the image {image} does not answer ({error}). It needs `python3`, 3.8 or "
            "newer, with the whole standard library."
        ) from error
    return line


def options(limits: Limits) -> dict[str, Any]:
    """What a container may do and have: next to nothing."""
    import docker

    memory = f"{limits.memory_mb}m"
    mount = (
        f"rw,noexec,nosuid,nodev,size={limits.disk_mb}m,nr_inodes=4096,uid={NOBODY},gid={NOBODY},mode=0700"
    )
    return {
        "command": program(limits),
        "entrypoint": [],
        "environment": {},
        "stdin_open": True,
        "auto_remove": True,
        "labels": {LABEL: owner()},
        "hostname": "sandbox",
        "user": f"{NOBODY}:{NOBODY}",
        "working_dir": "/work",
        "network_mode": "none",
        "read_only": True,
        "tmpfs": dict.fromkeys(WRITABLE, mount),
        "mem_limit": memory,
        "memswap_limit": memory,
        "pids_limit": limits.pids,
        "nano_cpus": int(limits.cpus * 1e9),
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "ulimits": [docker.types.Ulimit(name="core", soft=0, hard=0)],
        "healthcheck": {"test": ["NONE"]},
        "log_config": docker.types.LogConfig(type="none"),
    }


class ContainerLine(Line):
    """The line to a container."""

    def __init__(self, connection: socket.socket, container: str) -> None:
        """``container``: its id."""
        super().__init__(connection, _Frames(connection).receive)
        self._container = container

    def kill(self) -> None:
        super().kill()
        # The daemon may take long over a container that hangs: nobody shall wait for that.
        threading.Thread(target=_end, args=(self._container,), name="sandbox-kill", daemon=True).start()


def _end(id: str) -> None:
    import docker

    with contextlib.suppress(docker.errors.NotFound):
        remove(own_client().containers.get(id))


class _Frames:
    """Docker sends standard output and error on one connection, each piece under a header of 8 bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._left = 0  # of the present piece

    def receive(self, length: int) -> bytes:
        while not self._left:
            head = self._exactly(8)
            if len(head) < 8:
                return b""
            stream, size = struct.unpack(">BxxxL", head)
            if stream == 1:
                self._left = size
            else:  # a traceback of the program inside, just before it ends
                raise ConnectionError(self._exactly(size).decode(errors="replace").strip()[-500:])
        data = self._connection.recv(min(length, self._left))
        self._left -= len(data)
        return data

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length and (chunk := self._connection.recv(length - len(data))):
            data += chunk
        return data
