"""Actions of every wrong kind, for the fuzz tests of environments."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from opd_agents.envs import AgentEnv
from opd_agents.types import ToolSpec

JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def actions(tools: Sequence[ToolSpec], words: Sequence[str] = ("x",)) -> st.SearchStrategy[str]:
    """Texts, broken JSON, calls of ``tools`` with arguments of right and wrong types, lists of calls.
    ``words`` are values that mean something to the tools."""
    strings = st.sampled_from(words) | st.text(max_size=30) | st.just("x" * 100_000)
    simple = {"string": strings, "integer": st.integers(), "boolean": st.booleans()}

    def call(tool: ToolSpec) -> st.SearchStrategy[dict[str, Any]]:
        properties = tool.parameters.get("properties", {})
        right = st.fixed_dictionaries(
            {
                name: st.sampled_from(schema["enum"])
                if "enum" in schema
                else simple.get(schema.get("type"), strings)
                for name, schema in properties.items()
            }
        )
        names = st.sampled_from([*properties, "other"])
        wrong = st.dictionaries(names, JSON_VALUES | strings, max_size=3)
        return st.fixed_dictionaries({"name": st.just(tool.name), "arguments": right | wrong})

    calls = st.sampled_from(tools).flatmap(call)
    as_json = (calls | st.lists(calls, max_size=4) | JSON_VALUES).map(json.dumps)
    cut = st.tuples(as_json, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    return as_json | as_json | cut | st.text(max_size=60) | st.just("[" * 50_000)


def assert_answered(env: AgentEnv, given: Sequence[str]) -> None:
    """Each action has an observation, or the episode is over; none raises, and the state keeps its digest
    through a snapshot."""
    for action in given:
        if env.over:
            break
        observation, reward, *_ = env.step(action)
        assert isinstance(observation, str) and 0 <= reward <= 1
        observation.encode()  # no half of a surrogate pair, which no tokenizer takes
    assert env.fork().state_digest() == env.state_digest()
