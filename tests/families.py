"""Published chat templates, as the installed trl ships them, with small byte-level tokenizers that have each
family's special tokens."""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_agents.chat import Chat
from opd_agents.types import Message, ToolCall, ToolSpec

# Of Qwen2; Llama 3, GLM and gpt-oss split much alike. Newlines before a word stay one piece.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """``special`` tokens are told apart from ``plain`` added ones, which decoding never skips."""

    bos: str | None
    eos: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()


QWEN = Family(
    None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>"),
    ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)  # fmt: skip
LLAMA = Family(
    "<|begin_of_text|>", "<|eot_id|>",
    ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
)  # fmt: skip
DEEPSEEK = Family(
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", (),  # noqa: RUF001
    ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",  # noqa: RUF001
     "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",  # noqa: RUF001
     "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),  # noqa: RUF001
)  # fmt: skip
FAMILIES = {
    "qwen2_5": QWEN, "qwen3": QWEN, "qwen3_instruct_2507": QWEN, "qwen3_5_think": QWEN, "qwen3_6": QWEN,
    "llama3_1": LLAMA, "llama3_2": LLAMA, "deepseekv3": DEEPSEEK, "deepseek_r1_distill": DEEPSEEK,
    "gemma3": Family("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "glm4moe": Family(
        None, "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
         "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "gptoss": Family(
        "<|startoftext|>", "<|return|>",
        ("<|endoftext|>", "<|start|>", "<|end|>", "<|call|>", "<|message|>", "<|channel|>", "<|constrain|>"),
    ),
}  # fmt: skip


# What a template spells as a marker of its own.
MARKER = re.compile(r"<\|[^\s'\"{}]+?\|>|</?[a-z_]+>|<[|｜][^\s'\"{}<>]+[|｜]?>|\[/?[A-Z_]+\]|<\w+\|>")  # noqa: RUF001
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "gemma4": "<turn|>", "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "phi3": "<|end|>", "muse": "<|eot|>",
    "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>",
}  # fmt: skip


def published() -> list[str]:
    """The names of all templates that trl ships."""
    folder = resources.files("trl") / "chat_templates"
    return sorted(path.name.removesuffix(".jinja") for path in folder.iterdir() if ".jinja" in path.name)


def family_of(name: str) -> Family:
    """A template's family; of one that is not in FAMILIES the markers that its text spells are tokens."""
    known = FAMILIES.get(name) or FAMILIES.get(name.removesuffix("_training"))
    if known is not None:
        return known
    found = set(MARKER.findall(template(name)))
    end = next((end for start, end in ENDS.items() if name.startswith(start)), "<|im_end|>")
    plain = {token for token in found if re.fullmatch(r"</?[a-z_]+>", token)}
    return Family(
        "<bos>" if "bos_token" in template(name) else None, end,
        tuple(sorted(found - plain - {end, "<bos>"})), tuple(sorted(plain)),
    )  # fmt: skip


def template(name: str) -> str:
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    family = family_of(name)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [token for token in (family.bos, family.eos, *family.special) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([template(name).replace(r"\n", "\n"), "\n\n\n"], trainer)
    core.add_tokens(list(family.plain))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=family.bos, eos_token=family.eos,
        extra_special_tokens=list(family.special), chat_template=template(name),
    )  # fmt: skip


@cache
def _chat(name: str, settings: str) -> Chat:
    return Chat(tokenizer(name), **json.loads(settings))


def chat(name: str, **settings: Any) -> Chat:
    """The chat of a family with its published template; equal settings share one."""
    return _chat(name, json.dumps(settings))


def openai(message: Message, *, json_arguments: bool = False) -> dict[str, Any]:
    """A message as users of ``apply_chat_template`` write it."""

    def function(call: ToolCall) -> dict[str, Any]:
        arguments = dict(call.arguments)
        return {"name": call.name, "arguments": json.dumps(arguments) if json_arguments else arguments}

    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        data["tool_calls"] = [{"type": "function", "function": function(call)} for call in message.tool_calls]
    if message.reasoning is not None:
        data["reasoning_content"] = message.reasoning
    return data


def openai_tool(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
