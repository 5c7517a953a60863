"""Fetching from a real server on this machine, which misbehaves in many ways."""

import contextlib
import datetime
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents.errors import UserError
from opd_agents.tools import Tool, ToolError, connecting
from opd_agents.tools.http import HttpFetch


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/")
        with contextlib.suppress(ConnectionError):
            {"drip": self.drip, "drip_headers": self.drip_headers, "hang": self.hang}.get(name, self.page)()

    def page(self) -> None:
        host = self.headers["Host"]
        status, headers, body = {
            "/page": (200, {"Content-Type": "text/html"}, b"<p>hello</p>"),
            "/latin": (200, {"Content-Type": "text/plain; charset=latin-1"}, "é".encode("latin-1")),
            "/json": (200, {"Content-Type": "application/json"}, b'{"a":1}'),
            "/escape": (200, {"Content-Type": "text/plain; charset=unicode_escape"}, b"a\\ud800"),
            "/charset": (200, {"Content-Type": "text/plain; charset=idna"}, b"\xff a"),
            "/picture": (200, {"Content-Type": "image/png"}, b"\x89PNG"),
            "/big": (200, {"Content-Type": "text/plain"}, b"x" * 5_000_000),
            "/here": (302, {"Location": "page"}, b""),
            "/loop": (302, {"Location": "/loop"}, b""),
            "/out": (302, {"Location": "http://example.org/"}, b""),
            "/file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/bad": (302, {"Location": "http://[::1"}, b""),
        }.get(self.path, (404, {"Content-Type": "text/plain"}, f"{host} {self.path}".encode()))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        self.trickle()

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.trickle()

    def trickle(self) -> None:
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def hang(self) -> None:
        time.sleep(5)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@contextlib.contextmanager
def served(wrap: Callable[[socket.socket], socket.socket] = lambda stream: stream) -> Iterator[int]:
    server = Server(("127.0.0.1", 0), Pages)
    server.socket = wrap(server.socket)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as number:
        yield number


FETCH = HttpFetch(timeout=5, max_bytes=1000)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("page", {"status": 200, "type": "text/html", "text": "<p>hello</p>"}),
        ("latin", {"status": 200, "type": "text/plain", "text": "é"}),
        ("json", {"status": 200, "type": "application/json", "text": '{"a":1}'}),
        ("escape", {"status": 200, "type": "text/plain", "text": "a?"}),
        ("charset", {"status": 200, "type": "text/plain", "text": "\N{REPLACEMENT CHARACTER} a"}),
        ("picture", {"status": 200, "type": "image/png"}),
        ("big", {"status": 200, "type": "text/plain", "text": "x" * 1000, "cut": True}),
        ("here", {"status": 200, "type": "text/html", "text": "<p>hello</p>"}),
    ],
)
def test_pages(port: int, path: str, answer: dict) -> None:
    assert FETCH.fetch(f"http://localhost:{port}/{path}") == answer
    assert FETCH.fetch(f"HTTP://127.0.0.1:{port}/{path}#part") == answer


def test_the_host_and_the_path_reach_the_server_as_asked(port: int) -> None:
    answer = FETCH.fetch(f"http://LOCALHOST.:{port}/a%20b/é?q=ü&x=%0D%0A")
    assert answer["text"] == f"localhost:{port} /a%20b/%C3%A9?q=%C3%BC&x=%0D%0A" and answer["status"] == 404


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("loop", "more than 4 redirects"),
        ("out", "example.org:80 is not on the list"),
        ("file", "must look like http"),
        ("bad", "malformed redirect"),
    ],
)
def test_redirects_stay_on_the_list(port: int, path: str, problem: str) -> None:
    with pytest.raises(ToolError, match=problem):
        FETCH.fetch(f"http://127.0.0.1:{port}/{path}")


@pytest.mark.parametrize("path", ["hang", "drip", "drip_headers"])
def test_slow_pages_end_at_the_time_out(port: int, path: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ToolError, match=r"127\.0\.0\.1 did not answer in time"):
        HttpFetch(timeout=0.4).fetch(f"http://127.0.0.1:{port}/{path}")
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "http://127.0.0.2/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0/",
        "http://[::ffff:127.0.0.1]/",
        "http://localhost.example.org/",
        "http://169.254.169.254/latest/meta-data",
    ],
)
def test_other_hosts_are_refused_before_any_look_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "connect", None)
    with pytest.raises(ToolError, match="not on the list of allowed hosts"):
        FETCH.fetch(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "//localhost/",
        "file:///etc/passwd",
        "ftp://localhost/",
        "http://",
        "http://user:word@localhost/",
        "http://localhost@example.org/",
        "http://localhost:99999/",
        "http://localhost:x/",
        "http://[::1",
        "http://localhost\\@example.org/",
        "http://local host/",
        "http://localhost/\r\nX: y",
        "http://localhost/\0",
        "http://" + "a" * 3000,
        "http://" + "é" * 100 + "/",
        "http://\N{FULLWIDTH SOLIDUS}/",
    ],
)
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(ToolError):
        FETCH.fetch(url)


