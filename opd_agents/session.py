"""What a training stage holds (models, optimizers, task counts, totals), and its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_agents import envs
from opd_agents.chat import Chat, build_word_tokenizer
from opd_agents.config import ChatSettings, EnvironmentSource, Recorded, RunConfig
from opd_agents.errors import AlignmentError
from opd_agents.evaluation import load_suite
from opd_agents.optimizers import build_optimizers, set_learning_rate
from opd_agents.policies import ExpertPolicy, MixturePolicy, Policy
from opd_agents.policies.models import (
    build_model,
    check_vocabulary,
    head,
    hidden_states,
    load_chat,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.rollout import Limits, rollout
from opd_agents.runs import RunFolder, checkpoints_in, latest_checkpoint
from opd_agents.schedules import value_at
from opd_agents.tasks import draw_episodes, split_sizes
from opd_agents.teachers.local import LocalTeacher
from opd_agents.types import Actor

TOTALS = ("generated_tokens", "correction_tokens", "teacher_tokens", "flops", "seconds")
TOKENIZER_EPISODES = 500  # expert episodes that a fresh tokenizer's vocabulary is read from


@dataclass
class Session:
    config: RunConfig
    folder: RunFolder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    teacher: LocalTeacher | None
    task_counts: list[int]
    optimizers: list[Optimizer]
    student_sampler: TransformersSampler
    step: int = 0
    updates: int = 0
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))
    evaluation_at_start: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None  # the newest

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        rollout = self.config.rollout
        self.limits = Limits(
            rollout.max_tokens_per_turn, rollout.max_context_tokens, rollout.max_turns, rollout.step_timeout
        )
        self.behaviour = self._behaviour()
        distils = any(component.kind == "distill" for component in self.config.loss.components.values())
        self.needs_signal = distils or self.config.correction is not None
        self._counted = {"teacher_tokens": 0, "flops": 0}  # of the counters below, in the totals already

    def _behaviour(self) -> Policy:
        policies: dict[str, Policy] = {"student": self.student_sampler, "expert": ExpertPolicy()}
        if self.teacher is not None:
            policies["teacher"] = self.teacher
        source = self.config.rollout.source
        if isinstance(source, str):
            return policies[source]
        if isinstance(source, Recorded):
            return self.student_sampler
        return MixturePolicy({name: (policies[name], share) for name, share in source.items()})

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by FLOPs, whichever ends it first."""
        trainer = self.config.trainer
        by_flops = self.totals["flops"] / trainer.flops if trainer.flops else 0.0
        return max(self.step / trainer.steps, by_flops)

    @property
    def learning_rate(self) -> float:
        trainer = self.config.trainer
        warmup = min(1.0, (self.step + 1) / (trainer.warmup_steps + 1))
        return warmup * value_at(trainer.learning_rate, self.progress)

    def optimizer_step(self) -> None:
        set_learning_rate(self.optimizers, self.learning_rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.updates += 1

    def advance(self, generated_tokens: int, correction_tokens: int) -> None:
        """To the next step, with a new policy version; adds the step's tokens and FLOPs to the totals (those
        of scoring and updates were added where they were spent)."""
        self.step += 1
        self.student_sampler.reset(self.step)
        self.totals["generated_tokens"] += generated_tokens + correction_tokens
        self.totals["correction_tokens"] += correction_tokens
        counted = {"teacher_tokens": 0, "flops": self.student_sampler.flops}
        if self.teacher is not None:
            counted = {"teacher_tokens": self.teacher.tokens, "flops": counted["flops"] + self.teacher.flops}
        for key, value in counted.items():
            self.totals[key] += value - self._counted[key]
        self._counted = counted

    def evaluation_row(self) -> dict[str, float]:
        result = self.evaluation or {}
        low, high = result["interval"]
        return {
            "eval/success": result["success"], "eval/success_low": low, "eval/success_high": high,
            "eval/success_greedy": result["success_greedy"],
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """A Hugging Face checkpoint plus what a resume needs."""
        settings = {"kwargs": self.chat.kwargs, "system": self.chat.system}
        self.tokenizer.chat_template = self.chat.template  # also when the config gave another one
        save_checkpoint(folder, self.model, self.tokenizer, settings)
        with (folder / "optimizer.pt").open("wb") as file:  # a file, so that a full disk is told as one
            torch.save([optimizer.state_dict() for optimizer in self.optimizers], file)
        counts = {"step": self.step, "updates": self.updates, "totals": self.totals}
        state = counts | {"evaluation_at_start": self.evaluation_at_start, "evaluation": self.evaluation}
        (folder / "trainer.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        self.step, self.updates, self.totals = state["step"], state["updates"], state["totals"]
        self.evaluation_at_start, self.evaluation = state["evaluation_at_start"], state["evaluation"]
        self.student_sampler.policy_version = self.step
        for optimizer, saved in zip(self.optimizers, torch.load(folder / "optimizer.pt"), strict=True):
            optimizer.load_state_dict(saved)


def check_inputs(config: RunConfig) -> None:
    """Raise UserError for what a stage names and does not exist, before a folder is made or a step taken."""
    split_sizes(config.environments)
    if config.evaluation:
        split, measured = config.evaluation.split, load_suite(config.evaluation.suite).environments
        split_sizes([EnvironmentSource(id=e.id, options=e.options, split=split) for e in measured])
    student, paths = config.student, [config.teacher.model if config.teacher else None]
    if not checkpoints_in(config.folder):
        paths.append(student.build.tokenizer if student.build else student.model)
    for path in filter(None, paths):
        load_tokenizer(newest_checkpoint(path))


def newest_checkpoint(path: str) -> str:
    """Of a run folder its newest checkpoint; a checkpoint, or the id of a model on the hub, as it is."""
    local = Path(path)
    beside_others = len(local.parts) > 1 and local.parent.is_dir()  # runs/techer is a slip, not an id
    may_be_id = path.count("/") < 2 and not path.startswith((".", "/")) and not beside_others
    return path if may_be_id and not local.exists() else str(latest_checkpoint(local))


def load_session(config: RunConfig, folder: RunFolder) -> Session:
    """Everything a stage needs, from its start or from the folder's newest checkpoint."""
    checkpoints = folder.checkpoints()
    model, tokenizer, chat = _student(config, str(checkpoints[-1]) if checkpoints else None)
    check_projection(model, config.student.dtype)
    teacher = None
    if config.teacher is not None:
        path = newest_checkpoint(config.teacher.model)
        teacher = LocalTeacher(path, chat, dtype=config.teacher.dtype, temperature=config.rollout.temperature)
    session = Session(
        config, folder, model, tokenizer, chat, teacher, split_sizes(config.environments),
        build_optimizers(model, config.trainer.optimizer, config.trainer.weight_decay),
        TransformersSampler(model, chat.end_ids, actor=Actor.STUDENT, temperature=config.rollout.temperature),
    )  # fmt: skip
    if checkpoints:
        session.load(checkpoints[-1])
    return session


def _student(
    config: RunConfig, checkpoint: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Chat]:
    chat = config.chat
    settings: dict[str, Any] = {"template": chat.template, "kwargs": chat.kwargs, "system": chat.system}
    build = config.student.build
    if checkpoint is None and build is not None:
        shared = build.tokenizer
        tokenizer = load_tokenizer(newest_checkpoint(shared)) if shared else _fresh_tokenizer(config)
        model = build_model(build.model_type, build.config, tokenizer, config.seed)
        return model, tokenizer, Chat(tokenizer, **settings)
    path = checkpoint or newest_checkpoint(str(config.student.model))
    tokenizer, model = load_tokenizer(path), load_model(path, config.student.dtype)
    check_vocabulary(model, tokenizer, path)
    return model, tokenizer, load_chat(path, tokenizer, settings if chat != ChatSettings() else None)


def _fresh_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """A word-level tokenizer read off the scripted expert's episodes of the training split."""
    sizes = split_sizes(config.environments)
    draw = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(
                update={"episodes_per_step": TOKENIZER_EPISODES, "group_size": 1}
            )
        }
    )
    episodes = draw_episodes(draw, 0, sizes)
    trajectories = rollout(
        episodes, ExpertPolicy(), make=envs.make, chat=None, limits=Limits(), temperature=1.0
    )
    texts = [m.content for t in trajectories for m in t.messages if m.role == "user"]
    texts += [text for t in trajectories for turn in t.turns for text in (turn.action, turn.observation)]
    return build_word_tokenizer(texts)


def check_projection(model: PreTrainedModel, dtype: str) -> None:
    """Head on last hidden states must give ``model(...).logits`` (a soft cap or scaling would not)."""
    ids = torch.arange(min(16, model.config.vocab_size))[None]
    with torch.no_grad():
        ours = head(model)(hidden_states(model, ids)).float()
        gap = float((ours - model(input_ids=ids).logits.float()).abs().max())
    if gap > (1e-4 if dtype == "float32" else 0.1):
        raise AlignmentError(
            f"{type(model).__name__}: the head on the last hidden states differs by {gap:.3g} from the "
            "model's own logits, so token losses would be of another model."
        )
