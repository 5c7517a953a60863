"""The environments: the shop in a real browser, and the same one as plain Python."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Literal, Protocol

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv
from opd_agents.envs.splits import SPLIT_SIZES
from opd_agents.envs.web.shop.case import Case
from opd_agents.envs.web.shop.expert import next_call
from opd_agents.envs.web.shop.levels import LEVELS, draw_case
from opd_agents.envs.web.shop.server import Server, shared
from opd_agents.envs.web.shop.store import Store, clean
from opd_agents.envs.web.shop.text import TextBrowser
from opd_agents.envs.web.shop.view import MOST_TYPED
from opd_agents.errors import UnknownName, UserError
from opd_agents.plugins import need
from opd_agents.tools import ToolError
from opd_agents.tools.browser import Node, Page, open_page, render
from opd_agents.types import Task, ToolCall

MOST_CHARS = 4000  # of a page in an observation
ADDRESS = re.compile(r"/[\w/-]{0,100}(?:\?[\w=&+-]{0,100})?", re.ASCII)


class Browser(Protocol):
    """What both back ends do; a ToolError says what was wrong."""

    def observe(self) -> list[Node]: ...
    def goto(self, url: str, /) -> None: ...
    def back(self) -> None: ...
    def click(self, id: int, /) -> None: ...
    def fill(self, id: int, text: str, /) -> None: ...
    def select(self, id: int, option: str, /) -> None: ...
    def scroll(self, direction: str, /) -> None: ...


class _Shop(AgentEnv):
    """What does not depend on the browser: tasks, tools, verifier, expert."""

    family: ClassVar[str] = "web"
    has_expert: ClassVar[bool] = True
    split_sizes = SPLIT_SIZES

    browser: Browser
    store: Store

    def __init__(self, level: str = "easy", max_turns: int | None = None) -> None:
        """``max_turns`` defaults to the level's."""
        if level not in LEVELS:
            raise UnknownName("shop level", level, LEVELS, "opd-agents envs opd_agents/Shop-v0")
        self.level = LEVELS[level]
        self.system_prompt = self.level.system_prompt
        self.max_turns = self.level.max_turns if max_turns is None else max_turns
        if self.max_turns < 1:
            raise UserError(f"{type(self).__name__}: max_turns must be at least 1, got {max_turns}.")
        self.nodes: list[Node] = []  # the page as last seen
        super().__init__([self.click, self.fill, self.select, self.goto, self.back, self.scroll])

    @property
    def case(self) -> Case:
        """The content of the present task."""
        return draw_case(self.level.name, self.task.split, self.task.id)

    @abstractmethod
    def address(self, path: str) -> str:
        """Where the browser finds a path of the shop."""

    def begin(self, task: Task) -> str:
        self.store = Store(self.case)
        self.enter()
        self.nodes = self.browser.observe()
        return f"{self.case.prompt}\n{self._seen()}"

    @abstractmethod
    def enter(self) -> None:
        """Open the browser at the shop's first page, with no history."""

    # ---- tools ----

    def click(self, id: int) -> str:
        """Click on an element."""
        self.browser.click(id)
        return self._look()

    def fill(self, id: int, text: str) -> str:
        """Replace the text of a field."""
        if len(text) > MOST_TYPED:
            raise ToolError(f"the text is longer than {MOST_TYPED} characters")
        self.browser.fill(id, clean(text))
        return self._look()

    def select(self, id: int, option: str) -> str:
        """Choose an option of a list."""
        self.browser.select(id, clean(option))
        return self._look()

    def goto(self, path: str) -> str:
        """Visit a page of the shop by its path, such as "/cart"."""
        if not ADDRESS.fullmatch(path) or "//" in path:
            raise ToolError('no such address; addresses are such as "/" and "/cart"')
        self.browser.goto(self.address(path))
        return self._look()

    def back(self) -> str:
        """Go back to the page before."""
        self.browser.back()
        return self._look()

    def scroll(self, direction: Literal["up", "down"]) -> str:
        """Scroll the page."""
        self.browser.scroll(direction)
        return self._look()

    def call(self, call: ToolCall) -> str:
        try:
            return super().call(call)
        finally:
            if self.store.orders:  # also where the page that says so did not load
                self.finish()

    def on_text(self, text: str) -> str:
        return "Please order it in the shop."

    # ---- verifier and expert ----

    def success(self) -> bool:
        """Whether the order book holds the wanted order and nothing else."""
        return self.store.orders == [self.case.wanted]

    def expert_action(self) -> str:
        return format_calls([next_call(self.store, self.nodes)])

    def digest_text(self) -> str:
        store = self.store
        book = [asdict(order) for order in store.orders]
        return json.dumps([[asdict(line) for line in store.cart], store.customer, book, render(self.nodes)])

    def _look(self) -> str:
        self.nodes = self.browser.observe()
        return self._seen()

    def _seen(self) -> str:
        return render(self.nodes, MOST_CHARS)


class ShopText(_Shop):
    """A small web shop as text: the pages, actions and answers of ``Shop-v0``, without a browser.

    Levels: easy (one click finds it), medium (search, size, quantity, two fields), hard (two products of 144
    by price and stars, five fields). An episode ends with the order and succeeds if it is the wanted one.
    """

    browser: TextBrowser

    def address(self, path: str) -> str:
        return path

    def enter(self) -> None:
        self.browser = TextBrowser(self.store)

    def get_state(self) -> Any:
        store, browser = self.store, self.browser
        return store.cart, store.customer, store.orders, browser.history, browser.typed

    def set_state(self, state: Any) -> None:
        cart, customer, orders, history, typed = state
        self.store = Store(self.case, cart, customer, orders)
        self.browser = TextBrowser(self.store)
        self.browser.history, self.browser.typed = history, typed
        self.nodes = self.browser.observe()


class Shop(_Shop):
    """A small web shop served on loopback, in a real headless Chromium.

    Its levels, observations and actions are those of ``ShopText-v0``. A page that does not load or a browser
    that died is an observation; the next reset begins with a new one.
    """

    fork_mode: ClassVar[Literal["snapshot", "replay", "none"]] = "replay"
    runs_in: ClassVar[Literal["main", "thread", "process"]] = "thread"
    max_live: ClassVar[int | None] = 32
    extra: ClassVar[str | None] = "web"

    def __init__(self, level: str = "easy", max_turns: int | None = None, timeout: float = 10.0) -> None:
        """``timeout`` (seconds): how long a page may take to load or to answer."""
        need("playwright.async_api", "web", "Shop-v0")
        if timeout <= 0:
            raise UserError(f"Shop: timeout must be positive, got {timeout}.")
        self.timeout = timeout
        self._server: Server | None = None  # where the store is now
        self._page: Page | None = None
        self._address = ""
        super().__init__(level, max_turns)

    def address(self, path: str) -> str:
        return self._address + path

    def enter(self) -> None:
        self._leave()
        self._server = shared()
        self._address = self._server.add(self.store)
        if self._page is not None:
            try:
                self._show(self._page)
                return
            except ToolError:  # its browser died, or the server did and the new one has another port
                self._page.close()
        self._page = open_page(allowed=[self._server.host], timeout=self.timeout)
        self._show(self._page)

    def _show(self, page: Page) -> None:
        page.goto(self.address("/"))
        page.forget_history()
        self.browser = page

    def _leave(self) -> None:
        if self._server is not None:
            self._server.remove(self._address)
            self._server = None

    def close(self) -> None:
        self._leave()
        if self._page is not None:
            self._page.close()
            self._page = None
