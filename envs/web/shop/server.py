"""The shop on loopback: one HTTP server for this process, a store for every environment."""

from __future__ import annotations

import os
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

from opd_agents.envs.web.shop.store import Store
from opd_agents.envs.web.shop.view import to_html

LOOPBACK = "127.0.0.1"
MOST_BYTES = 100_000  # of a form
SECONDS = 30.0  # that a client may take to send its request


class Server:
    """Serves every store that was ``add``-ed, under a path of its own."""

    def __init__(self) -> None:
        self.stores: dict[str, Store] = {}
        self._http = ThreadingHTTPServer((LOOPBACK, 0), _handler(self.stores))
        self._http.daemon_threads = True
        self.host = f"{LOOPBACK}:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="opd-agents shop", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def add(self, store: Store) -> str:
        """The address under which ``store`` is served, until ``remove``."""
        token = secrets.token_hex(8)
        self.stores[token] = store
        return f"http://{self.host}/{token}"

    def remove(self, address: str) -> None:
        self.stores.pop(address.rpartition("/")[2], None)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _handler(stores: dict[str, Store]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS

        def do_GET(self) -> None:
            token, path = self._asked()
            if token not in stores:
                self.send_error(404)
                return
            page = to_html(stores[token].view(path), f"/{token}").encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")  # going back must show what is true now
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self) -> None:
            token, path = self._asked()
            length = int(self.headers.get("Content-Length", "0"))
            if token not in stores or length > MOST_BYTES:
                self.send_error(404)
                return
            data = dict(parse_qsl(self.rfile.read(length).decode(), keep_blank_values=True))
            self.send_response(303)
            self.send_header("Location", f"/{token}{stores[token].send(path, data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _asked(self) -> tuple[str, str]:
            token, _, path = self.path.removeprefix("/").partition("/")
            return token, f"/{path}"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


_shared: Server | None = None
_lock = threading.Lock()


def shared() -> Server:
    """This process's server, started anew if it is gone."""
    global _shared
    with _lock:
        if _shared is None or not _shared.alive:
            _shared = Server()
        return _shared


def _forget() -> None:
    """A forked process has no thread that serves."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
