"""The browser tool: what it makes of a page, and that nothing about a page stops it."""

import contextlib
import gc
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_agents.errors import UserError
from opd_agents.tools import ToolError
from opd_agents.tools.browser import Page, open_page, render

PAGE = """<!doctype html><title>Desk</title><h1>Orders</h1>
<p>Some <b>bold</b> words with <a href="other.html">a link</a> inside.</p>
<form onsubmit="document.title = 'sent ' + this.who.value; return false">
<label>Name <input name="who" value="Bob"></label><label for="c">City</label>
<select id="c"><option>Oslo<option selected>Rome<option disabled>Lima</select>
<label><input type="checkbox" checked> gift</label><input type="date"><textarea></textarea>
<button>Send</button><button disabled>Pay</button></form>
<table><tr><th>Item<th>Price<tr><td>mug<td>8</table><ul><li>one<li>two <span>three</span></ul>
<div id="d">plain <i>div</i></div><div style="display:none">hidden</div>
<script>d.addEventListener("click", () => { document.title = "clicked"; });</script>"""
SEEN = """page "Desk"
heading "Orders"
"Some bold words with"
[1] link "a link"
"inside."
[2] textbox "Name" = "Bob"
[3] combobox "City" = "Rome" of "Oslo", "Rome", "Lima"
[4] checkbox "gift" checked
[5] date = ""
[6] textbox = ""
[7] button "Send"
[8] button "Pay" disabled
row "Item | Price"
row "mug | 8"
listitem "one"
listitem "two three"
[9] clickable "plain div\""""
real = pytest.mark.real("chromium", "playwright")


# ---- with a real one ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    (root / "page.html").write_text(PAGE)
    (root / "other.html").write_text("<title>Other</title><a href='page.html'>home</a>")
    return root


@pytest.fixture(scope="module")
def shared_page(folder: Path) -> Iterator[Page]:
    page = open_page(allowed=[str(folder)], timeout=10)
    yield page
    page.close()


@pytest.fixture
def page(shared_page: Page, folder: Path) -> Page:
    shared_page.goto(f"file://{folder}/page.html")
    shared_page.forget_history()
    shared_page.observe()
    return shared_page


def title(page: Page) -> str:
    return page.observe()[0].name


@real
def test_what_is_seen_of_a_page(page: Page) -> None:
    assert render(page.observe()) == SEEN


@real
def test_every_action_does_what_it_says(page: Page) -> None:
    page.fill(2, "Ann \ud800\nBo")
    page.select(3, "Oslo")
    page.click(4)
    page.fill(5, "2025-03-01")
    page.fill(6, "text")
    page.fill(6, "")
    seen = render(page.observe())
    assert '[2] textbox "Name" = "Ann � Bo"' in seen and '= "Oslo" of' in seen
    assert '[4] checkbox "gift"\n[5] date = "2025-03-01"\n[6] textbox = ""' in seen
    page.click(7)
    assert title(page) == "sent Ann � Bo"
    page.click(9)
    assert title(page) == "clicked"
    page.click(1)
    assert title(page) == "Other" and page.url.endswith("/other.html")
    page.back()
    assert title(page) == "Desk"
    page.scroll("down")
    page.press("Tab")
    assert page.evaluate("({a: [1, document.title]})") == {"a": [1, "Desk"]}
    assert page.screenshot().startswith(b"\x89PNG")


@real
def test_what_cannot_be_done_is_answered(page: Page) -> None:
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: page.click(99), r"no such element; the page has \[1\] to \[9\]"),
        (lambda: page.click(8), "it is disabled"),
        (lambda: page.click(3), "with select"),
        (lambda: page.fill(1, "x"), "it is no text field"),
        (lambda: page.fill(5, "tomorrow"), "2025-12-31"),
        (lambda: page.fill(2, "x" * 20_000), "longer than 10000"),
        (lambda: page.select(2, "x"), "it offers no options"),
        (lambda: page.select(3, "Lima"), "no such option; it has: Oslo, Rome"),
        (lambda: page.press("Foo"), "key"),
        (lambda: page.press("x" * 1000), "no such key"),
        (lambda: page.scroll("left"), "up"),
        (page.back, "no page to go back to"),
        (lambda: page.evaluate("1 +"), "SyntaxError"),
    ]
    for action, problem in refused:
        with pytest.raises(ToolError, match=problem):
            action()
    assert render(page.observe()) == SEEN


