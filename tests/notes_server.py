"""An MCP server made with the package mcp: `notes_server.py` on stdio, `notes_server.py PORT` on HTTP."""

import sys

from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("notes", log_level="ERROR")
notes: list[str] = []


@server.tool()
def add_note(text: str, times: int = 1) -> str:
    """Write a note down."""
    notes.extend([text] * times)
    return f"{len(notes)} notes"


@server.tool()
def read_notes() -> list[str]:
    """Read all notes."""
    return notes


@server.tool()
def forget() -> str:
    """Drop all notes."""
    notes.clear()
    return "empty"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no paper")


@server.tool()
def draw() -> Image:
    """Draw."""
    return Image(data=b"\x89PNG", format="png")


if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
