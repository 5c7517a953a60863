"""What a teacher is, and what it gives: a closed set of signal types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from opd_agents.batch import Packed
from opd_agents.config.needs import Need
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.policies.base import Action, History, Policy


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The teacher's last hidden states before every action token of a packed batch, and its head.

    ``hidden`` [N, H], on any device, follows the order of the packed table; ``head`` maps it, on the
    student's device, to logits [N, V]. The full next-token distribution is thus available by chunk, without
    ever storing logits.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """The teacher's K most probable next tokens before every action token, as a server's API gives them.

    ``ids`` int64 [N, K], all different in a row; ``logprobs`` [N, K] and those of the action tokens,
    ``sampled`` [N], in nats of the teacher's whole distribution at the run's temperature, at least float32.
    The mass that is left over is 1 - sum(exp(logprobs)).
    """

    ids: Tensor
    logprobs: Tensor
    sampled: Tensor


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """The teacher's log-prob of every action token: ``logprobs`` [N] in nats at the run's temperature, at
    least float32."""

    logprobs: Tensor


TeacherSignal: TypeAlias = HiddenStates | TeacherTopK | SampledLogprobs

SERVES: Mapping[Need, tuple[type, ...]] = {
    "full": (HiddenStates,),
    "student_top_k": (HiddenStates,),
    "teacher_top_k": (HiddenStates, TeacherTopK),
    "sampled": (HiddenStates, TeacherTopK, SampledLogprobs),
}
WORDS: Mapping[Need, str] = {
    "full": "its full distributions (hidden states)",
    "student_top_k": "its log-probs of the student's top k (hidden states)",
    "teacher_top_k": "its top k (hidden states or TeacherTopK)",
    "sampled": "its log-probs of the sampled tokens",
}


class Teacher(Protocol):
    """What a run needs of a teacher; ``teacher.kind: module:name`` names a class like this.

    A run makes it as ``cls(path, chat, *, dtype, temperature, **options)`` from the section ``teacher``
    (``path`` is None without a ``model``) and the run's ``chat`` and sampling temperature. It must refuse
    another vocabulary than the chat's. ``LocalTeacher`` is one, and the easiest to derive from.
    """

    gives: ClassVar[frozenset[type]]  # the signals of this module that `score` may return; none: it only acts

    @property
    def greedy(self) -> Policy:
        """Acts at temperature 0: its action replaces the student's in a repair."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens scored plus tokens written, so far."""
        ...

    @property
    def flops(self) -> int:
        """Spent so far; 0 where that cannot be known."""
        ...

    def act(self, histories: Sequence[History]) -> list[Action]:
        """Act as a :class:`Policy`, where ``rollout.source`` asks for the teacher."""
        ...

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> TeacherSignal:
        """Its signal on finished trajectories, without gradient, ``max_tokens`` at most in a forward pass;
        with ``keep`` (bool [N]) only these tokens matter, and the others' values need only be finite. Called
        if it gives any signal."""
        ...


def check_serves(what: str, gives: AbstractSet[type], needs: AbstractSet[Need]) -> None:
    """Raise ConfigError unless every signal that a teacher may give serves everything that is needed of it;
    ``what`` is how a message calls the teacher."""
    for need, words in WORDS.items():
        if need in needs and not (gives and gives <= set(SERVES[need])):
            given = " or ".join(sorted(signal.__name__ for signal in gives)) or "no signal, it only acts"
            remedy = "take in the loss a signal that it has, as `signal: sampled`"
            if not gives:
                remedy = "imitate this teacher: rollout.source: teacher and a `ce` component"
            raise ConfigError(
                f"The loss needs of {what} {words}, but it gives {given}. Take `kind: local`, or {remedy}."
            )


def check_aligned(what: str, signal: TeacherSignal, gives: AbstractSet[type], size: int) -> None:
    """Raise AlignmentError unless the signal is of a type that the teacher ``gives`` and has one row for each
    of ``size`` action tokens; ConfigError for log-probs in half precision."""
    if type(signal) not in gives:
        raise AlignmentError(
            f"{what} gave a {type(signal).__name__}, which is not among what its class says that it `gives`."
        )
    match signal:
        case HiddenStates(hidden):
            tensors: tuple[Tensor, ...] = (hidden,)
            words = "hidden states"
        case TeacherTopK(ids, logprobs, sampled):
            tensors, words = (ids, logprobs, sampled), "rows of its top k"
        case SampledLogprobs(logprobs):
            tensors, words = (logprobs,), "log-probs"
    for tensor in tensors:
        if tensor.dtype in (torch.float16, torch.bfloat16) and not isinstance(signal, HiddenStates):
            raise ConfigError(
                f"{what} gave {tensor.dtype} log-probs, whose rounding is of the size of what is learned."
                " It must take its log-softmax in float32, or give hidden states, which may be of any type."
            )
        if len(tensor) != size:
            raise AlignmentError(
                f"{what} gave {len(tensor)} {words} for {size} action tokens: it must give one before every "
                "action token, in the order of the packed table."
            )