@real
def test_an_element_that_is_gone_is_answered(page: Page) -> None:
    page.evaluate("document.querySelector('a').remove()")
    with pytest.raises(ToolError, match="it is no longer on the page"):
        page.click(1)


@real
def test_what_lies_under_something_is_clicked_all_the_same(page: Page) -> None:
    cover = "position:fixed;inset:0;background:white"
    page.evaluate(f"document.body.append(Object.assign(document.createElement('p'), {{style: '{cover}'}}))")
    page.click(9)
    assert title(page) == "clicked"


@real
@pytest.mark.parametrize(
    "url",
    ["http://example.com/", "https://127.0.0.1:1/", "file:///etc/passwd", "javascript:1", "about:blank", "x",
     "http://[", "file://{folder}/../x", "chrome://version", "data:text/html,x", ""],
)  # fmt: skip
def test_nothing_else_is_visited(page: Page, folder: Path, url: str) -> None:
    with pytest.raises(ToolError, match=r"cannot be visited|no address"):
        page.goto(url.format(folder=folder))
    assert title(page) == "Desk"


@real
def test_a_page_leads_to_no_other_file(page: Page) -> None:
    page.evaluate("document.querySelector('a').href = 'file:///etc/passwd'")
    with pytest.raises(ToolError, match=r"cannot be loaded \(ERR_ACCESS_DENIED\)"):
        page.click(1)


@real
def test_a_script_without_end_is_ended(folder: Path) -> None:
    page = open_page(allowed=[str(folder)], timeout=1)
    page.goto(f"file://{folder}/page.html")
    start = time.monotonic()
    with pytest.raises(ToolError, match="did not answer within 1 s"):
        page.evaluate("while (true) {}")
    assert render(page.observe()) == SEEN
    page.evaluate("d.addEventListener('click', () => { while (true) {} })")
    with pytest.raises(ToolError, match="did not answer within 1 s"):
        page.click(9)
    assert title(page) == "clicked"
    assert time.monotonic() - start < 30
    page.close()
    with pytest.raises(ToolError, match="the page is closed"):
        page.observe()
    page.close()


@real
@pytest.mark.filterwarnings("error")  # a coroutine that nothing awaits is a warning
def test_a_closed_page_answers(folder: Path) -> None:
    page = open_page(allowed=[str(folder)])
    page.goto(f"file://{folder}/page.html")
    page.observe()
    page.close()
    for act in (lambda: page.click(1), lambda: page.press("Enter"), lambda: page.scroll("up")):
        with pytest.raises(ToolError, match="the page is closed"):
            act()
    gc.collect()


@real
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["click", "fill", "select", "press", "scroll", "goto", "drag", "click_at"]),
    st.integers(-(10**30), 10**30) | st.integers(0, 10),
    st.text(max_size=40) | st.sampled_from(["\ud800", "x" * 9999, "Control+w", "Enter", "Alt+F4", "`${x}"]),
)
def test_no_action_breaks_a_page(page: Page, name: str, id: int, text: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "click": lambda: page.click(id), "fill": lambda: page.fill(id, text),
        "select": lambda: page.select(id, text), "press": lambda: page.press(text),
        "scroll": lambda: page.scroll(text), "goto": lambda: page.goto(text),
        "drag": lambda: page.drag(id, 2), "click_at": lambda: page.click_at(id, 5),
    }  # fmt: skip
    with contextlib.suppress(ToolError):
        calls[name]()
    assert page.observe()[0].role == "page"


# ---- servers ----


