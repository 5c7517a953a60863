"""Two small random Qwen3 checkpoints with one byte-level tokenizer, to try every command without a download.

    python examples/tiny_models.py DIR [ENV_ID]

DIR/teacher and DIR/student are ordinary Hugging Face folders, as a downloaded model would be.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import opd_agents as opd
from opd_agents.chat import compact_template
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.models import build_model, save_checkpoint
from opd_agents.rollout import Episode, Limits, rollout
from opd_agents.types import Task, to_json

SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
SHAPES = {
    "teacher": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4},
    "student": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
}


def texts_of(env_id: str, episodes: int = 200) -> list[str]:
    """What is said in the scripted expert's episodes of the training split."""
    tasks = [Task(str(i), "train") for i in range(episodes)]
    drawn = [Episode(task.id, env_id, i, task, (0, 0, i)) for i, task in enumerate(tasks)]
    played = rollout(drawn, ExpertPolicy(), make=opd.make, chat=None, limits=Limits(), temperature=1.0)
    texts = [message.content for t in played for message in t.messages]
    texts += [text for t in played for turn in t.turns for text in (turn.action, turn.observation)]
    return texts + 10 * [to_json(tool) for tool in opd.make(env_id).tools]  # they stand in every prompt


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """As real tokenizers are: byte pairs learned from text, digits one by one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"pad_token": SPECIALS[0], "eos_token": SPECIALS[2]})
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIALS[1]]})
    tokenizer.chat_template = compact_template()
    return tokenizer


def main(folder: Path, env_id: str) -> None:
    tokenizer = byte_level_tokenizer(texts_of(env_id))
    common = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
        "initializer_range": 0.1, "max_position_embeddings": 4096,
    }  # fmt: skip
    for seed, (name, shape) in enumerate(SHAPES.items()):
        model = build_model("qwen3", common | shape, tokenizer, seed)
        save_checkpoint(folder / name, model, tokenizer, {})
        print(f"{folder / name}: {model.num_parameters():,} weights, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "opd_agents/OrderDesk-v0")
