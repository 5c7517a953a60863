"""HTTP fetch: from the hosts on a list, which are this machine unless others are named, and from no other."""

from __future__ import annotations

import http.client
import re
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic

from opd_agents.errors import UserError
from opd_agents.tools.base import ToolError
from opd_agents.tools.connecting import connect

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_URL = 2_000  # characters
_HOST = re.compile(r"[a-z0-9_.:-]+")
_ODD = re.compile(r"[\s\\\x00-\x1f\x7f]")
_TEXTUAL = re.compile(r"text/|application/(json|xml|javascript|[\w.-]+\+(json|xml))")
_REDIRECTS = (301, 302, 303, 307, 308)


class HttpFetch:
    """``fetch`` as a tool: GET from the hosts that are ``allowed``, each "host" (any port) or "host:port".

    Redirects are followed within the list only. A name is looked up once and the connection goes to the
    address that was checked: a name that leads to this machine or a private network is refused, so that no
    name server can point inside; an address, or localhost, may be on the list as such. No proxy, no cookies,
    no credentials. ``timeout`` (s) is for the whole fetch. Raises UserError for a malformed host.
    """

    def __init__(
        self,
        allowed: Sequence[str] = LOOPBACK,
        *,
        timeout: float = 10.0,
        max_bytes: int = 65_536,
        max_redirects: int = 4,
    ) -> None:
        self._allowed = {_listed(host) for host in allowed}
        self._timeout, self._max_bytes, self._max_redirects = timeout, max_bytes, max_redirects

    def fetch(self, url: Annotated[str, pydantic.Field(description="http:// or https://")]) -> dict[str, Any]:
        """Fetch a page."""
        deadline = time.monotonic() + self._timeout
        for _ in range(self._max_redirects + 1):
            place = _parsed(url)
            if not self._allowed & {(place.host, None), (place.host, place.port)}:
                raise ToolError(f"{place.host}:{place.port} is not on the list of allowed hosts")
            try:
                status, headers, body = _get(place, deadline, self._max_bytes)
            except TimeoutError:
                raise ToolError(f"{place.host} did not answer in time") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ToolError(f"cannot fetch from {place.host}: {_reason(error)}") from None
            if status not in _REDIRECTS or "location" not in headers:
                return self._shown(status, headers, body)
            url = _joined(url, headers["location"])
        raise ToolError(f"more than {self._max_redirects} redirects")

    def _shown(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> dict[str, Any]:
        kind = headers.get_content_type()[:100]
        if not _TEXTUAL.match(kind):
            return {"status": status, "type": kind}
        text = _decoded(body[: self._max_bytes], headers.get_content_charset())
        cut = {"cut": True} if len(body) > self._max_bytes else {}
        return {"status": status, "type": kind, "text": text, **cut}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a URL leads."""

    secure: bool
    host: str
    port: int
    target: str  # path and query


def _get(place: _Place, deadline: float, max_bytes: int) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers, and up to ``max_bytes`` + 1 bytes of the body."""
    with connect(place.host, place.port, place.secure, deadline) as stream:
        connection = http.client.HTTPConnection(place.host, place.port)
        connection.sock = stream
        # The user agent is named because some servers refuse a request without one.
        headers = {"Connection": "close", "User-Agent": "opd-agents"}
        connection.request("GET", place.target, headers=headers)
        with connection.getresponse() as response:
            return response.status, response.headers, response.read(max_bytes + 1)


def _listed(entry: str) -> tuple[str, int | None]:
    """An entry of the list as host and port; None: any port."""
    text = f"[{entry}]" if entry.count(":") > 1 and "[" not in entry else entry
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not _HOST.fullmatch(host) or parts.netloc != text or "@" in text:
        raise UserError(f"HttpFetch: {entry!r} is no host; write such as 'example.org' or 'localhost:8000'.")
    return host, port


def _parsed(url: str) -> _Place:
    """Where ``url`` leads. Readers of URLs differ in the odd ones, so these are refused. Raises ToolError."""
    if len(url) > MAX_URL or _ODD.search(url):
        raise ToolError(
            f"a URL has at most {MAX_URL} characters and no space, backslash or control character"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
        host = host if host.isascii() else host.encode("idna").decode()
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    except ValueError:
        raise ToolError("malformed URL") from None
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or "@" in parts.netloc:
        raise ToolError("a URL must look like http://host/path or https://host/path, without credentials")
    secure = parts.scheme == "https"
    return _Place(secure, host, port or (443 if secure else 80), f"{path}?{query}" if query else path)


def _joined(url: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError:
        raise ToolError("malformed redirect") from None


def _decoded(body: bytes, charset: str | None) -> str:
    try:
        text = body.decode(charset or "utf-8", "replace")
    except (LookupError, ValueError):  # a charset that nobody knows, or no charset at all
        text = body.decode("utf-8", "replace")
    return text.encode("utf-8", "replace").decode()  # some charsets can write lone surrogates


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
