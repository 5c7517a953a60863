"""Templates and tool-call syntaxes <-> token ids."""

from opd_agents.chat.chat import Chat
from opd_agents.chat.parsing import ParsedAction
from opd_agents.chat.templates import compact_template
from opd_agents.chat.word_tokenizer import build_word_tokenizer

__all__ = ["Chat", "ParsedAction", "build_word_tokenizer", "compact_template"]
