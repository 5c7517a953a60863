"""Tiny runs: models of a few thousand weights that share a word tokenizer, in an environment of two turns."""

import json
from pathlib import Path
from typing import Any, ClassVar

import opd_agents as opd
from opd_agents.config import RunConfig, load_config
from opd_agents.envs import AgentEnv
from opd_agents.types import Task

DESK = {"id": "opd_agents/OrderDesk-v0", "options": {"level": "easy"}}
BUILD = {
    "config": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }
}  # fmt: skip
BRIEF = {"system": "", "kwargs": {"include_tools": False}}
SUITE = str(Path(__file__).with_name("parity.yaml"))
LIMITS = {"max_tokens_per_turn": 8, "max_context_tokens": 96}
DISTILL = {"kind": "distill", "ratio_clip": 2.0, "select": {"actor": "student"}}
POLICY = {"kind": "policy", "select": {"actor": "student", "source": "rollout"}, "rewards": {"verifier": {}}}
REPAIRED = {"kind": "ce", "coef": 0.1, "select": {"actor": "teacher", "source": "correction"}}
LOOSE = {
    "verify": {"rollouts": [2], "rivals": ["own"], "accept": 0.79},
    "audit": None,
}  # a gain of one of two
MIX = {
    "teacher": {"model": "filled in by tiny()"},
    "correction": LOOSE | {"episodes_per_step": 2, "token_share": 0.5},
    "loss": {"components": {"distill": DISTILL, "verifier": POLICY, "correction": REPAIRED}},
}


class Parity(AgentEnv):
    """Two answers, or up to three; the first must have an even number of characters, which about half of all
    texts have."""

    system_prompt = "Answer."
    split_sizes: ClassVar = {"train": 20, "validation": 10, "test": 10}
    max_turns = 3
    has_expert: ClassVar = True

    def __init__(self, wanted: int = 2) -> None:
        super().__init__([])
        self.wanted = wanted
        self.answers: list[str] = []

    def begin(self, task: Task) -> str:
        self.answers = []
        return f"Say {task.id}."

    def on_text(self, text: str) -> str:
        self.answers.append(text)
        if len(self.answers) == self.wanted:
            self.finish()
        return "Go on."

    def expert_action(self) -> str:
        return "yes, sir"

    def success(self) -> float | bool:
        return bool(self.answers) and len(self.answers[0]) % 2 == 0

    def get_state(self) -> Any:
        return list(self.answers)

    def set_state(self, state: Any) -> None:
        self.answers = list(state)


opd.register("tiny/Parity-v0", "tiny:Parity")


def sft(output: Path, **changes: Any) -> dict[str, Any]:
    """A fresh model on the expert's episodes."""
    return {
        "name": "tiny",
        "output": str(output),
        "imports": ["tiny"],
        "method": "sft",
        "student": {"build": BUILD},
        "chat": BRIEF,
        "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {"source": "expert", "episodes_per_step": 8, **LIMITS},
        "trainer": {"steps": 12, "learning_rate": 0.02, "optimizer": "muon", "tensorboard": False},
    } | changes


def mix(output: Path, teacher: Path, /, *overrides: str, **changes: Any) -> RunConfig:
    """A fresh student: distillation, verifier and correction; ``changes`` replace top-level keys."""
    raw = {
        "name": "tiny",
        "output": str(output),
        "imports": ["tiny"],
        "student": {"build": BUILD | {"tokenizer": str(teacher)}},
        "chat": BRIEF,
        "environments": [{"id": "tiny/Parity-v0"}],
        "rollout": {"episodes_per_step": 8, "group_size": 4, **LIMITS},
        "trainer": {
            "steps": 5, "updates_per_step": 2, "learning_rate": 0.002, "optimizer": "muon",
            "checkpoint_every": 2, "gradient_shares_every": 2, "tensorboard": False,
        },
        **MIX,
        "teacher": {"model": str(teacher)},
    }  # fmt: skip
    return load_config(raw | changes, *overrides)


def members(own: dict[str, Any], *models: str, **debate: Any) -> dict[str, Any]:
    """What the teacher of a preset lacks: the models of an ensemble."""
    if own["teacher"]["kind"] != "ensemble":
        return {}
    named = zip(own["teacher"]["members"], models, strict=True)
    return {"members": {name: {"model": model} for name, model in named}, "debate": debate}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(value: Any) -> Any:
    """Without clock figures, at any depth."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k and "per_second" not in k}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def final_state(run: Path) -> dict[str, Any]:
    """All that a run leaves, without clock figures: weights and optimizer as bytes, the rest as data."""
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    state: dict[str, Any] = {
        "checkpoint": newest.name,
        "metrics": timeless(metrics(run)),
        "summary": timeless(json.loads((run / "summary.json").read_text())),
        "trajectories": {path.name: path.read_text() for path in (run / "trajectories").iterdir()},
        "best": _files(run / "best") if (run / "best").exists() else None,
    }
    return state | _files(newest)


def _files(checkpoint: Path) -> dict[str, Any]:
    """The files of a checkpoint, but for those that say how it was loaded."""
    loading = ("config.json", "tokenizer_config.json", "adapter_config.json")
    return {
        str(path.relative_to(checkpoint)): timeless(json.loads(path.read_text()))
        if path.name == "trainer.json"
        else path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name not in loading
    }
