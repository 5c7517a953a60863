"""A page that an agent reads and acts on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from opd_agents.errors import MissingPart, UserError
from opd_agents.tools.base import ToolError
from opd_agents.tools.browser.chromium import START_SECONDS, Chromium, shared
from opd_agents.tools.browser.nodes import CHOOSE, Node, find
from opd_agents.tools.browser.tab import Tab
from opd_agents.tools.browser.tree import Tree

MOST_TEXT = 10_000  # characters that may be typed at once
GRACE_SECONDS = 2.0  # that a step may take beyond the tab's own time-out
KEY = re.compile(r"(?:(?:Shift|Control|Alt)\+){0,3}(?:[A-Z][A-Za-z0-9]{0,15}|[!-~])")

Result = TypeVar("Result")


def open_page(
    *,
    size: tuple[int, int] = (800, 600),
    allowed: Sequence[str] = (),
    init_script: str | None = None,
    timeout: float = 10.0,
) -> Page:
    """A new tab with cookies and storage of its own, in this process's headless Chromium.

    ``size`` is in CSS pixels. ``allowed`` names what the page may load, all else is refused: hosts
    ("127.0.0.1:8000", "localhost") and folders ("/srv/site", for ``file://``). ``init_script`` is JavaScript
    that runs in every document before its own. ``timeout`` (seconds) is how long a page may take to load or
    to answer. Raises MissingPart without the package playwright or a Chromium, UserError for other arguments.
    """
    if timeout <= 0 or min(size) < 1:
        raise UserError(f"open_page: size and timeout must be positive, got {size} and {timeout}.")
    chromium = shared()
    tab = Tab(chromium, allowed, timeout)
    try:
        chromium.run(tab.open(size, init_script), START_SECONDS)
    except TimeoutError as error:
        raise MissingPart(f"Chromium did not open a page within {START_SECONDS:.0f} s.") from error
    return Page(chromium, tab, timeout)


class Page:
    """One tab, as ``open_page`` returns it. Ids of elements are those of the last ``observe()``.

    The methods may be called from any thread, by one at a time. What goes wrong is a ToolError that says
    what, also a time-out, a server that is gone, and a browser that died.
    """

    def __init__(self, chromium: Chromium, tab: Tab, timeout: float) -> None:
        self._chromium, self._tab, self._timeout = chromium, tab, timeout
        self._tree = Tree((), ())
        self._closed = False

    @property
    def url(self) -> str:
        return str(self._tab.page.url)

    def observe(self) -> list[Node]:
        """What is on the page, from Chromium's accessibility tree; what can be acted on gets its id."""
        self._tree = Tree((), ())
        self._tree = self._run(self._tab.read())
        return list(self._tree.nodes)

    def evaluate(self, javascript: str) -> Any:
        """The value of a JavaScript expression, or what a function returns, as JSON data."""
        return self._run(self._tab.evaluate(javascript))

    def screenshot(self) -> bytes:
        """What is visible, as PNG."""
        return self._run(self._tab.screenshot())

    def goto(self, url: str) -> None:
        self._run(self._tab.goto(url))

    def back(self) -> None:
        self._run(self._tab.back())

    def forget_history(self) -> None:
        """From now on ``back()`` leads no further than to the present page."""
        self._run(self._tab.forget_history())

    def click(self, id: int) -> None:
        """Click with the pointer, also what something else lies over. A list of options cannot be clicked:
        what it opens is no part of the page."""
        if find(self._tree.nodes, id).options:
            raise ToolError(CHOOSE)
        self._act(self._tab.click(self._element(id)))

    def fill(self, id: int, text: str) -> None:
        """Replace the text of a field; a date field takes 2025-12-31, a slider a number."""
        if len(text) > MOST_TEXT:
            raise ToolError(f"the text is longer than {MOST_TEXT} characters")
        self._act(self._tab.fill(self._element(id), _sendable(text)))

    def select(self, id: int, option: str) -> None:
        """Choose an option of a list by its label."""
        self._act(self._tab.select(self._element(id), _sendable(option)))

    def drag(self, id: int, onto: int) -> None:
        """Drag an element with the pointer to the middle of another one."""
        self._act(self._tab.drag(self._element(id), self._element(onto)))

    def scroll(self, direction: str) -> None:
        """Move by most of a screen, "up" or "down"."""
        if direction not in ("up", "down"):
            raise ToolError('direction must be "up" or "down"')
        distance = "0.8 * innerHeight" if direction == "down" else "-0.8 * innerHeight"
        self._act(self._tab.evaluate(f'scrollBy({{top: {distance}, behavior: "instant"}})'))

    def press(self, key: str) -> None:
        """Press a key by its name, such as "Enter", "Tab", "ArrowDown", "a", "Control+a"."""
        if not KEY.fullmatch(key):
            raise ToolError('no such key; keys are such as "Enter", "Tab", "ArrowDown", "a", "Control+a"')
        self._act(self._tab.page.keyboard.press(key))

    def click_at(self, x: float, y: float) -> None:
        """Click at a place, in CSS pixels from the upper left corner of what is visible."""
        self._act(self._tab.page.mouse.click(x, y))

    def drag_at(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse button at a place and let it go at another one; places as in ``click_at``."""
        self._act(self._tab.drag_at(start, end))

    def close(self) -> None:
        """Forget the tab with its cookies and storage. May be called twice."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(TimeoutError, self._chromium.playwright.Error):
                self._chromium.run(self._tab.close(), self._timeout)

    def _element(self, id: int) -> int:
        """The DOM's own id of an element that can be acted on."""
        find(self._tree.nodes, id)
        return self._tree.elements[id - 1]

    def _act(self, action: Coroutine[Any, Any, Any]) -> None:
        async def act_and_settle() -> None:
            await action
            await self._tab.settle()

        if self._closed:
            action.close()  # nothing will begin it
        self._run(act_and_settle())

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._closed:
            work.close()
            raise ToolError("the page is closed")
        try:
            return self._chromium.run(work, self._timeout + GRACE_SECONDS)
        except TimeoutError:
            with contextlib.suppress(TimeoutError, self._chromium.playwright.Error):
                self._chromium.run(self._tab.interrupt(), GRACE_SECONDS)
            raise ToolError(f"the page did not answer within {self._timeout:g} s") from None
        except self._chromium.playwright.Error as error:
            raise ToolError(_explained(str(error))) from None


def _explained(message: str) -> str:
    """Playwright's message without what differs from run to run, such as a port."""
    if "closed" in message or "crashed" in message or "Connection" in message:
        return "the browser is gone"
    first = re.sub(r"^[\w.]+: ", "", message.splitlines()[0])
    return re.sub(r"\w+://\S*", "the address", first)[:200]


def _sendable(text: str) -> str:
    """``text`` with half characters (lone surrogates) replaced, which no browser takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
