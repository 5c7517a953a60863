"""An episode as chat messages for a model that reads text: whoever acted, its actions are the assistant's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from opd_agents.messages import Conversation, to_row
from opd_agents.types import Message, ToolSpec, Turn


def messages_of(
    opening: Sequence[Message], turns: Sequence[Turn], tools: Sequence[ToolSpec], system: str | None = None
) -> tuple[dict[str, Any], ...]:
    """OpenAI's messages, the calls with ids; ``system`` replaces the system prompt, an empty one is left out.

    Thoughts are not shown. What an endpoint would refuse as a call (of a tool that is none of ``tools``, or
    that nothing answered) stands there as text, as does what the environment could not read.
    """
    prompt = system if system is not None else "".join(m.content for m in opening if m.role == "system")
    shown = [message for message in opening if message.role != "system"]
    names = {tool.name for tool in tools}
    shown += [message for turn in turns for message in _shown(turn, names)]
    row = to_row(Conversation(prompt, (), tuple(shown), (True,) * len(shown)))
    return tuple(row["messages"])


def _shown(turn: Turn, names: AbstractSet[str]) -> Iterator[Message]:
    answers = [message for message in turn.messages if message.role == "tool"]
    if turn.calls and len(answers) == len(turn.calls) and {call.name for call in turn.calls} <= names:
        yield Message("assistant", "", turn.calls)
        yield from turn.messages
        return
    yield Message("assistant", turn.text if turn.parse_error else turn.action)
    for message in turn.messages:
        yield Message("user", message.content)
