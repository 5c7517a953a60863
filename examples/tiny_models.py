"""Two small random Qwen3 checkpoints with one byte-level tokenizer, to try every command without a download.

    python examples/tiny_models.py DIR [ENV_ID]

DIR/teacher and DIR/student are ordinary Hugging Face folders, and like those of one published family: the
tokenizer splits bytes, the embedding tables are padded, for the order desk to 640 and to 608 rows. Their
weights know nothing.
"""

import argparse
from pathlib import Path

import drawer  # noqa: F401  # registers examples/Drawer-v0
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import opd_agents as opd
from opd_agents.chat import compact_template
from opd_agents.episode import Episode, Limits
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.models import build_model
from opd_agents.rollout import rollout
from opd_agents.types import Task, to_json

DESK = "opd_agents/OrderDesk-v0"
COMMON = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    "initializer_range": 0.1, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES = {
    "teacher": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4},
    "student": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
}
ROWS = {"teacher": 128, "student": 32}  # the embedding tables have a multiple of so many rows


def texts(env_id: str, episodes: int = 200) -> list[str]:
    """What is said in an environment; the tokenizer's merges come from it, other texts only become longer."""
    tasks = [Task(str(i), "train") for i in range(episodes)]
    drawn = [Episode(task.id, env_id, i, task, (0, 0, i)) for i, task in enumerate(tasks)]
    played = rollout(drawn, ExpertPolicy(), make=opd.make, chat=None, limits=Limits(), temperature=1.0)
    said = [message.content for t in played for message in t.messages]
    said += [text for t in played for turn in t.turns for text in (turn.action, turn.observation)]
    return said + 10 * [to_json(tool) for tool in opd.make(env_id).tools]  # they stand in every prompt


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """As real tokenizers are: byte pairs learned from text, digits one by one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"], chat_template=compact_template(),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def main(folder: Path, env_id: str) -> None:
    tokenizer = byte_level_tokenizer(texts(env_id))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        model = build_model("qwen3", COMMON | shape, tokenizer, seed)
        torch.manual_seed(seed)  # for the rows of padding
        model.resize_token_embeddings(pad_to_multiple_of=ROWS[name], mean_resizing=False)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{folder / name}: {model.num_parameters():,} weights, {len(tokenizer)} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write two small random checkpoints, teacher and student.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("env_id", metavar="ENV_ID", nargs="?", default=DESK)
    given = parser.parse_args()
    main(given.folder, given.env_id)
