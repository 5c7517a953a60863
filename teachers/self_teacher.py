"""The student itself as teacher, or as the reference to stay close to: as it was, or as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_agents.chat import Chat
from opd_agents.config import Self
from opd_agents.policies.adapters import adapter_off
from opd_agents.policies.models import Head
from opd_agents.teachers.conditioning import Conditioner
from opd_agents.teachers.local import ModelTeacher


class SameModelTeacher(ModelTeacher):
    """The very model that is trained, with no second copy of its weights: as it is now, or, made with
    ``weights`` that switch its adapter off, as the base that the adapter began from."""

    def head(self) -> Head:
        """As it is now, without gradient: updates may change the student's before the signal is used up. A
        head that is not trained (an adapter leaves it alone) is shared."""
        now = super().head()
        trained = any(parameter.requires_grad for parameter in now.projection.parameters())
        return _copied(now) if trained else now

    def after_step(self) -> None:
        """The student has been updated: what was cached of its past is void."""
        self.sampler.release()


class CopyTeacher(ModelTeacher):
    """A second model beside the student, with weights of its own for those that are trained; the frozen ones
    are shared. It begins as the student is when it is made.

    ``settings.weights``: ``frozen`` stays so. ``copy`` becomes the student after every ``every``-th step,
    ``previous`` what the student was at the last such step but one (its state between two is kept beside it).
    ``ema`` goes ``rate`` of the way to the student after each update, averaged in at least float32 (of
    bfloat16 weights the average stands beside the model, as an optimizer's masters do).
    """

    def __init__(
        self,
        student: PreTrainedModel,
        chat: Chat,
        settings: Self,
        temperature: float,
        *,
        conditioner: Conditioner | None = None,
    ) -> None:
        trained = [name for name, p in student.named_parameters() if p.requires_grad]
        shared: dict[int, object] = {id(p): p for p in student.parameters() if not p.requires_grad}
        model = copy.deepcopy(student, shared).requires_grad_(False)
        super().__init__(model, chat, temperature, conditioner=conditioner)
        self.settings = settings
        parameters = dict(model.named_parameters())
        self.own: dict[str, Tensor] = {name: parameters[name].data for name in trained}
        self.kept: dict[str, Tensor] = {}  # beside the model: the copy that teaches next, or the average
        if settings.weights == "previous":
            self.kept = {name: weight.clone() for name, weight in self.own.items()}
        if settings.weights == "ema":
            self.kept = {name: _at_least_float32(weight) for name, weight in self.own.items()}

    @property
    def follows_updates(self) -> bool:
        return self.settings.weights == "ema"

    def head(self) -> Head:
        return _copied(super().head()) if self.follows_updates else super().head()

    @torch.no_grad()
    def after_update(self, student: Iterable[tuple[str, Tensor]]) -> None:
        """Follow one optimizer step; ``student``: the trained weights by name."""
        assert self.settings.rate is not None  # of weights ema
        for name, weight in student:
            average = self.kept[name]
            average.lerp_(weight.to(average.dtype), self.settings.rate)
            if average is not self.own[name]:
                self.own[name].copy_(average)

    @torch.no_grad()
    def after_step(self, student: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Follow a training step, the ``step``-th (from 1); ``student``: the trained weights by name."""
        self.sampler.release()
        if self.settings.every is None or step % self.settings.every:
            return
        for name, weight in student:
            if self.settings.weights == "previous":
                self.own[name].copy_(self.kept[name])
                self.kept[name].copy_(weight)
            else:
                self.own[name].copy_(weight)

    def state(self) -> dict[str, Tensor]:
        """All that a resume needs, by a name for each tensor."""
        parts = {"kept": self.kept} if self.follows_updates else {"own": self.own, "kept": self.kept}
        return {f"{part}.{name}": w.contiguous() for part, own in parts.items() for name, w in own.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what :meth:`state` gave. Raises KeyError or RuntimeError for that of another model."""
        for part, own in (("own", self.own), ("kept", self.kept)):
            for name, weight in own.items():
                saved = "kept" if self.follows_updates else part
                weight.copy_(state[f"{saved}.{name}"])


def self_teacher(
    settings: Self,
    student: PreTrainedModel,
    chat: Chat,
    temperature: float,
    *,
    fresh_adapter: bool,
    conditioner: Conditioner | None = None,
) -> SameModelTeacher | CopyTeacher:
    """The teacher of ``kind: self``. ``fresh_adapter``: the student is an adapter that began as nothing, so
    that with the adapter off it is what it was at the start."""
    if settings.weights == "live":
        return SameModelTeacher(student, chat, temperature, conditioner=conditioner)
    if settings.weights == "frozen" and fresh_adapter:
        return SameModelTeacher(
            student, chat, temperature, weights=lambda: adapter_off(student), conditioner=conditioner
        )
    return CopyTeacher(student, chat, settings, temperature, conditioner=conditioner)


def _copied(now: Head) -> Head:
    return dataclasses.replace(now, projection=copy.deepcopy(now.projection).requires_grad_(False))


def _at_least_float32(weight: Tensor) -> Tensor:
    """The same tensor where it has 32 bits or more, else a float32 copy."""
    return weight if torch.finfo(weight.dtype).bits >= 32 else weight.float()
