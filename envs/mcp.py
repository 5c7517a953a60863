"""Environments whose tools are those of an MCP server."""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from opd_agents.envs.base import AgentEnv
from opd_agents.envs.prompt_task import AnswerEnv
from opd_agents.envs.snapshots import ForkMode
from opd_agents.errors import UserError
from opd_agents.tools import ToolError
from opd_agents.tools.mcp import McpServer, as_tool
from opd_agents.types import Task, ToolSpec

RESTART = "restart"


class McpEnv(AgentEnv):
    """A base class: an author writes ``prompt`` and ``success``, both of which may ask ``self.server``.

    ``server`` is a URL or a command line, ``timeout`` (s) of every call. ``reset`` says how an episode finds
    the server as it was: "restart" (all state is in the process or connection, which is made anew), or the
    name of the server's tool that resets it, which agents then do not see. Such an environment forks by
    verified replay, the answers of the server being its state unless ``digest_text`` asks it for more;
    without ``reset`` one server serves all episodes, and nothing can be forked.
    """

    fork_mode: ClassVar[ForkMode] = "none"
    extra: ClassVar[str | None] = "mcp"
    licence: ClassVar[str] = "MIT"
    runs_in = "thread"

    def __init__(
        self,
        server: str,
        reset: str | None = None,
        timeout: float = 30.0,
        tools: Sequence[Callable[..., Any]] = (),
    ) -> None:
        """``tools`` are the author's own. Raises UserError for a server that cannot be used."""
        specs = _specs(server, timeout) if server else ()
        if reset not in (None, RESTART, *(spec.name for spec in specs)):
            raise UserError(f"{type(self).__name__}: reset must be 'restart' or a tool of the server.")
        self.fork_mode = "none" if reset is None else "replay"  # type: ignore[misc]  # a matter of the instance
        remote = [as_tool(spec, self._ask) for spec in specs if spec.name != reset]
        super().__init__([*remote, *tools])
        self._address, self._reset, self._timeout = server, reset, timeout
        self._server: McpServer | None = None
        self._heard: list[str] = []

    @abstractmethod
    def prompt(self, task: Task) -> str:
        """The user's prompt; the server is there and, with ``reset``, as it was at first."""

    @property
    def server(self) -> McpServer:
        """The running server; calls to it from here are no turns. Raises UserError if there is none."""
        if self._server is None:
            self._server = McpServer(self._address, timeout=self._timeout)
        return self._server

    def begin(self, task: Task) -> str:
        if self._reset == RESTART or self._server is None or not self._server.is_alive():
            self.close()
        if self._reset not in (None, RESTART):
            try:
                self.server.call(str(self._reset), {})
            except ToolError as error:
                raise UserError(f"The tool {self._reset!r} of {self._address!r} failed: {error}") from error
        self._heard = []
        return self.prompt(task)

    def digest_text(self) -> str:
        return json.dumps(self._heard)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _ask(self, tool: str, arguments: Mapping[str, Any]) -> str:
        try:
            answer = self.server.call(tool, arguments)
        except ToolError as error:
            self._heard.append(f"error: {error}")
            raise
        self._heard.append(answer)
        return answer


class McpTask(AnswerEnv, McpEnv):
    """Tasks of the user's over any MCP server: prompts from a task file, the agent's text is its answer."""

    def __init__(
        self,
        server: str = "",
        reset: str | None = None,
        verifier: str = "exact",
        system: str = "",
        timeout: float = 30.0,
    ) -> None:
        """``verifier``: see ``load_verifier``; the others as for McpEnv."""
        self.judge_by(verifier)
        super().__init__(server, reset, timeout)
        self.system_prompt = system

    def prompt(self, task: Task) -> str:
        return self.question()

    def digest_text(self) -> str:
        return json.dumps([self._heard, self._answer])


@functools.lru_cache(maxsize=64)
def _specs(server: str, timeout: float) -> tuple[ToolSpec, ...]:
    """The tools of a server, asked once in this process: making an environment must open nothing heavy."""
    connection = McpServer(server, timeout=timeout)
    connection.close()
    return connection.specs
