"""Actions that no agent should send, and what every environment must do with each: answer."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from opd_agents.envs import AgentEnv
from opd_agents.errors import EnvironmentContractError
from opd_agents.tools import random_call
from opd_agents.types import ToolCall, ToolSpec

EPISODE = 40  # actions after which another task is begun; most episodes end before
TEXTS = (
    *("", " ", "\0", "\n\n", "-1", "0", "1e309", "nan", "null", "true", "[]", "{}", "%s%n{0}{x!r}", "\\"),
    *("../../etc/passwd", "/etc/shadow", "..\\..\\x", "~", "a/../../b", "file:///etc/passwd", "//x", "."),
    *("http://169.254.169.254/", "javascript:alert(1)", "data:text/html,<script>1</script>", "about:blank"),
    *("'; DROP TABLE orders; --", '" OR 1=1', "<script>while(1);</script>", "]]>", "<b>&amp;", "$(reboot)"),
    *("__import__('os').system('id')", "while True: pass", "9**9**9**9", "import os; os._exit(0)", "`id`"),
    *("é" * 7, "日本語", "👩‍👩‍👧‍👦", "\u202egnirts", "a\u0300" * 50, "\ufeff", "\u2028", "\x1b[2J", "ﬀ", "İ"),
    *("<tool_call>", "</tool_call>", "<|im_end|>", "[TOOL_CALLS]", "<think>"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**30, -(10**400), 0.5, -1e308, 2**63, [], {}, [[]], [None], {"": {}}),
    *(["x"] * 1000, {"a": {"b": [1, {"c": None}]}}, "x" * 100_000, "🙂" * 20_000, "1" * 5000),
)
RAW = (
    *("", " ", "\t\n", "{", "}", "[", "]", "[[", "{}", "[]", "null", "0", "NaN", '"', '{"name":}'),
    *('{"name":"x"', '{"name":["x"]}', '{"name":"x","arguments":"{}"}', '{"name":"x","arguments":{},"id":1}'),
    *('{"name":"x","name":"y"}', '{"name":"\\ud800"}', "\ud800", "[" * 3000, '{"a":' * 3000, '"' * 999),
    *("{'name':1}", "I give up.", "Thank you!", "ok\0", '<tool_call>{"name":"x"}</tool_call>', "x" * 200_000),
)


def fuzz(
    env: AgentEnv,
    actions: int,
    seed: int = 0,
    *,
    tasks: int | None = None,
    slowest: float = 30.0,
    on_answer: Callable[[str, str], None] = lambda action, observation: None,
) -> Counter[str]:
    """Send ``actions`` random, malformed, huge and adversarial actions, task after task of the first split,
    or of its first ``tasks``. ``on_answer`` is given each action with its observation.

    Raises EnvironmentContractError for an exception, an answer without an observation while the episode goes
    on, text that no file can hold, and a step that takes more than ``slowest`` seconds. Returns how many
    actions were ``parse_error``, ``tool_error`` and ``fine``, and how many ``episodes`` there were.
    """
    rng, counts = random.Random(seed), Counter[str]()
    split, size = next(iter(env.split_sizes.items()))
    words: list[str] = []
    for _ in range(actions):
        if env.turn >= EPISODE or env.over or not counts:
            options = {"split": split, "task_id": str(rng.randrange(min(size, tasks or size)))}
            words = _words(env.reset(seed=rng.randrange(2**31), options=options)[0])
            counts["episodes"] += 1
        action = hostile_action(env.tools, rng, words)
        info, observation = _answer(env, action, slowest)
        words = [*words, *_words(observation)][-200:]
        kinds = ("parse_error", "tool_error")
        counts[next((kind for kind in kinds if info[kind] is not None), "fine")] += 1
        on_answer(action, observation)
    return counts


def hostile_action(tools: Sequence[ToolSpec], rng: random.Random, words: Sequence[str]) -> str:
    """A random action: a sensible call, one with senseless arguments, several, broken ones, noise; without
    tools a word, something adversarial, noise."""
    if not tools and rng.random() < 0.9:
        return str(rng.choice([rng.choice(words or TEXTS), rng.choice(TEXTS), rng.choice(VALUES)]))
    kind = rng.random() if tools else 1.0
    if kind < 0.25:
        return _dumps([random_call(tools, rng, words)])
    if kind < 0.65:
        return _dumps([_spoiled(random_call(tools, rng, words), rng)])
    if kind < 0.72:
        return _dumps([random_call(tools, rng, words) for _ in range(rng.choice([2, 3, 50]))])
    if kind < 0.82:
        text = _dumps([_spoiled(random_call(tools, rng, words), rng)])
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["", rng.choice(TEXTS), text[at + 1 :]])
    if kind < 0.9:
        return rng.choice(RAW)
    return "".join(
        chr(rng.choice([rng.randrange(128), rng.randrange(0x11_0000)])) for _ in range(rng.randrange(60))
    )


def _spoiled(call: ToolCall, rng: random.Random) -> ToolCall:
    arguments: dict[str, Any] = dict(call.arguments)
    value = rng.choice(VALUES) if rng.random() < 0.3 else rng.choice(TEXTS)
    match rng.randrange(6):
        case 0:
            return ToolCall(rng.choice(TEXTS), arguments)
        case 1:
            arguments[rng.choice(TEXTS)] = value
        case 2 if arguments:
            del arguments[rng.choice(list(arguments))]
        case _ if arguments:
            arguments[rng.choice(list(arguments))] = value
    return ToolCall(call.name, arguments)


def _answer(env: AgentEnv, action: str, slowest: float) -> tuple[dict[str, Any], str]:
    what = f"Action {action!r:.300} of task {env.task}"
    start = time.monotonic()
    try:
        observation, reward, _, _, info = env.step(action)
    except Exception as error:
        problem = f"{what} raised {type(error).__name__}: {error}; it must be answered"
        raise EnvironmentContractError(problem) from error
    if (seconds := time.monotonic() - start) > slowest:
        raise EnvironmentContractError(f"{what} took {seconds:.1f} s")
    if not observation and not env.over:
        raise EnvironmentContractError(f"{what} was not answered")
    try:
        observation.encode()
    except UnicodeEncodeError as error:
        raise EnvironmentContractError(f"{what} was answered with text that no file can hold") from error
    if not 0 <= reward <= 1:
        raise EnvironmentContractError(f"{what} was rewarded with {reward}")
    return info, observation


def _words(text: str) -> list[str]:
    return re.findall(r"[\w./-]+", text[:5000])[:100]


def _dumps(calls: Sequence[ToolCall]) -> str:
    items = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)
