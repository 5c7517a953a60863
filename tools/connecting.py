"""A connection that is checked before it is made, and that has one deadline for all that is read from it."""

from __future__ import annotations

import functools
import ipaddress
import queue
import socket
import ssl
import threading
import time
from typing import Any

_HERE = ("127.0.0.1", "::1")


class _Timed:
    """A server may send a byte now and then for ever, which no time-out of a single read would end."""

    deadline: float

    def recv_into(self: Any, *arguments: Any) -> int:
        self.settimeout(remaining(self.deadline))
        return super().recv_into(*arguments)  # type: ignore[misc]


class _PlainSocket(_Timed, socket.socket):
    pass


class _SecureSocket(_Timed, ssl.SSLSocket):
    pass


def connect(host: str, port: int, secure: bool, deadline: float) -> socket.socket:
    """A connection to ``host``, of which all reads end by ``deadline``, a time of ``time.monotonic``.

    Raises OSError, TimeoutError among them, and PermissionError for a name that leads to this machine or into
    a private network; an address, and localhost, may lead there.
    """
    problems: list[OSError] = []
    for address in _addresses(host, deadline):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        stream = _PlainSocket(family, socket.SOCK_STREAM)
        stream.deadline = deadline
        try:
            stream.settimeout(remaining(deadline))
            stream.connect((address, port))
            return _secured(stream, host) if secure else stream
        except (OSError, ValueError) as error:
            stream.close()
            problems.append(error if isinstance(error, OSError) else OSError(str(error)))
    raise problems[0] if problems else OSError(f"there is no address of {host}")


def remaining(deadline: float) -> float:
    """Seconds until ``deadline``. Raises TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _addresses(host: str, deadline: float) -> list[str]:
    """The addresses of ``host`` that a connection may go to."""
    if host == "localhost":
        return list(_HERE)
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass  # a name
    found = _looked_up(host, remaining(deadline))
    allowed = [address for address in found if _is_outside(address)]
    if found and not allowed:
        raise PermissionError(0, "its name leads to this machine or into a private network")
    return allowed


def _looked_up(host: str, timeout: float) -> list[str]:
    """In a thread of its own, since the system's look-up takes no time-out."""
    answer: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answer.put([str(entry[4][0]) for entry in entries])
        except (OSError, UnicodeError) as error:
            answer.put(error if isinstance(error, OSError) else OSError(str(error)))

    threading.Thread(target=look_up, name="opd-agents look-up", daemon=True).start()
    try:
        found = answer.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, OSError):
        raise found
    return found


def _is_outside(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_global


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _SecureSocket
    return context


def _secured(stream: socket.socket, host: str) -> socket.socket:
    secure = _tls().wrap_socket(stream, server_hostname=host)
    secure.deadline = stream.deadline  # type: ignore[attr-defined]
    return secure
