"""Tool-call syntaxes: what families of models write for a call <-> ToolCall."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from opd_agents.chat.syntaxes.base import Found, Syntax, bad
from opd_agents.chat.syntaxes.code import CODE, code_syntax
from opd_agents.chat.syntaxes.deepseek import DEEPSEEK
from opd_agents.chat.syntaxes.glm import GLM
from opd_agents.chat.syntaxes.gpt_oss import GPT_OSS
from opd_agents.chat.syntaxes.hermes import HERMES, QWEN
from opd_agents.chat.syntaxes.llama_json import LLAMA_JSON
from opd_agents.chat.syntaxes.mistral import MISTRAL, MISTRAL_ARGS
from opd_agents.chat.syntaxes.plain_json import PLAIN_JSON
from opd_agents.chat.syntaxes.pythonic import LFM, PYTHONIC
from opd_agents.chat.syntaxes.qwen_xml import QWEN_XML
from opd_agents.errors import ConfigError
from opd_agents.types import ToolCall

_ALL = (
    *(HERMES, QWEN, QWEN_XML, GLM, DEEPSEEK, MISTRAL, MISTRAL_ARGS, GPT_OSS),
    *(LLAMA_JSON, PYTHONIC, LFM, PLAIN_JSON, CODE),
)
SYNTAXES: Mapping[str, Syntax] = MappingProxyType({syntax.name: syntax for syntax in _ALL})

__all__ = ["SYNTAXES", "Found", "Syntax", "bad", "code_syntax", "detect_syntax", "find_syntax"]


def detect_syntax(written: str, calls: Sequence[ToolCall]) -> Syntax | None:
    """The syntax in which a template wrote ``calls`` in ``written``, its text of an assistant turn.

    The first that reads exactly these calls there; of several, one that would have written the same.
    """
    readers = [syntax for syntax in SYNTAXES.values() if _reads(syntax, written, calls)]
    return next((syntax for syntax in readers if syntax.render(calls) in written), next(iter(readers), None))


def find_syntax(name: str) -> Syntax:
    """The syntax of a name; ``code:TOOL.ARGUMENT`` is code as action with a tool of another name.

    Raises ConfigError.
    """
    if match := re.fullmatch(r"code:(\w+)\.(\w+)", name):
        return code_syntax(match[1], match[2], name)
    if name not in SYNTAXES:
        known = ", ".join(("auto", *SYNTAXES, "code:TOOL.ARGUMENT"))
        raise ConfigError(f"chat.syntax: there is no syntax {name!r}; there are {known}.")
    return SYNTAXES[name]


def _reads(syntax: Syntax, written: str, calls: Sequence[ToolCall]) -> bool:
    found = syntax.parse(written)
    # Bare JSON is read whatever the syntax, and is a syntax of its own.
    return _plain(found.calls) == _plain(calls) and (not found.bare or syntax is PLAIN_JSON)


def _plain(calls: Sequence[ToolCall]) -> str:
    return json.dumps([(call.name, dict(call.arguments)) for call in calls])  # unlike ==, 1 is not True
