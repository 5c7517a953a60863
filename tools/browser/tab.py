"""One tab inside the browser's event loop: Playwright and Chromium's own protocol behind plain steps."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from opd_agents.tools.base import ToolError
from opd_agents.tools.browser import scripts
from opd_agents.tools.browser.chromium import Chromium
from opd_agents.tools.browser.tree import Tree, join_frames, read_tree

NOWHERE = "http://127.0.0.1:1"  # a proxy that is not there: what must not be reached is sent to it
BLANK = "about:blank"


class Tab:
    """Every method is a coroutine of the browser's loop. Raises ToolError for what an agent did wrong, a page
    that does not load, and a tab that crashed; Playwright's Error for what else goes wrong."""

    def __init__(self, chromium: Chromium, allowed: Sequence[str], timeout: float) -> None:
        self._chromium, self._timeout = chromium, timeout
        self._roots = tuple(Path(place).resolve() for place in allowed if "/" in place)
        self._hosts = tuple(place for place in allowed if "/" not in place)
        self._context: Any = None
        self.page: Any = None
        self._cdp: Any = None
        self._loaded = asyncio.Event()  # set while nothing is being loaded
        self._failure = ""  # why the last page could not be loaded
        self._crashed = False

    async def open(self, size: tuple[int, int], init_script: str | None) -> None:
        browser = await self._chromium.browser()
        self._context = await browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            # A proxy decides for redirects and web sockets too, which no interception of requests sees.
            proxy={"server": NOWHERE, "bypass": ",".join(["<-loopback>", *self._hosts])},
            service_workers="block",
            accept_downloads=False,
            reduced_motion="reduce",
            locale="en-US",
            timezone_id="UTC",
        )
        if self._roots:  # otherwise no page can lead to a file, and nothing need be intercepted
            await self._context.route("file://**", self._file)
        if init_script:
            await self._context.add_init_script(init_script)
        self.page = await self._context.new_page()
        self._context.on("page", lambda popup: asyncio.ensure_future(popup.close()))
        self.page.on("crash", lambda _: self._crash())
        self.page.on("requestfailed", self._failed)
        self._cdp = await self._context.new_cdp_session(self.page)
        self._cdp.on("Page.frameStartedLoading", lambda event: self._loading(event, True))
        self._cdp.on("Page.frameStoppedLoading", lambda event: self._loading(event, False))
        await self._cdp.send("Page.enable")
        frames = await self._cdp.send("Page.getFrameTree")
        self._frame = frames["frameTree"]["frame"]["id"]
        self._loaded.set()

    async def close(self) -> None:
        await self._context.close()

    async def interrupt(self) -> None:
        """End a script that never ends by itself, so that the page answers again."""
        await self._cdp.send("Runtime.terminateExecution")

    # ---- reading ----

    async def read(self) -> Tree:
        """The page with the frames in it, but those of another site, which another process draws."""
        self._require_page()
        shot = await self._cdp.send("DOMSnapshot.captureSnapshot", {"computedStyles": []})
        documents, strings = shot["documents"], shot["strings"]
        trees = await asyncio.gather(
            *(
                self._cdp.send("Accessibility.getFullAXTree", {"frameId": strings[document["frameId"]]})
                for document in documents
            )
        )
        clickable: set[int] = set()
        lists: set[int] = set()
        values: dict[int, str] = {}
        frames: dict[int, int] = {}
        for nodes in (document["nodes"] for document in documents):
            ids, inputs, inner = nodes["backendNodeId"], nodes["inputValue"], nodes["contentDocumentIndex"]
            clickable |= {ids[index] for index in nodes["isClickable"]["index"]}
            filled = zip(inputs["index"], inputs["value"], strict=True)
            values |= {ids[index]: strings[value] for index, value in filled if value >= 0}
            lists |= {
                id for id, name in zip(ids, nodes["nodeName"], strict=True) if strings[name] == "SELECT"
            }
            frames |= {ids[index]: place for index, place in zip(inner["index"], inner["value"], strict=True)}
        joined = join_frames([tree["nodes"] for tree in trees], frames)
        return read_tree(joined, clickable, lists, values)

    async def evaluate(self, javascript: str) -> Any:
        return await self.page.evaluate(javascript)

    async def screenshot(self) -> bytes:
        return bytes(await self.page.screenshot(animations="disabled", timeout=self._timeout * 1e3))

    # ---- moving ----

    async def goto(self, url: str) -> None:
        self._require_allowed(url)
        self._failure = ""
        try:
            await self.page.goto(url, wait_until="commit", timeout=self._timeout * 1e3)
        except self._chromium.playwright.TimeoutError:
            await self._give_up()
        except self._chromium.playwright.Error:  # settle() says what it was
            pass
        await self.settle()

    async def back(self) -> None:
        history = await self._cdp.send("Page.getNavigationHistory")
        place = history["currentIndex"] - 1
        if place < 0 or history["entries"][place]["url"] == BLANK:
            raise ToolError("there is no page to go back to")
        self._failure = ""
        await self._cdp.send("Page.navigateToHistoryEntry", {"entryId": history["entries"][place]["id"]})
        try:
            await asyncio.wait_for(self._arrived(place), self._timeout)
        except TimeoutError:
            await self._give_up()
        await self.settle()

    async def _arrived(self, place: int) -> None:
        """Wait until an entry of the history is the present one, or it turns out to lead nowhere: right after
        it was asked for, the page before is still there, and as quiet as ever."""
        began = False
        while not (self._failure or (began and self._loaded.is_set())):
            with contextlib.suppress(self._chromium.playwright.Error):  # while pages change
                if (await self._cdp.send("Page.getNavigationHistory"))["currentIndex"] == place:
                    return
            began |= not self._loaded.is_set()
            await asyncio.sleep(0.005)

    async def forget_history(self) -> None:
        await self._cdp.send("Page.resetNavigationHistory")

    async def settle(self) -> None:
        """Wait until what an action set off has happened. Raises ToolError for a page that does not load."""
        try:
            await asyncio.wait_for(self._quiet(), self._timeout)
        except TimeoutError:
            if self._loaded.is_set():  # a script of the page's does not end
                raise
            await self._give_up()
        self._require_page()

    async def _quiet(self) -> None:
        with contextlib.suppress(self._chromium.playwright.Error):  # the document went away: a new one comes
            await self.page.evaluate(scripts.SETTLED)
        await self._loaded.wait()

    # ---- acting; ``element`` is a backend node id of the last ``read`` ----

    async def click(self, element: int) -> None:
        point = await self._call(element, scripts.POINT)
        if point:
            await self.page.mouse.click(*point)
        else:
            await self._call(element, scripts.CLICK)

    async def fill(self, element: int, text: str) -> None:
        outcome = await self._call(element, scripts.FILL, text)
        if outcome and outcome != "type":
            raise ToolError(outcome)
        if outcome and text:
            await self.page.keyboard.insert_text(text)
        elif outcome:
            await self.page.keyboard.press("Delete")

    async def select(self, element: int, option: str) -> None:
        if problem := await self._call(element, scripts.SELECT, option):
            raise ToolError(problem)

    async def drag(self, element: int, target: int) -> None:
        start, end = await self._call(element, scripts.POINT), await self._call(target, scripts.POINT)
        if not (start and end):
            raise ToolError("something else lies over it")
        await self.drag_at(start, end)

    async def drag_at(self, start: Sequence[float], end: Sequence[float]) -> None:
        mouse = self.page.mouse
        await mouse.move(*start)
        await mouse.down()
        await mouse.move(*end, steps=8)
        await mouse.up()

    # ---- inside ----

    async def _give_up(self) -> NoReturn:
        await self._cdp.send("Page.stopLoading")
        raise ToolError(f"the page did not load within {self._timeout:g} s")

    async def _call(self, element: int, script: str, *arguments: str) -> Any:
        """Run a function of ``scripts`` on an element."""
        try:
            found = await self._cdp.send("DOM.resolveNode", {"backendNodeId": element})
        except self._chromium.playwright.Error:
            raise ToolError("it is no longer on the page") from None
        result = await self._cdp.send(
            "Runtime.callFunctionOn",
            {
                "functionDeclaration": scripts.if_there(script),
                "objectId": found["object"]["objectId"],
                "arguments": [{"value": argument} for argument in arguments],
                "returnByValue": True,
            },
        )
        outcome = result["result"].get("value", {})  # none where the page itself makes the script fail
        if outcome.get("gone"):
            raise ToolError("it is no longer on the page")
        return outcome.get("value")

    def _require_allowed(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ToolError("that is no address") from None
        if parts.scheme == "file" and self._is_inside(parts.path):
            return
        if parts.scheme in ("http", "https") and {host, f"{host}:{port}"} & set(self._hosts):
            return
        raise ToolError("that address cannot be visited from here")

    def _is_inside(self, path: str) -> bool:
        place = Path(unquote(path)).resolve()
        return any(place.is_relative_to(root) for root in self._roots)

    async def _file(self, route: Any) -> None:
        if self._is_inside(urlsplit(route.request.url).path):
            await route.continue_()
        else:
            await route.abort("accessdenied")

    def _loading(self, event: dict[str, Any], started: bool) -> None:
        if event["frameId"] == self._frame:
            if started:
                self._loaded.clear()
            else:
                self._loaded.set()

    def _failed(self, request: Any) -> None:
        if request.is_navigation_request() and request.frame == self.page.main_frame:
            self._failure = re.sub(r"^net::", "", request.failure or "ERR_FAILED")

    def _crash(self) -> None:
        self._crashed = True
        self._loaded.set()

    def _require_page(self) -> None:
        if self._crashed:
            raise ToolError("the tab crashed")
        if self.page.url.startswith("chrome-error:"):  # Chromium's own page would show ports and addresses
            raise ToolError(f"the page cannot be loaded ({self._failure or 'ERR_FAILED'})")
