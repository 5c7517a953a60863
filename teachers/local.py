"""A white-box teacher in this process: scores finished trajectories once, and can act at any state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.batch import Packed
from opd_agents.chat import Chat
from opd_agents.config import Quantisation
from opd_agents.errors import ConfigError
from opd_agents.policies.base import Action, History, Policy
from opd_agents.policies.models import (
    Head,
    check_projection,
    fit_vocabulary,
    forward_flops,
    head,
    hidden_states,
    load_chat,
    load_model,
    load_tokenizer,
    local_device,
)
from opd_agents.policies.offload import Offloaded
from opd_agents.policies.quantised import round_weights
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.teachers.base import Capability, HiddenStates
from opd_agents.teachers.conditioning import ConditionedPolicy, Conditioner
from opd_agents.types import Actor


class ModelTeacher:
    """A model that is not trained: it scores, and acts at ``temperature`` or, as ``greedy``, at its best.

    ``weights`` is entered around all that the model computes. With a ``conditioner`` it acts on histories
    that tell it more; what it scores, the caller has conditioned.
    """

    can: ClassVar[frozenset[Capability]] = frozenset({Capability.HIDDEN_STATES, Capability.ACT})

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        temperature: float,
        *,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        conditioner: Conditioner | None = None,
    ) -> None:
        self.model, self.weights = model, weights
        self.sampler = TransformersSampler(
            model, chat.end_ids, actor=Actor.TEACHER, temperature=temperature, thinking=chat.thinking,
            weights=weights,
        )  # fmt: skip
        self.best = TransformersSampler(
            model, chat.end_ids, actor=Actor.TEACHER, temperature=0.0, thinking=chat.thinking, reuse=False,
            weights=weights,
        )  # fmt: skip
        self.acting: Policy = self.sampler
        self.greedy: Policy = self.best
        if conditioner is not None:
            self.acting = ConditionedPolicy(self.sampler, conditioner)
            self.greedy = ConditionedPolicy(self.best, conditioner)
        self.scored_tokens = 0
        self._scoring_flops = 0

    @property
    def tokens(self) -> int:
        """Tokens scored plus tokens written, so far."""
        return self.scored_tokens + self.sampler.generated_tokens + self.best.generated_tokens

    @property
    def flops(self) -> int:
        return self._scoring_flops + self.sampler.flops + self.best.flops

    def act(self, histories: Sequence[History]) -> list[Action]:
        return self.acting.act(histories)

    @torch.no_grad()
    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> HiddenStates:
        """Hidden states before every action token of the student's own histories, one pass per trajectory,
        put on the CPU; with ``keep`` (bool [N]) only of the rows that have such tokens, and of them alone,
        zeros elsewhere."""
        self.sampler.release()
        width = self.model.config.get_text_config().hidden_size
        hidden = torch.zeros(len(packed.target), width, dtype=self.model.dtype)
        with self.weights():
            for micro in packed.micro_batches(max_tokens, keep):
                states = hidden_states(self.model, micro.ids)[micro.row, micro.column]
                hidden[micro.tokens] = states.cpu()
                self.scored_tokens += micro.n_tokens
                self._scoring_flops += forward_flops(self.model, micro.n_tokens, micro.ids.shape[1] / 2)
        return HiddenStates(hidden, self.head())

    def head(self) -> Head:
        """What maps the scored hidden states to logits; it must stay as it is while they are used."""
        return head(self.model)


class LocalTeacher(ModelTeacher):
    """A checkpoint of the student's vocabulary and template; a ``chat.template`` of the run is for both.

    ``quantise`` rounds its weights; with ``offload`` its layers are on the GPU only while they compute.
    """

    def __init__(
        self,
        path: str,
        chat: Chat,
        *,
        dtype: str = "float32",
        temperature: float = 1.0,
        quantise: Quantisation | None = None,
        offload: bool = False,
        conditioner: Conditioner | None = None,
    ) -> None:
        """Raises CheckpointError for an unreadable checkpoint, ConfigError for one of another chat, and for
        ``offload`` without a GPU."""
        check_same_chat(path, chat)
        model = _loaded(path, dtype, quantise, offload)
        fit_vocabulary(model, chat.tokenizer, path)
        weights = Offloaded(model, local_device()) if offload else nullcontext
        with weights():
            check_projection(model, dtype)
        super().__init__(model, chat, temperature, weights=weights, conditioner=conditioner)


def _loaded(path: str, dtype: str, quantise: Quantisation | None, offload: bool) -> PreTrainedModel:
    """In full on the CPU alone where less of it shall come to the GPU."""
    if offload and local_device().type == "cpu":
        raise ConfigError(
            f"offload: the teacher {path} would rest in the CPU's memory while nobody asks it, but there is"
            " no GPU here, so that it computes there anyway. Leave `offload` out; with `quantise: int8` it"
            " takes less memory."
        )
    device = torch.device("cpu") if quantise or offload else local_device()
    model: Any = load_model(path, dtype, device).requires_grad_(False)
    if quantise:
        round_weights(model, quantise)
    prepared: PreTrainedModel = model if offload else model.to(local_device())
    return prepared


def check_same_chat(path: str, chat: Chat) -> None:
    """Raise ConfigError for a checkpoint of another vocabulary or chat template than the student's."""
    tokenizer = load_tokenizer(path)
    if tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise ConfigError(
            f"The teacher {path} has another vocabulary than the student, so it cannot score the "
            "student's tokens. Say `align: bytes`, by which it scores spans of text in its own tokens, or "
            "use a teacher with the student's tokenizer, or build the student with `student.build.tokenizer` "
            "set to the teacher's folder."
        )
    template = chat.template if chat.template_given else None  # the run's own is for both
    settings = {"template": template, "kwargs": chat.kwargs, "system": chat.system}
    if load_chat(path, tokenizer, settings).fingerprint != chat.fingerprint:
        raise ConfigError(
            f"The teacher {path} has another chat template than the student, so the student's prompts "
            "may not be what it knows. Give one for both, a .jinja file, as chat.template."
        )
