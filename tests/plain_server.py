"""An MCP server of the standard library only, which starts at once; with `wild` some of its tools break."""

import json
import os
import sys
import time
from typing import Any

NOTES: list[str] = []
TOOLS = {
    "add_note": {"text": {"type": "string"}, "times": {"type": "integer", "default": 1}},
    "read_notes": {},
    "forget": {},
}
WILD = ("hang", "die", "babble", "flood")


def answer(name: str, arguments: dict[str, Any]) -> str:
    if name == "add_note":
        NOTES.extend([arguments["text"]] * int(arguments.get("times", 1)))
        return f"{len(NOTES)} notes"
    if name == "read_notes":
        return "\n".join(NOTES) or "none"
    if name == "forget":
        NOTES.clear()
        return "empty"
    if name == "hang":
        time.sleep(600)
    if name == "die":
        os._exit(1)
    if name == "babble":
        print('{"jsonrpc": "2.0", "id": []}\nno JSON at all\n{"jsonrpc": "2.0", "method": 5}', flush=True)
    return "x" * 1_000_000


def respond(method: str, params: dict[str, Any]) -> dict[str, Any]:
    if method == "initialize":
        info = {"name": "plain", "version": "1"}
        version = params["protocolVersion"]
        return {"result": {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}}
    if method == "tools/list":
        tools = {**TOOLS, **({name: {} for name in WILD} if "wild" in sys.argv else {})}
        schemas = {name: {"type": "object", "properties": properties} for name, properties in tools.items()}
        schemas["add_note"]["required"] = ["text"]
        return {"result": {"tools": [{"name": name, "inputSchema": schemas[name]} for name in tools]}}
    if method != "tools/call":
        return {"error": {"code": -32601, "message": "Method not found"}}
    try:
        content = answer(params["name"], params.get("arguments", {}))
    except (KeyError, TypeError, ValueError) as error:
        return {"result": {"content": [{"type": "text", "text": f"no such note: {error}"}], "isError": True}}
    return {"result": {"content": [{"type": "text", "text": content}]}}


for line in sys.stdin:
    request = json.loads(line)
    if "id" in request:
        reply = respond(request["method"], request.get("params", {}))
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **reply}), flush=True)
