"""Recorded conversations against TRL's own preprocessing for supervised fine-tuning.

The templates are those of the installed trl, some of which rewrite history.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from test_recordings import COMPLETION, OPENAI, TRL, ids_of

from opd_agents.chat import Chat
from opd_agents.messages import read_conversation
from opd_agents.recordings import to_trajectory
from opd_agents.types import Task, Trajectory

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# Thoughts in every turn, two calls at once, an answer to each.
THINKING: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Where are A1 and B2?"},
        {
            "role": "assistant",
            "content": "I shall look.",
            "reasoning_content": "Two orders.",
            "tool_calls": [
                {"type": "function", "function": {"name": "lookup", "arguments": {"order": order}}}
                for order in ("A1", "B2")
            ],
        },
        {"role": "tool", "content": "sent"},
        {"role": "tool", "content": "lost"},
        {"role": "assistant", "content": "Sent and lost.", "reasoning_content": "Now I know."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "You are welcome.", "reasoning_content": "Be polite."},
    ],
    "tools": OPENAI["tools"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes with some merges, and the markers of the templates below as tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([json.dumps(row) for row in (OPENAI, TRL, COMPLETION, THINKING)], trainer)
    core.add_tokens([AddedToken(text, normalized=False) for text in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL), clean_up_tokenization_spaces=False,
    )  # fmt: skip


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def recorded(chat: Chat, row: dict[str, Any]) -> Trajectory:
    return to_trajectory(read_conversation(row, "row"), chat, uid="t", task=Task("0", "train"))


def actions(trajectory: Trajectory) -> list[bool]:
    """Of every id, whether it is an action's."""
    marks: list[bool] = []
    for turn in trajectory.turns:
        marks += [False] * len(turn.context_ids) + [True] * len(turn.action_ids)
    return marks


def as_trl_wants(row: dict[str, Any]) -> tuple[list[Any], Any]:
    """TRL takes arguments as mappings."""
    messages = json.loads(json.dumps(row.get("messages") or row["prompt"] + row["completion"]))
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = "".join(part["text"] for part in message["content"])
        message["content"] = message.get("content") or ""
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    tools = row.get("tools")
    return messages, json.loads(tools) if isinstance(tools, str) else tools


CASES = [
    *((name, row) for name in ("qwen2_5", "qwen3", "qwen3_instruct_2507") for row in (OPENAI, TRL, THINKING)),
    *(("glm4moe", row) for row in (OPENAI, TRL)),  # with earlier thoughts: below
]


@pytest.mark.parametrize(("name", "row"), CASES)
def test_tokens_and_mask_are_those_of_trl(tokenizer: Any, name: str, row: dict[str, Any]) -> None:
    from trl.trainer.sft_trainer import _tokenize

    messages, tools = as_trl_wants(row)
    theirs = _tokenize(
        tokenizer, messages, tools=tools, chat_template=template(f"{name}_training"),
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    trajectory = recorded(Chat(tokenizer, template=template(name)), row)
    ids, mine = ids_of(trajectory), actions(trajectory)
    assert theirs["input_ids"][: len(ids)] == ids
    assert tokenizer.decode(theirs["input_ids"][len(ids) :]) in ("", "\n")
    marks = list(zip(ids, mine, theirs["assistant_masks"], strict=False))
    assert not [i for i, action, trained in marks if action and not trained]
    # TRL learns the newlines around a turn too, which no policy writes: the template gives them.
    assert {tokenizer.decode([i]) for i, action, trained in marks if trained and not action} <= {"\n"}


@pytest.mark.parametrize("name", ["qwen3", "glm4moe"])
def test_a_template_that_strips_thoughts_gives_segments_with_the_same_actions(
    tokenizer: Any, name: str
) -> None:
    anew = recorded(Chat(tokenizer, template=template(name), history="template"), THINKING)
    appended = recorded(Chat(tokenizer, template=template(name)), THINKING)
    # The thoughts of the first two turns go with the next user's message.
    assert list(anew.segments()) == [(0, 2), (2, 3)] and list(appended.segments()) == [(0, 3)]
    assert [turn.action_ids for turn in anew.turns] == [turn.action_ids for turn in appended.turns]
    messages, tools = as_trl_wants(THINKING)
    text = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template(name), tokenize=False)
    # Without the end token, which GLM's template leaves to the next role's opening.
    last = [*anew.turns[2].context_ids, *anew.turns[2].action_ids[:-1]]
    assert tokenizer.encode(text, add_special_tokens=False)[: len(last)] == last
    assert "Two orders." not in tokenizer.decode(last) and "Be polite." in tokenizer.decode(last)
