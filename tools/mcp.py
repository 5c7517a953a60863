"""Any MCP server as tools: started as a command, or reached by URL (streamable HTTP). MCP 2.x."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import os
import shlex
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from opd_agents.errors import UserError
from opd_agents.plugins import need
from opd_agents.tools.base import Tool, ToolError, to_json, without_titles
from opd_agents.types import ToolSpec

MAX_CHARS = 20_000  # of an answer
MAX_PAGES = 100  # of a list of tools
STOP_SECONDS = 10.0  # the package gives a server 4 before it kills it


class McpServer:
    """A connection to one MCP server, usable from any thread; ``tools`` are the server's.

    ``server`` is a URL or a command line such as ``python my_server.py``. A command is started here, with few
    environment variables and its standard error dropped; it ends with ``close``, with this object or with
    this process. A call waits at most ``timeout`` seconds; a server that dies, hangs or answers nonsense is a
    ToolError. Raises MissingPart without the package `mcp`, UserError for a server that cannot be used.
    """

    def __init__(self, server: str, *, timeout: float = 30.0) -> None:
        if not server.strip():
            raise UserError("McpServer: no server: give a URL, or a command such as 'python my_server.py'.")
        self._timeout = timeout
        self._connection = _Connection(server)
        self._end = weakref.finalize(self, self._connection.end)
        self._end.atexit = False  # `_end_all` does it, and waits
        try:
            self.specs: tuple[ToolSpec, ...] = self._connection.ready.result(timeout)
        except Exception as error:  # whatever a server, or what is none, makes the client raise
            self.close()
            why = "no answer in time" if isinstance(error, TimeoutError) else _innermost(error)
            hint = "Does it run by hand, and does it speak MCP?"
            raise UserError(f"The MCP server {server!r} cannot be used: {why}. {hint}") from error

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(as_tool(spec, self.call) for spec in self.specs)

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The server's answer as text. Raises ToolError."""
        try:
            result = self._wait(self._connection.call(name, dict(arguments)))
        except (TimeoutError, concurrent.futures.CancelledError):
            raise ToolError("the server did not answer in time") from None
        except Exception as error:  # as above
            raise ToolError(f"the server failed: {_innermost(error)}"[:MAX_CHARS]) from None
        texts = [_text(item) for item in result.content] or [to_json(result.structured_content)]
        text = "\n".join(texts)[:MAX_CHARS]
        if result.is_error:
            raise ToolError(text)
        return text

    def is_alive(self) -> bool:
        """Whether the server still answers."""
        try:
            self._wait(self._connection.list_tools())
        except Exception:  # as above
            return False
        return True

    def close(self) -> None:
        self._end()
        self._connection.ended.wait(STOP_SECONDS)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, _loop())
        try:
            return future.result(self._timeout)
        finally:
            future.cancel()  # where it is not done; the server is told


def as_tool(spec: ToolSpec, ask: Callable[[str, Mapping[str, Any]], str]) -> Tool:
    """The tool ``spec`` of a server. Values are for the server to check; an argument that its schema does not
    name is refused here, for most servers would ignore it."""
    known = spec.parameters.get("properties", {})
    open_ended = spec.parameters.get("additionalProperties", False) is not False

    def call(**arguments: Any) -> str:
        unknown = arguments.keys() - known
        if unknown and not open_ended:
            raise ToolError(f"bad arguments for {spec.name}: there is no argument {min(unknown)!r}")
        return ask(spec.name, arguments)

    return Tool(spec, call)


class _Connection:
    """The package's client lives in one task on the loop, which enters and leaves it."""

    def __init__(self, server: str) -> None:
        self._mcp = need("mcp", "mcp", "an MCP server")
        self._client: Any = None
        self._server = server
        self.ready: concurrent.futures.Future[tuple[ToolSpec, ...]] = concurrent.futures.Future()
        self.ended = threading.Event()
        self._task = asyncio.run_coroutine_threadsafe(self._live(), _loop())
        _connections.add(self)

    def end(self) -> None:
        self._task.cancel()

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        return await self._client.call_tool(name, arguments)

    async def list_tools(self) -> tuple[ToolSpec, ...]:
        found: list[Any] = []
        cursor = None
        for _ in range(MAX_PAGES):
            page = await self._client.list_tools(cursor=cursor, cache_mode="bypass")
            found += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        return tuple(
            ToolSpec(tool.name, tool.description or "", without_titles(tool.input_schema)) for tool in found
        )

    async def _live(self) -> None:
        with open(os.devnull, "w") as nowhere:
            try:
                async with self._mcp.Client(self._transport(nowhere)) as self._client:
                    self.ready.set_result(await self.list_tools())
                    await asyncio.Event().wait()  # until it is cancelled
            except BaseException as error:  # nobody awaits this task: what failed is told by `ready`
                if not self.ready.done():
                    self.ready.set_exception(error)
            finally:
                _connections.discard(self)
                self.ended.set()

    def _transport(self, errors: Any) -> Any:
        if self._server.startswith(("http://", "https://")):
            return self._server
        stdio = need("mcp.client.stdio", "mcp", "an MCP server")
        command, *arguments = shlex.split(self._server)
        return stdio.stdio_client(stdio.StdioServerParameters(command=command, args=arguments), errlog=errors)


_connections: set[_Connection] = set()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of all connections, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="opd-agents mcp", daemon=True).start()
    atexit.register(_end_all)
    return loop


def _end_all() -> None:
    connections = list(_connections)
    for connection in connections:
        connection.end()
    for connection in connections:
        connection.ended.wait(STOP_SECONDS)


def _text(item: Any) -> str:
    """A block of an answer; of pictures and sounds only what they are."""
    if item.type == "text":
        return str(item.text)
    if item.type == "resource":
        return str(item.resource.model_dump().get("text", "[resource]"))
    return f"[{item.type}]"


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