class Site:
    """A server that answers at /, not at /never, slowly at /slow, and sends visitors of /away elsewhere."""

    def __init__(self, away: str = "") -> None:
        self.visits: list[str] = []
        self.release = threading.Event()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.visits.append(self.path)
                if self.path == "/never":
                    site.release.wait(30)
                    return
                if self.path == "/slow":
                    time.sleep(0.3)
                self.send_response(302 if self.path == "/away" else 200)
                self.send_header("Location", away)
                self.end_headers()
                links = "".join(f'<a href="/{name}">{name}</a> ' for name in ("never", "slow", "away"))
                self.wfile.write(f"<title>{self.path}</title>{links}<img src='{away}'>".encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    forbidden = Site()
    site = Site(f"http://{forbidden.host}/")
    yield site
    assert forbidden.visits == []
    for each in (site, forbidden):
        each.close()


@real
def test_a_page_that_never_loads_is_given_up(site: Site) -> None:
    page = open_page(allowed=[site.host], timeout=1)
    page.goto(f"http://{site.host}/")
    page.observe()
    start = time.monotonic()
    with pytest.raises(ToolError, match="did not load within 1 s"):
        page.click(1)
    with pytest.raises(ToolError, match="did not load within 1 s"):
        page.goto(f"http://{site.host}/never")
    assert time.monotonic() - start < 10
    assert title(page) == "/"
    page.click(2)
    assert title(page) == "/slow"
    page.close()


@real
def test_no_other_server_is_reached_by_a_redirect_or_a_picture(site: Site) -> None:
    page = open_page(allowed=[site.host], timeout=5)
    page.goto(f"http://{site.host}/")  # its picture is elsewhere; the fixture sees that nobody came
    page.observe()
    with pytest.raises(ToolError, match=r"cannot be loaded \(ERR_PROXY_CONNECTION_FAILED\)"):
        page.click(3)
    page.back()
    assert title(page) == "/"
    page.close()


@real
def test_a_server_that_dies_is_an_answer(site: Site) -> None:
    page = open_page(allowed=[site.host], timeout=5)
    page.goto(f"http://{site.host}/")
    page.observe()
    site.close()
    with pytest.raises(ToolError) as error:
        page.click(2)
    assert str(error.value) == "the page cannot be loaded (ERR_CONNECTION_REFUSED)"
    with pytest.raises(ToolError, match="cannot be loaded"):
        page.observe()
    page.close()


@real
def test_tabs_share_no_cookies(site: Site) -> None:
    pages = [open_page(allowed=[site.host]) for _ in range(2)]
    for number, page in enumerate(pages):
        page.goto(f"http://{site.host}/")
        page.evaluate(f"localStorage.a = document.cookie = 'a={number}'")
    assert [page.evaluate("localStorage.a + document.cookie") for page in pages] == ["a=0a=0", "a=1a=1"]
    for page in pages:
        page.close()


@real
def test_a_browser_that_dies_is_an_answer_and_the_next_page_has_a_new_one(folder: Path) -> None:
    code = f"""
import os, signal, subprocess
from opd_agents.tools import ToolError
from opd_agents.tools.browser import open_page
page = open_page(allowed=[{str(folder)!r}], timeout=5)
page.goto("file://{folder}/page.html")
node = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
for process in node:
    for child in subprocess.run(["pgrep", "-P", process], capture_output=True, text=True).stdout.split():
        os.kill(int(child), signal.SIGKILL)
try:
    print("seen", page.observe())
except ToolError as error:
    print(error)
page.close()
again = open_page(allowed=[{str(folder)!r}], timeout=5)
again.goto("file://{folder}/page.html")
print(again.observe()[0].name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "the browser is gone\nDesk\n", done.stderr


def offspring(process: int) -> set[int]:
    """The living processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {process}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {process}


@real
@pytest.mark.parametrize("ending", ["killed", "exits"])
def test_no_browser_outlives_its_process(folder: Path, ending: str) -> None:
    code = f"""
from opd_agents.tools.browser import open_page
page = open_page(allowed=[{str(folder)!r}])
print("open", flush=True)
input()
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout and process.stdin and process.stdout.readline() == "open\n"
    started = offspring(process.pid)
    assert len(started) > 2
    if ending == "killed":
        os.kill(process.pid, signal.SIGKILL)
    else:
        process.stdin.write("\n")
        process.stdin.close()
    process.wait(30)
    deadline = time.monotonic() + 20
    while alive := [child for child in started if Path(f"/proc/{child}").exists() and not zombie(child)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@real
def test_wrong_arguments_are_refused() -> None:
    for arguments in ({"size": (0, 10)}, {"timeout": 0}):
        with pytest.raises(UserError, match="must be positive"):
            open_page(**arguments)  # type: ignore[arg-type]
