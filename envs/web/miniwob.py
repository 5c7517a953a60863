"""MiniWoB++: small web pages with one instruction each, in a real headless Chromium."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from opd_agents.envs.actions import format_calls
from opd_agents.envs.base import AgentEnv, RunsIn
from opd_agents.envs.snapshots import ForkMode
from opd_agents.envs.web.miniwob_experts import EXPERTS
from opd_agents.envs.web.miniwob_site import address, allowed
from opd_agents.envs.web.miniwob_tasks import MOUSE, TASKS, TIMED
from opd_agents.errors import UnknownName, UserError
from opd_agents.plugins import need
from opd_agents.tools import ToolError
from opd_agents.tools.browser import Node, Page, open_page, render
from opd_agents.types import Task

SPLIT_SIZES = {"train": 10_000, "validation": 500, "test": 1_000}
SCRIPT = Path(__file__).with_name("miniwob.js")
MAX_LIVE = 16  # tabs of one browser
SIZE = (500, 320)  # CSS pixels, the package's own; FLIGHT_SIZE for its flight tasks
FLIGHT_SIZE = (600, 800)
PARKED = (490, 310)  # beside every task
READY_SECONDS = 10.0  # that a task may take to set itself up
OVER = "The task is over."

_idle: dict[tuple[int, int], list[Page]] = {}  # tabs, by size, for the next episodes: a new one takes long
os.register_at_fork(after_in_child=_idle.clear)  # they are of the parent's browser


class MiniWob(AgentEnv):
    """One task of MiniWoB++ (package miniwob, Liu et al. 2018, arXiv 1802.08802).

    The prompt is the task's utterance and the page as text. The task id seeds the page's generator; there is
    no noise. Time is the page's own and passes with actions only, one second each, so that nothing depends on
    how fast an agent thinks: the reward is the raw one, without the decay over time. An episode succeeds if
    the raw reward, in [-1, 1], is above ``threshold``; ``info["raw_reward"]`` holds it.
    """

    fork_mode: ClassVar[ForkMode] = "replay"
    runs_in: ClassVar[RunsIn] = "thread"
    max_live: ClassVar[int | None] = MAX_LIVE
    family: ClassVar[str] = "web"
    extra: ClassVar[str | None] = "web"
    licence: ClassVar[str] = "MIT"

    split_sizes = SPLIT_SIZES
    system_prompt = (
        "Do what the instruction says on the page below it. Act on elements by their id: [1], [2]."
    )

    def __init__(
        self,
        task: str = "click-test",
        threshold: float = 0.0,
        max_turns: int = 16,
        max_chars: int = 4000,
        screenshot: bool = False,
    ) -> None:
        """``threshold``: 0 counts partial success too, as is the custom; 0.99 asks for all. ``max_chars`` of
        the page are shown. ``screenshot``: ``info["screenshot"]`` holds what is visible, as PNG.

        Raises UnknownName, UserError for other arguments, and MissingPart without miniwob or playwright.
        """
        if task not in TASKS:
            raise UnknownName("MiniWoB++ task", task, TASKS, "opd-agents envs")
        if not -1 <= threshold < 1:
            raise UserError(f"MiniWoB: threshold must lie in [-1, 1), got {threshold}.")
        if max_turns < 1 or max_chars < 100:
            raise UserError("MiniWoB: max_turns must be at least 1 and max_chars at least 100.")
        for package in ("miniwob", "playwright"):
            need(package, "web", "MiniWoB++")
        self.name, self.threshold, self.max_turns = task, threshold, max_turns
        self._max_chars, self._screenshot = max_chars, screenshot
        self._page: Page | None = None
        self._utterance = self._seen = ""
        self._raw_reward = 0.0
        tools: list[Callable[..., str]] = [self.click, self.fill, self.select, self.press]
        tools += [self.click_at, self.drag] if task in MOUSE else []
        tools += [self.wait] if task in TIMED else []
        super().__init__(tools)

    def begin(self, task: Task) -> str:
        try:
            self._load(task)
        except ToolError:  # the browser or the tab died, and those that wait perhaps with it
            for page in [self.page, *_idle.pop(self._size, [])]:
                page.close()
            self._page = None
            self._load(task)
        return f"{self._utterance}\n{self._seen}"

    # ---- tools ----

    def click(self, id: int) -> str:
        """Click an element."""
        self.page.click(id)
        return self._look()

    def fill(self, id: int, text: str) -> str:
        """Replace the text of a field."""
        self.page.fill(id, text)
        return self._look()

    def select(self, id: int, option: str) -> str:
        """Choose an option of a list."""
        self.page.select(id, option)
        return self._look()

    def press(self, key: str) -> str:
        """Press a key, such as "Enter", "ArrowDown", "Control+a"."""
        self.page.press(key)
        return self._look()

    def click_at(self, x: int, y: int) -> str:
        """Click at a place, in pixels."""
        self.page.click_at(x, y)
        return self._look()

    def drag(self, x: int, y: int, to_x: int, to_y: int) -> str:
        """Press the mouse button at a place, move, and let it go at another one."""
        self.page.drag_at((x, y), (to_x, to_y))
        return self._look()

    def wait(self) -> str:
        """Let a second pass."""
        return self._look()

    # ---- the episode ----

    @property
    def page(self) -> Page:
        """The tab that shows the task, opened when it is first needed."""
        if self._page is None:
            waiting = _idle.setdefault(self._size, [])
            try:
                self._page = waiting.pop()
            except IndexError:  # not asked before: other threads take some, too
                self._page = open_page(size=self._size, allowed=allowed(), init_script=SCRIPT.read_text())
        return self._page

    @property
    def _size(self) -> tuple[int, int]:
        return FLIGHT_SIZE if self.name.startswith("flight.") else SIZE

    def success(self) -> bool:
        return self._raw_reward > self.threshold

    def digest_text(self) -> str:
        """The page with its fields and its generator. A page that is gone is a state too."""
        try:
            return json.dumps(self.page.evaluate("miniwob.state()"), sort_keys=True)
        except ToolError as error:
            return str(error)

    def details(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"raw_reward": self._raw_reward}
        if self._screenshot:
            try:
                shown["screenshot"] = self.page.screenshot()
            except ToolError:
                shown["screenshot"] = None
        return shown

    def close(self) -> None:
        """Leave the tab to the next episode: each begins by loading its page anew."""
        page, self._page = self._page, None
        if page is None:
            return
        waiting = _idle.setdefault(self._size, [])
        if len(waiting) < MAX_LIVE:
            waiting.append(page)
        else:
            page.close()

    def _load(self, task: Task) -> None:
        self._raw_reward = 0.0
        self.page.goto(address(self.name))
        self.page.click_at(*PARKED)  # the pointer is where the last episode left it
        mode = "test" if task.split == "test" else "train"  # some tasks hold words or requests back for it
        self.page.evaluate(f"miniwob.begin({json.dumps(f'{task.split}/{task.id}')}, {json.dumps(mode)})")
        deadline = time.monotonic() + READY_SECONDS
        while not self.page.evaluate("miniwob.outcome().ready"):
            if time.monotonic() > deadline:
                raise ToolError(f"{self.name} was not ready within {READY_SECONDS:g} s")
            time.sleep(0.02)
        self._utterance = self.page.evaluate("miniwob.utterance()")
        self._look()

    def _look(self) -> str:
        """The page a second after an action, and whether the task is over."""
        outcome = self.page.evaluate("miniwob.tick()")
        if outcome["done"]:
            self._raw_reward = float(outcome["reward"])
            self.finish()
            return OVER
        self.page.evaluate(f"miniwob.annotate({json.dumps(self.name in MOUSE)})")
        self._seen = render([node for node in self.page.observe() if _says(node)], self._max_chars)
        return self._seen


def _says(node: Node) -> bool:
    """Whether a line about ``node`` tells anything: not the page's title, nor a shape that cannot be seen."""
    return node.role != "page" and (node.role != "shape" or bool(node.name))


class ScriptedMiniWob(MiniWob):
    """A task that has an expert."""

    has_expert: ClassVar[bool] = True

    def expert_action(self) -> str:
        return format_calls([EXPERTS[self.name](self._utterance, self._seen)])
