"""What a teacher is, what it can, and what it gives: a closed set of signal types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
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


@dataclass(frozen=True, slots=True)
class SpanLogprobs:
    """The log-probs of a teacher with another tokenizer, which it has of whole spans of the action tokens.

    ``logprobs`` [N] in nats, at least float32: that of a token's span in equal shares, so that sums over
    whole spans are the teacher's own. ``joined`` (bool [N]): the token is of the span of the one before it.
    """

    logprobs: Tensor
    joined: Tensor

    @property
    def spans(self) -> Tensor:
        """The span of every token, int64 [N], numbered in their order."""
        return (~self.joined).cumsum(0) - 1


TeacherSignal: TypeAlias = HiddenStates | TeacherTopK | SampledLogprobs | SpanLogprobs


class Capability(StrEnum):
    """What a teacher is able to: give a signal, take the agent's turns, or judge its actions in words."""

    SPAN_LOGPROBS = "span_logprobs"
    SAMPLED_LOGPROBS = "sampled_logprobs"
    TEACHER_TOP_K = "teacher_top_k"
    HIDDEN_STATES = "hidden_states"
    ACT = "act"
    JUDGE = "judge"


SIGNALS: Mapping[type, Capability] = {
    SpanLogprobs: Capability.SPAN_LOGPROBS,
    SampledLogprobs: Capability.SAMPLED_LOGPROBS,
    TeacherTopK: Capability.TEACHER_TOP_K,
    HiddenStates: Capability.HIDDEN_STATES,
}
SERVES: Mapping[Need, frozenset[Capability]] = {
    "full": frozenset({Capability.HIDDEN_STATES}),
    "student_top_k": frozenset({Capability.HIDDEN_STATES}),
    "teacher_top_k": frozenset({Capability.HIDDEN_STATES, Capability.TEACHER_TOP_K}),
    "sampled": frozenset(SIGNALS.values()) - {Capability.SPAN_LOGPROBS},
    "spans": frozenset(SIGNALS.values()),
}
WORDS: Mapping[Need, str] = {
    "full": "its full distributions",
    "student_top_k": "its log-probs of the student's top k",
    "teacher_top_k": "its top k",
    "sampled": "its log-probs of the sampled tokens",
    "spans": "its log-probs of what was sampled",
}


class Teacher(Protocol):
    """What a run needs of a teacher; ``teacher.kind: module:name`` names a class like this.

    A run makes it as ``cls(path, chat, *, dtype, temperature, **options)`` from the section ``teacher``
    (``path`` is None without a ``model``) and the run's ``chat`` and sampling temperature. It must refuse
    another vocabulary than the chat's. Of the methods it needs those of what it ``can``, and ``tokens`` and
    ``flops``; one that can ``judge`` has a ``client`` (:class:`opd_agents.judging.Asks`). ``LocalTeacher`` is
    one, and the easiest to derive from.
    """

    can: ClassVar[frozenset[Capability]]  # of several signals, which one `score` returns is up to its options

    @property
    def greedy(self) -> Policy:
        """Acts at temperature 0, if it can ``act``: its action replaces the student's in a repair."""
        raise _unable(self, "act")

    @property
    def tokens(self) -> int:
        """Tokens scored plus tokens written, so far."""
        ...

    @property
    def flops(self) -> int | None:
        """Spent so far; None where that cannot be known: its ``tokens`` are then told as uncounted."""
        ...

    def act(self, histories: Sequence[History]) -> list[Action]:
        """Act as a :class:`Policy`, where ``rollout.source`` asks for the teacher, if it can ``act``."""
        raise _unable(self, "act")

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> TeacherSignal:
        """Its signal on finished trajectories, without gradient, ``max_tokens`` at most in a forward pass;
        with ``keep`` (bool [N]) only these tokens matter, and the others' values need only be finite. Called
        if it can give any signal."""
        raise _unable(self, "score")


def _unable(teacher: Teacher, missing: str) -> ConfigError:
    return ConfigError(f"{type(teacher).__name__} was asked to {missing}, but it has {listed(teacher.can)}.")


def listed(capabilities: Iterable[Capability], last: str = "and") -> str:
    """Names for a message, in the order of the class; ``last`` stands before the last one."""
    names = [f"`{one}`" for one in Capability if one in set(capabilities)]
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "no capability"


def check_serves(what: str, can: AbstractSet[Capability], needs: AbstractSet[Need]) -> None:
    """Raise ConfigError unless a teacher can give a signal for everything that is needed of it; ``what`` is
    how a message calls the teacher."""
    for need, words in WORDS.items():
        if need in needs and not can & SERVES[need]:
            remedy = "take in the loss a signal that it has, as `signal: sampled`"
            if can == {Capability.SPAN_LOGPROBS}:
                remedy = "let it make an advantage: a `policy` component with `references`"
            elif not can & SERVES["sampled"]:
                remedy = "imitate this teacher: rollout.source: teacher and a `ce` component"
            raise ConfigError(
                f"The loss needs of {what} {words}, which takes the capability {listed(SERVES[need], 'or')}, "
                f"but it has {listed(can)}. Take `kind: local` with the student's tokenizer, or {remedy}."
            )


def check_acts(what: str, can: AbstractSet[Capability], asked: str) -> None:
    """Raise ConfigError unless a teacher can act; ``asked`` is the config's key that wants its actions."""
    if Capability.ACT not in can:
        raise ConfigError(
            f"{asked} asks {what} for actions, which takes the capability `act`, but it has {listed(can)}. "
            "Take a teacher that acts, as kind local does, or let another act."
        )


def check_aligned(
    what: str, signal: TeacherSignal, can: AbstractSet[Capability], needs: AbstractSet[Need], size: int
) -> None:
    """Raise AlignmentError unless the signal is one that the teacher ``can`` give, serves what is needed of
    it and has one row for each of ``size`` action tokens; ConfigError for log-probs in half precision."""
    given = SIGNALS.get(type(signal))
    if given is None or given not in can:
        raise AlignmentError(
            f"{what} gave a {type(signal).__name__}, which is not among what its class says that it `can`."
        )
    check_serves(f"{what}, from the {type(signal).__name__} that it gave,", {given}, needs)
    match signal:
        case HiddenStates(hidden):
            tensors: tuple[Tensor, ...] = (hidden,)
            words = "hidden states"
        case TeacherTopK(ids, logprobs, sampled):
            tensors, words = (ids, logprobs, sampled), "rows of its top k"
        case SpanLogprobs(logprobs, joined):
            tensors, words = (logprobs, joined), "log-probs of spans"
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