def test_a_host_may_be_listed_with_its_port(port: int) -> None:
    with pytest.raises(ToolError, match=f"127.0.0.1:{port} is not on the list"):
        HttpFetch([f"localhost:{port}", "127.0.0.1:1"]).fetch(f"http://127.0.0.1:{port}/page")
    assert HttpFetch([f"LOCALHOST:{port}"]).fetch(f"http://localhost:{port}/page")["status"] == 200
    HttpFetch(["::1", "[::1]:80", "example.org"])
    for wrong in ("", "http://localhost", "a b", "localhost:x", "user@localhost", "localhost/page", ":80"):
        with pytest.raises(UserError, match="is no host"):
            HttpFetch([wrong])


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fd00::1"]
)
def test_a_name_cannot_point_inside(port: int, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look_up(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ToolError, match="leads to this machine or into a private network"):
        HttpFetch(["inside.example"]).fetch(f"http://inside.example:{port}/page")
    assert asked == ["inside.example"]


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that gives a good address first and a bad one next finds nobody asking twice."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    reached = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", (next(answers), 0))])
    monkeypatch.setattr(socket.socket, "connect", lambda self, place: reached.append(place) or refuse())
    with pytest.raises(ToolError, match=r"cannot fetch from rebound\.example: Connection refused"):
        HttpFetch(["rebound.example"]).fetch("http://rebound.example/")
    assert reached == [("93.184.216.34", 80)]


def refuse() -> None:
    raise ConnectionRefusedError(111, "Connection refused")


def test_a_name_server_that_hangs_and_one_that_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(1) or [])
    with pytest.raises(ToolError, match="did not answer in time"):
        HttpFetch(["slow.example"], timeout=0.2).fetch("http://slow.example/")

    def unknown(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ToolError, match=r"cannot fetch from no\.example: Name or service not known"):
        HttpFetch(["no.example"]).fetch("http://no.example/")


def test_a_server_that_is_not_there_and_proxies_are_not_asked(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ToolError, match=r"cannot fetch from 127\.0\.0\.1: Connection refused"):
            FETCH.fetch(f"http://127.0.0.1:{free.getsockname()[1]}/page")


def test_what_is_no_http_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=lambda: listening.accept()[0].sendall(b"\x00\xff" * 50), daemon=True).start()
        with pytest.raises(ToolError, match=r"cannot fetch from 127\.0\.0\.1"):
            FETCH.fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/")


@pytest.mark.real("cryptography")
def test_https_is_verified_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    pem = tmp_path / "server.pem"
    pem.write_bytes(self_signed())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with served(lambda stream: context.wrap_socket(stream, server_side=True)) as secure:
        with pytest.raises(ToolError, match="certificate verify failed"):
            FETCH.fetch(f"https://localhost:{secure}/page")
        trusting = connecting._tls.__wrapped__()
        monkeypatch.setattr(connecting, "_tls", lambda: trusting)
        trusting.load_verify_locations(pem)
        assert FETCH.fetch(f"https://localhost:{secure}/page")["text"] == "<p>hello</p>"
        with pytest.raises(ToolError, match="certificate verify failed"):
            FETCH.fetch(f"https://127.0.0.1:{secure}/page")
        with pytest.raises(ToolError, match="did not answer in time"):
            HttpFetch(timeout=0.5).fetch(f"https://localhost:{secure}/drip")
    with pytest.raises(ToolError, match="cannot fetch"):
        FETCH.fetch(f"https://localhost:{port}/page")


def self_signed() -> bytes:
    """A key and a certificate of localhost."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    return key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain) + certificate.public_bytes(
        encoding
    )


@given(
    st.text(max_size=200)
    | st.builds("http{}://localhost{}{}".format, *[st.text("s:/?#@[]%.1aé ", max_size=6)] * 3)
)
@settings(max_examples=100, deadline=None)
def test_any_text_is_answered(url: str) -> None:
    try:
        assert Tool.from_function(HttpFetch(["nowhere.example"]).fetch)({"url": url})
    except ToolError as error:
        assert str(error)
