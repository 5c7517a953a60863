"""A tokenizer of bytes and markers, and chats over it with published templates."""

from functools import cache
from importlib import resources
from typing import Any

from opd_agents.chat import Chat

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SPECIAL = (
    *("<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|eot|>", "<|eom|>"),
    *("[INST]", "[/INST]", "[THINK]", "[/THINK]"),
)


@cache
def byte_tokenizer(eos: str = "<|im_end|>", marked: bool = True) -> Any:
    """Every byte is a token, and every marker; without ``marked`` a marker of thought is its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.add_tokens(list(MARKERS if marked else MARKERS[2:]))
    return tokenizer


def published(name: str) -> str:
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def chat_of(name: str, *, eos: str = "<|im_end|>", marked: bool = True, **settings: Any) -> Chat:
    return Chat(byte_tokenizer(eos, marked), template=published(name), **settings)
