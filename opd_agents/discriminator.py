"""Whose episode is it? A model with a scalar head that learns, beside the student, to tell the teacher's
episodes from the student's, and whose score is the student's reward (GAD, arXiv 2511.10643).

It reads token ids alone, so the teacher may be of any kind. An episode is read as the student saw it: the
prompt, every action, and between them what the environment said, up to the end of the last action, where the
head sits; of a history that is rendered anew, its last rendering. One score is of the whole episode.

It is a model of its own. The student's loss sees its scores as numbers, and its loss never meets a weight
that the student trains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_agents.batch import MicroBatch, Packed
from opd_agents.chat import Chat
from opd_agents.composition import group_numbers
from opd_agents.config import RunConfig
from opd_agents.config.sections import TrainerSettings
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.objectives import bradley_terry, episode_pairs
from opd_agents.optimizers import ModelOptimizer
from opd_agents.policies.models import (
    backward_flops,
    fit_vocabulary,
    forward_flops,
    hidden_states,
    load_merged,
    load_tokenizer,
)
from opd_agents.policies.recomputation import prepare_recomputation, recomputed
from opd_agents.runs import newest_checkpoint
from opd_agents.types import Outcome, Trajectory

FILE = "discriminator.pt"  # in a checkpoint
MEASURED = ("loss", "accuracy", "margin", "grad_norm", "learning_rate")  # as `discriminator/loss` and so on


class Reader(nn.Module):
    """A model's layers (``body``) and, instead of its head, one ``direction`` [H] in float32, at first zeros:
    before anything is learned all episodes have the score 0. A bias would add the same to all, which nothing
    can tell."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body
        width = body.config.get_text_config().hidden_size
        self.direction = nn.Parameter(torch.zeros(width, device=body.device))

    def forward(self, micro: MicroBatch) -> Tensor:
        """A score [n] for each token of a micro-batch: of all up to it, itself included."""
        hidden = hidden_states(self.body, micro.ids)[micro.row, micro.column + 1]
        scores: Tensor = hidden.to(self.direction.dtype) @ self.direction
        return scores


