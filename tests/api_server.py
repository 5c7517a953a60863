"""A small OpenAI-compatible server for tests and dry runs: a scripted expert that replays the conversation.

It is an oracle, no model: for every request it finds the task by its prompt, takes the conversation's actions
in an environment of its own, and answers with what the environment's scripted expert does next. What it is
asked as a judge it answers by what the expert can still make of a state. On demand it misbehaves in the ways
that real endpoints do.

    python tests/api_server.py opd_agents/OrderDesk-v0 level=easy [tasks=200] [port=0]
"""

import hashlib
import itertools
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opd_agents import envs
from opd_agents.config import parse_overrides
from opd_agents.envs import AgentEnv

# What may go wrong with a request. The first five bring no answer and pass; the others are answers, paid for.
PASSING = ("rate_limit", "server_error", "hang", "cut", "refused_connection")
USELESS = ("bad_body", "bad_json", "wrong_schema", "empty", "refusal", "huge")
NOISE = '{"error":"timeout"}'  # what OrderDesk's tools say now and then; rare, so that it is drawn for longer
MOST_KNOWN = 6000  # conversations; each holds environments
HANG = 30.0  # s, longer than any client of a test waits


class Expert:
    """The scripted expert of an environment as the model behind the server.

    Of the first ``tasks`` of each split those are kept whose prompt and observations are the conversation's;
    where an environment is noisy its noise is drawn anew until it says what was said.
    """

    def __init__(self, env_id: str, options: Mapping[str, Any], tasks: int = 200) -> None:
        self.make: Callable[[], AgentEnv] = lambda: envs.make(env_id, **options)
        self.tasks, self.lock = tasks, threading.Lock()
        self.known: dict[str, list[AgentEnv]] = {}  # by the conversation so far: what may stand behind it

    def __call__(self, body: Mapping[str, Any]) -> str:
        """The next action. Raises KeyError for a task that it does not know."""
        with self.lock:
            return self.at(body).expert_action()

    def at(self, body: Mapping[str, Any]) -> AgentEnv:
        """An environment behind the conversation; it must stay as it is."""
        messages = [message for message in body["messages"] if message["role"] != "system"]
        acted = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.known:
            self.begin()
        ends = [*acted, len(messages)]
        here = self.known[conversation(messages[: ends[0]])]
        for start, stop in itertools.pairwise(ends):
            key = conversation(messages[:stop])
            if key not in self.known:
                said = "\n".join(message["content"] for message in messages[start + 1 : stop])
                self.known[key] = after(here, action_of(messages[start]), said)
            here = self.known[key]
        if len(self.known) > MOST_KNOWN:  # the oldest conversations are over, most likely
            for key in list(itertools.islice(self.known, self.tasks_known, MOST_KNOWN // 2)):
                del self.known[key]
        return here[0]

    def begin(self) -> None:
        for split, size in self.make().split_sizes.items():
            for number in range(min(size, self.tasks)):
                env = self.make()
                prompt, _ = env.reset(seed=0, options={"split": split, "task_id": str(number)})
                self.known.setdefault(conversation([{"role": "user", "content": prompt}]), []).append(env)
        self.tasks_known = len(self.known)


class Oracle:
    """Judges by what the ``expert`` can make of a state: as a server's ``judge``, for any schema that the
    package asks for. An oracle, no model: it plays the episode on. An action is sound where the expert
    succeeds after it, and in as few turns as after its own."""

    def __init__(self, expert: Expert) -> None:
        self.expert = expert

    def __call__(self, body: Mapping[str, Any]) -> Any:
        asked = json.loads(body["messages"][-1]["content"])
        names = body["response_format"]["json_schema"]["schema"]["properties"]
        with self.expert.lock:
            if "better" in names:
                return {"reason": "an oracle's", "better": self.better(asked)}
            if "amounts_to" in names:
                return {"reason": "an oracle's", "amounts_to": self.same(asked)}
            sound, expected = self.judged(asked)
        if "replacement" in names:
            wrong = sound.index(False) if False in sound else -1
            action = expected[wrong] if wrong >= 0 else ""
            return {"number": wrong + 1, "reason": "an oracle's", "replacement": action}
        if "actions" not in names:
            return verdict(names, all(sound))
        names = names["actions"]["items"]["properties"]
        judged = [action["number"] for action in asked["actions"] if action.get("judge")]
        return {"actions": [{"number": n} | verdict(names, sound[n - 1]) for n in judged]}

    def better(self, asked: Mapping[str, Any]) -> str:
        """The place of the action that the expert makes more of; of two equals the first, whichever it is."""
        env = self.expert.at({"messages": [*asked["task"], *told(asked["actions"])]})
        first, second = (worth(env, asked[name]) for name in ("first", "second"))
        return "first" if first >= second else "second"

    def same(self, asked: Mapping[str, Any]) -> str:
        """Which action has the effect of the one that is taken, in this state and under one noise."""
        env = self.expert.at({"messages": [*asked["task"], *told(asked["actions"])]})
        taken = effect(env, asked["taken"])
        alike = (place for place in ("first", "second") if effect(env, asked[place]) == taken)
        return next(alike, "neither")

    def judged(self, asked: Mapping[str, Any]) -> tuple[list[bool], list[str]]:
        """Of each action whether it is sound, and what the expert would have done."""
        sound: list[bool] = []
        expected: list[str] = []
        for number, action in enumerate(asked["actions"]):
            env = self.expert.at({"messages": [*asked["task"], *told(asked["actions"][:number])]})
            expected.append(env.expert_action())
            sound.append(worth(env, action["action"]) >= worth(env, expected[-1]))
        return sound, expected


def told(actions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The actions of a transcript as messages."""
    pairs = [
        ({"role": "assistant", "content": one["action"]}, {"role": "tool", "content": one["answer"]})
        for one in actions
    ]
    return [message for pair in pairs for message in pair]


def worth(env: AgentEnv, action: str) -> tuple[bool, int]:
    """Whether the expert succeeds after ``action``, and minus the turns that it then takes."""
    fork, turns = env.fork(), 1
    *_, terminated, truncated, info = fork.step(action)
    while not (terminated or truncated):
        *_, terminated, truncated, info = fork.step(fork.expert_action())
        turns += 1
    return bool(info.get("success")), -turns


def effect(env: AgentEnv, action: str) -> tuple[str, bool, str]:
    """The answer, whether it ends the episode, and the state after it."""
    fork = env.fork()
    observation, _, terminated, *_ = fork.step(action)
    return observation, terminated, fork.state_digest()


def verdict(names: Mapping[str, Any], sound: bool) -> dict[str, Any]:
    said = {
        "reason": "an oracle's", "hint": "" if sound else "close last", "score": 9 * sound,
        "verdict": "skip" if sound else "strong",
    }  # fmt: skip
    return {name: said[name] for name in names if name in said}


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([message["content"] or message.get("tool_calls") for message in messages])


def after(envs_: Sequence[AgentEnv], action: str, said: str) -> list[AgentEnv]:
    """Those that answer ``action`` with ``said`` by any noise; all of them where none does."""
    found = []
    for env in envs_:
        saved, fork = env.snapshot(), env.fork()
        for seed in range(200 if said == NOISE else 5):
            fork.restore(saved, seed)
            if fork.step(action)[0] == said:
                found.append(fork)
                break
    if found:
        return found
    forks = [env.fork() for env in envs_]
    for fork in forks:
        fork.step(action)
    return forks


def action_of(message: Mapping[str, Any]) -> str:
    """An assistant's message as the environment's action."""
    if not message.get("tool_calls"):
        return str(message["content"])
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [{"name": f["name"], "arguments": json.loads(f["arguments"])} for f in functions]
    return json.dumps(calls[0] if len(calls) == 1 else calls)


def example(schema: Mapping[str, Any]) -> Any:
    """The least value of a JSON schema."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: example(schema["properties"][name]) for name in schema.get("required", ())}
        case "array":
            return [example(schema["items"])] * schema.get("minItems", 0)
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
        case "null":
            return None
    return "text"


class ApiServer:
    """Serves ``acts(body)`` (an action as text) and ``judge(body)`` (JSON) on 127.0.0.1 while entered.

    ``faults`` are shares of requests by kind, drawn with ``seed``; ``plan`` names what goes wrong first, in
    the order of arrival (None: nothing). Every request asks for ``key``, where it is given. ``told`` counts
    what was answered whole, by the hash of the request's body; ``seen`` what went wrong, by kind, and
    "right".
    """

    def __init__(
        self,
        acts: Callable[[Mapping[str, Any]], str] = lambda body: "yes",
        judge: Callable[[Mapping[str, Any]], Any] | None = None,
        *,
        faults: Mapping[str, float] | None = None,
        plan: Sequence[str | None] = (),
        key: str | None = None,
        seed: int = 0,
        port: int = 0,
        retry_after: str = "0.02",
        delay: float = 0.0,
    ) -> None:
        self.acts, self.judge, self.key = acts, judge, key
        self.faults, self.plan, self.retry_after = dict(faults or {}), list(plan), retry_after
        self.delay = delay  # s, of each answer
        self.told, self.seen = Counter[str](), Counter[str]()
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.ended = threading.Event()
        self._random, self.lock = random.Random(seed), threading.Lock()
        self._http = Http(("127.0.0.1", port), Handler)
        self._http.api = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "ApiServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def fault(self) -> str | None:
        """What goes wrong with the next request."""
        with self.lock:
            if self.plan:
                return self.plan.pop(0)
            kinds, shares = list(self.faults), list(self.faults.values())
            if self._random.random() >= sum(shares):
                return None
            return self._random.choices(kinds, shares)[0]

    def message(self, body: Mapping[str, Any], fault: str | None) -> dict[str, Any]:
        """The assistant's message."""
        if fault == "refusal":
            return {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        if fault in ("bad_json", "wrong_schema"):
            return {"role": "assistant", "content": '{"score": ' if fault == "bad_json" else '{"other": 1}'}
        if schema is not None:
            data = self.judge(body) if self.judge else example(schema)
            return {"role": "assistant", "content": json.dumps(data)}
        action = self.acts(body)
        if "tools" not in body or action[:1] not in ("{", "["):
            return {"role": "assistant", "content": action}
        value = json.loads(action)
        functions = [
            {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            for call in (value if isinstance(value, list) else [value])
        ]
        calls = [{"id": f"call_{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
        return {"role": "assistant", "content": None, "tool_calls": calls}


class Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    api: ApiServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body follows its headers at once, not when those are acknowledged
    server: Http

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        """The list of models."""
        if not self.refused():
            self.send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

    def refused(self) -> bool:
        """Whether a key is asked for and another one, or none, was sent; then that is answered."""
        key, sent = self.server.api.key, self.headers["Authorization"]
        if key is None or sent == f"Bearer {key}":
            return False
        text = f"Incorrect API key provided: {sent}"  # as some servers tell it
        self.send(401, {"error": {"message": text, "code": "invalid_api_key"}})
        return True

    def do_POST(self) -> None:
        api = self.server.api
        length = int(self.headers["Content-Length"])
        if len(raw := self.rfile.read(length)) < length:
            return self.reset()  # the client went away
        body = json.loads(raw)
        with api.lock:
            api.running += 1
            api.most_running = max(api.most_running, api.running)
            api.bodies.append(body)
        try:
            self.answer(api, raw, body)
        finally:
            with api.lock:
                api.running -= 1

    def answer(self, api: ApiServer, raw: bytes, body: dict[str, Any]) -> None:
        if self.refused():
            return None
        fault = api.fault()
        time.sleep(api.delay)
        with api.lock:
            api.seen[fault or "right"] += 1
        match fault:
            case "rate_limit":
                return self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": api.retry_after})
            case "server_error":
                return self.send(500, {"error": {"message": "oops"}})
            case "quota":
                return self.send(429, {"error": {"message": "pay", "code": "insufficient_quota"}})
            case "bad_request":
                return self.send(400, {"error": {"message": "too many tokens"}})
            case "hang":
                api.ended.wait(HANG)
                return self.reset()
            case "refused_connection":
                return self.reset()
            case "bad_body":
                return self.send_bytes(b"<html>a proxy's page</html>")
        choices = (
            []
            if fault == "empty"
            else [{"index": 0, "message": api.message(body, fault), "finish_reason": "stop"}]
        )
        prompt = len(json.dumps(body["messages"])) // 4
        usage = {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}
        value = {
            "id": "x",
            "object": "chat.completion",
            "model": body["model"],
            "choices": choices,
            "usage": usage,
        }
        if fault == "huge":
            value["padding"] = "x" * 10_000_000
        self.send_bytes(json.dumps(value).encode(), cut=fault == "cut")
        if fault != "cut":
            with api.lock:
                api.told[hashlib.sha256(raw).hexdigest()] += 1

    def send(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(value).encode(), status, headers)

    def send_bytes(
        self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.reset()

    def reset(self) -> None:
        """Cut the connection, as a crash does."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


if __name__ == "__main__":
    options = parse_overrides(sys.argv[2:])
    port, tasks = int(options.pop("port", 0)), int(options.pop("tasks", 200))
    expert = Expert(sys.argv[1], options, tasks)
    with ApiServer(expert, Oracle(expert), port=port) as server:
        print(f"OPENAI_BASE_URL={server.url}", flush=True)
        threading.Event().wait()
