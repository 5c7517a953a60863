"""The one headless Chromium of this process, driven from one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from opd_agents.errors import MissingPart
from opd_agents.plugins import need

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # on the search path
START_SECONDS = 60.0
STOP_SECONDS = 10.0

Result = TypeVar("Result")


class Chromium:
    """A browser that starts when the first page is asked for, and again for the next page if it died.

    Playwright objects belong to the loop; everything that touches them goes through ``run``.
    """

    def __init__(self) -> None:
        self.playwright: Any = need("playwright.async_api", "web", "a browser page")
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="opd-agents browser", daemon=True)
        self._thread.start()
        self._starting = asyncio.Lock()
        self._driver: Any = None
        self._browser: Any = None
        atexit.register(self.close)

    def run(self, work: Coroutine[Any, Any, Result], timeout: float) -> Result:
        """Do ``work`` on the loop, from any other thread. Raises TimeoutError after ``timeout`` seconds."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise

    async def browser(self) -> Any:
        """The living browser. Raises MissingPart if there is none that can be started."""
        async with self._starting:
            if self._browser is None or not self._browser.is_connected():
                await self._stop()
                self._driver = await self.playwright.async_playwright().start()
                try:
                    self._browser = await self._driver.chromium.launch(
                        executable_path=next(filter(None, map(shutil.which, NAMES)), None)
                    )
                except self.playwright.Error as error:
                    await self._stop()
                    raise MissingPart(
                        f"No Chromium could be started ({str(error).splitlines()[0]}). Install your system's "
                        "chromium (apt-get install chromium), or run: playwright install chromium"
                    ) from error
        return self._browser

    def close(self) -> None:
        """End the browser, its driver and the thread; what is left of them dies with this process."""
        if self._thread.is_alive():
            with contextlib.suppress(TimeoutError):
                self.run(self._stop(), STOP_SECONDS)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(STOP_SECONDS)

    async def _stop(self) -> None:
        browser, driver = self._browser, self._driver
        self._browser = self._driver = None
        with contextlib.suppress(self.playwright.Error):  # it is dead already
            if browser is not None:
                await browser.close()
        with contextlib.suppress(self.playwright.Error):
            if driver is not None:
                await driver.stop()


_shared: Chromium | None = None
_lock = threading.Lock()


def shared() -> Chromium:
    """This process's browser. Raises MissingPart without the package playwright."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = Chromium()
        return _shared


def _forget() -> None:
    """A forked process has the object but not its thread, and must not touch its parent's browser."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
