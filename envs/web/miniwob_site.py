"""Where the pages of the package miniwob are."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opd_agents.plugins import need


def folder() -> Path:
    """The package's pages and what they load. Raises MissingPart without the package."""
    return Path(str(need("miniwob", "web", "MiniWoB++").__file__)).parent / "html"


def address(task: str) -> str:
    """The address of a task's page."""
    if task.startswith("flight."):
        return f"{_served()}/{task.replace('.', '/')}/wrapper.html"
    return (folder() / "miniwob" / f"{task}.html").as_uri()


def allowed() -> tuple[str, ...]:
    """What the pages may load, for ``open_page``."""
    return str(folder()), "127.0.0.1"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


@functools.cache
def _served() -> str:
    """The flight tasks' frames talk to each other, which ``file://`` forbids: served on loopback, as long as
    this process lives."""
    handler = functools.partial(_Quiet, directory=str(folder()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, name="opd-agents miniwob", daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