class Discriminator:
    """A ``reader`` and its optimizer, which is of the kind that the ``trainer``'s settings say, with their
    weight decay, clipping and micro-batches."""

    def __init__(self, body: PreTrainedModel, trainer: TrainerSettings) -> None:
        self.reader, self.trainer, self.flops = Reader(body), trainer, 0
        if trainer.gradient_checkpointing:
            prepare_recomputation(body)
        self.optimizer = ModelOptimizer(self.reader, trainer.optimizer, trainer.weight_decay)

    @torch.no_grad()
    def scores(self, packed: Packed, read: Tensor) -> Tensor:
        """Of each episode of the table (float32 [E], on the CPU); NaN of those that it is not to ``read``
        (bool [E]) or that have no action token. Raises AlignmentError for a score that is not finite."""
        result = torch.full((len(read),), math.nan)
        for micro in self._micro_batches(packed, read):
            scores = self.reader(micro).float().cpu()
            if not bool(scores.isfinite().all()):
                raise AlignmentError("The discriminator's scores are not finite; lower its learning_rate.")
            result[packed.episode[micro.tokens]] = scores
        return result

    def learn(
        self, packed: Packed, scores: Tensor, pairs: Sequence[tuple[int, int]], learning_rate: float
    ) -> dict[str, float | None]:
        """One update on the mean Bradley-Terry loss of ``pairs`` (teacher's episode, student's), and its
        metrics, all of before the update: ``accuracy`` is the share of pairs in which the teacher's has the
        higher score (where both have the same, half), ``margin`` the mean difference. Without pairs nothing
        is changed, and there is nothing to measure.

        ``scores`` [E] must be those of the present weights. Raises AlignmentError for a loss or gradient that
        is not finite."""
        row: dict[str, float | None] = {"discriminator/pairs": len(pairs)}
        row |= {f"discriminator/{key}": None for key in MEASURED}
        if not pairs:
            return row
        found = bradley_terry(scores, pairs)
        paired = torch.tensor(pairs)
        margin = scores[paired[:, 0]] - scores[paired[:, 1]]
        read = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, paired.flatten(), True)
        for micro in self._micro_batches(packed, read, backward=True):
            slopes = found.slopes[packed.episode[micro.tokens]].to(self.reader.direction.device)
            with recomputed(self.reader.body) if self.trainer.gradient_checkpointing else nullcontext():
                held = (self.reader(micro) * slopes).sum()
            held.backward()
            self.optimizer.collect()
        norm, loss = self.optimizer.clip(self.trainer.clip_norm), float(found.losses.mean())
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise AlignmentError(f"The discriminator's loss is {loss}, and its gradient has norm {norm}.")
        self.optimizer.step(learning_rate)
        accuracy = float(((margin > 0).float() + (margin == 0).float() / 2).mean())
        values = (loss, accuracy, float(margin.mean()), norm, learning_rate)
        return row | {f"discriminator/{key}": value for key, value in zip(MEASURED, values, strict=True)}

    def _micro_batches(self, packed: Packed, read: Tensor, backward: bool = False) -> Iterator[MicroBatch]:
        """The last action token of each episode that is to be read, in its row; their FLOPs are counted."""
        keep, lean = _last_tokens(packed, read), self.trainer.gradient_checkpointing
        for micro in packed.micro_batches(self.trainer.micro_batch_tokens, keep):
            size = (self.reader.body, micro.n_tokens, micro.ids.shape[1] / 2)
            self.flops += forward_flops(*size)
            if backward:
                self.flops += backward_flops(*size) + (forward_flops(*size) if lean else 0)
            yield micro

    def save(self, checkpoint: Path) -> None:
        """What it has learned, and its optimizer's state."""
        weights = {name: p.detach() for name, p in self.reader.named_parameters() if p.requires_grad}
        with (checkpoint / FILE).open("wb") as file:  # a file, so that a full disk is told as one
            torch.save({"weights": weights, "optimizer": self.optimizer.state_dict()}, file)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """What :meth:`save` wrote, bit for bit. Raises whatever a broken file makes torch raise, and KeyError
        or RuntimeError for that of another model."""
        state = torch.load(checkpoint / FILE, map_location="cpu")
        for name, parameter in self.reader.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def make_discriminator(config: RunConfig, student: PreTrainedModel, chat: Chat) -> Discriminator | None:
    """That of the config, if it has one, as it is before it has learned: from the ``student`` as it is now,
    whose frozen weights it shares, or from a checkpoint. Raises UserError for one that cannot be loaded or
    has another vocabulary."""
    settings = config.discriminator
    if settings is None:
        return None
    if settings.model is None:
        body = cast(PreTrainedModel, student.base_model)
        frozen: dict[int, object] = {id(p): p for p in body.parameters() if not p.requires_grad}
        return Discriminator(copy.deepcopy(body, frozen), config.trainer)
    path = newest_checkpoint(settings.model)
    tokenizer = load_tokenizer(path)
    if tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise ConfigError(
            f"discriminator.model: {path} has another vocabulary than the student, whose token ids it is to"
            " read. Take one of the student's family, or leave it out: then it begins as the student."
        )
    model = load_merged(path, config.student.dtype)
    fit_vocabulary(model, tokenizer, path)
    return Discriminator(cast(PreTrainedModel, model.base_model), config.trainer)


def compared(trajectories: Sequence[Trajectory]) -> Tensor:
    """Which episodes are scored (bool [E]): those of a group, the student's and the demonstrations to it. Not
    repairs and recordings, nor what failed in its environment or was replaced."""
    left_out = [t.branch or t.recorded or t.replaced or t.outcome is Outcome.ERROR for t in trajectories]
    return torch.tensor([bool(t.group) and not out for t, out in zip(trajectories, left_out, strict=True)])


def teacher_student_pairs(trajectories: Sequence[Trajectory], scored: Tensor) -> list[tuple[int, int]]:
    """Each demonstration with every episode of the student's in its group, of those that are ``scored``."""
    shown = torch.tensor([t.demonstration for t in trajectories], dtype=torch.bool)
    return episode_pairs(group_numbers(trajectories), scored & shown, scored & ~shown)


def _last_tokens(packed: Packed, read: Tensor) -> Tensor:
    """The last action token (bool [N]) of each episode that is to be ``read`` (bool [E])."""
    places = torch.arange(len(packed.episode))
    last = torch.full((len(read),), -1).scatter_reduce(0, packed.episode, places, "amax")
    return torch.zeros(len(places), dtype=torch.bool).index_fill(0, last[read & (last >= 0)], True)
