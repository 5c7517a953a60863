"""The nouns: frozen dataclasses, token ids as tuples, no tensors.

A trajectory is replayable data: environment id, kwargs, seed and task rebuild the episode, and every
turn holds exactly what the policy sampled (ids and log-probs, never re-made from text).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, partial
from typing import Any, TypeVar

T = TypeVar("T")


class Actor(StrEnum):
    """Who chose an action."""

    STUDENT = "student"
    TEACHER = "teacher"
    EXPERT = "expert"
    RANDOM = "random"
    CORPUS = "corpus"  # recorded data


class SpanKind(StrEnum):
    """What a run of action tokens is; a loss may select by it."""

    THINK = "think"
    CALL = "call"
    TEXT = "text"
    SPECIAL = "special"
    FORCED = (
        "forced"  # put there by a rule, such as a thinking budget: no choice of the policy, never trained
    )


class StopReason(StrEnum):
    """Why the policy stopped writing one action."""

    END = "end"  # it sampled an end-of-turn token
    LENGTH = "length"  # rollout.max_tokens_per_turn reached
    CONTEXT = "context"  # rollout.max_context_tokens reached
    ACTIONS = "actions"  # rollout.max_action_tokens reached
    NOT_SAMPLED = "not_sampled"  # the action was not sampled token by token (expert, API)


class Outcome(StrEnum):
    """How an episode ended, as data."""

    SUCCESS = "success"
    FAILURE = "failure"
    UNFINISHED = "unfinished"  # turn, token or context budget used up before the environment ended it
    ERROR = "error"  # the environment raised or did not answer; see Trajectory.error


class Verdict(StrEnum):
    """How much a judge finds that an action needs teaching."""

    SKIP = "skip"  # sound as it is
    WEAK = "weak"  # could be better
    STRONG = "strong"  # a mistake


@dataclass(frozen=True, slots=True)
class Span:
    """Action tokens ``[start, stop)`` of one turn."""

    kind: SpanKind
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What a model is told about a tool: ``parameters`` is a JSON schema object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One role-tagged message: ``role`` is system, user, assistant or tool. ``reasoning`` is what an
    assistant thought before it, without the template's markers."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One task of an environment; ``id`` is unique within (environment, split)."""

    id: str
    split: str


class KeyStep(StrEnum):
    """Whose action the student takes in a state in which one was repaired."""

    REPAIR = "repair"
    OWN = "own"  # the one that was repaired
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a trajectory left its parent episode: before turn ``turn`` (0-based). One that was not ``tried``
    ends with what another would have done there, and no environment has seen it; ``better``: than what was
    done, as is taken for granted of another, or as a judge says. ``noise`` is that of its history, the seeds
    from which the environment's was drawn and the turns from which on; its own seed is that from ``turn``.
    Of one that the student practises ``key`` says whose action it begins with, and ``worth``, where that was
    verified, how much more often the student succeeds after it than before it."""

    parent: str
    turn: int
    tried: bool = True
    better: bool = True
    noise: tuple[tuple[int, int], ...] = ()
    key: KeyStep | None = None
    worth: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One action and what followed.

    ``context_ids`` are the ids appended to the history before the action (for the first turn of a
    segment: the whole prompt); ``action_ids`` are the ids as sampled. ``logprobs`` are the behaviour
    policy's natural-log probabilities of exactly those ids at the sampling temperature, or None for an
    actor that does not sample. ``action`` is the text that the environment received (JSON calls, or
    text); ``text`` what the policy wrote. ``observation`` is what the policy sees of the answer, cut where it
    was too long; ``messages`` are its role-tagged parts.
    """

    context_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    actor: Actor
    policy_version: int
    text: str
    action: str
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    stop_reason: StopReason
    state_digest: str  # of the environment, before the action
    calls: tuple[ToolCall, ...] = ()
    parse_error: str | None = None  # the policy's text was no valid action
    tool_error: str | None = None  # the environment refused the call or the tool failed
    spans: tuple[Span, ...] = ()
    starts_segment: bool = False
    weight: float = 1.0  # 0 for turns inherited by a branch
    messages: tuple[Message, ...] = ()

    @property
    def forced(self) -> tuple[tuple[int, int], ...]:
        """Ranges of the action's ids that a rule put there."""
        return tuple((span.start, span.stop) for span in self.spans if span.kind is SpanKind.FORCED)

    @property
    def n_chosen(self) -> int:
        """Ids of the action that the actor chose itself."""
        return len(self.action_ids) - sum(stop - start for start, stop in self.forced)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode. ``uid`` is unique within a run; ``group`` names the GRPO group."""

    uid: str
    env_id: str
    env_kwargs: Mapping[str, Any]
    seed: int
    task: Task
    turns: tuple[Turn, ...]
    outcome: Outcome
    reward: float  # sum of the turns' rewards
    group: str = ""
    temperature: float = 1.0
    messages: tuple[Message, ...] = ()  # of the reset: system prompt and the task
    branch: Branch | None = None
    error: str | None = None
    final_digest: str = ""
    exhausted: str | None = None  # of an unfinished one: the budget that ran out, turns, context or actions
    demonstration: bool = False  # played by another for a group of the student's episodes
    stored: bool = False  # played before the run, and read from a file
    hint: str = ""  # a judge's, see ActionFeedback
    replaced: bool = False  # by a demonstration: it stays on record, and nothing is learned from it

    @property
    def success(self) -> bool:
        return self.outcome is Outcome.SUCCESS

    @property
    def noise(self) -> tuple[tuple[int, int], ...]:
        """The seeds from which the environment's noise was drawn, each with the turn from which on."""
        if self.branch is None or not self.branch.tried:
            return ((0, self.seed),)
        return (*self.branch.noise, (self.branch.turn, self.seed))

    @property
    def cut_off(self) -> bool:
        """A budget ended the episode, or its last action."""
        return self.outcome is Outcome.UNFINISHED or (
            bool(self.turns) and self.turns[-1].stop_reason in (StopReason.LENGTH, StopReason.CONTEXT)
        )

    @property
    def recorded(self) -> bool:
        """Read from a corpus: no environment was played."""
        return any(turn.actor is Actor.CORPUS for turn in self.turns)

    @property
    def n_action_tokens(self) -> int:
        """Tokens that a model sampled for this episode; inherited turns and the expert's are not counted."""
        return sum(turn.n_chosen for turn in self.turns if turn.weight and turn.logprobs is not None)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Turn ranges ``[start, stop)`` that share one growing token history."""
        starts = [i for i, turn in enumerate(self.turns) if i == 0 or turn.starts_segment]
        yield from zip(starts, [*starts[1:], len(self.turns)], strict=False)  # no turns: no segments


@dataclass(frozen=True, slots=True)
class ActionFeedback:
    """What a judge says of one action of the student's, or of a whole episode (``turn`` is None).

    ``trajectory`` is a uid, ``turn`` counts from 0, ``score`` goes from 0 to 9 (best). ``replacement`` is
    what should have been done there, as the environment gets it: JSON calls, or text. What a judge was not
    asked for is None.
    """

    trajectory: str
    turn: int | None
    score: int | None = None
    verdict: Verdict | None = None
    replacement: str | None = None
    reason: str = ""
    hint: str = ""  # what would have helped at the beginning, as one knows after the end


TOKEN_DIGITS = 3


@dataclass(frozen=True, slots=True)
class Credit:
    """Why one action is reinforced: all parts of its learning signal, logged as is.

    ``kl_sum`` and ``kl_mean`` are KL(student || teacher) in nats over the action's tokens at the
    policy that sampled it; ``advantage`` maps `component.part` to the mean over the action's tokens of that
    part of the component's advantage; ``score``, ``verdict`` and ``reason`` are a judge's, of the action or
    else of its episode; ``agreement`` is the share of another's actions at its state that are this one;
    ``correction`` is the verdict on a repair proposed at this action; ``weight`` is the
    final weight of the action's tokens in every component, which ``factors`` multiply in those that have a
    credit function.

    The rest is by token, one entry an id of ``Turn.action_ids``, rounded to ``TOKEN_DIGITS`` decimals, forced
    ids having 0: ``token_kl`` is KL(student || teacher), of a teacher that tells log-probs only log q - log p
    of the token; ``token_advantage`` the sum of the advantages of the policy components, a single entry where
    all tokens have the same. ``unlearned`` are the ranges [start, stop) from which no component learns.
    """

    kl_sum: float | None = None
    kl_mean: float | None = None
    teacher_logprob: float | None = None  # nats, summed over the action's tokens
    advantage: Mapping[str, float] = field(default_factory=dict)
    score: int | None = None
    verdict: Verdict | None = None
    reason: str = ""
    agreement: float | None = None
    correction: str | None = None
    weight: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    token_kl: tuple[float, ...] = ()
    token_advantage: tuple[float, ...] = ()
    unlearned: tuple[tuple[int, int], ...] = ()


def to_json(value: Any) -> str:
    """A noun, or plain data holding nouns, as compact JSON on one line; enums become strings."""
    return json.dumps(value, default=_fields, separators=(",", ":"))


def to_dict(value: Any) -> Any:
    """A noun as plain JSON-able data; every field is kept."""
    return json.loads(to_json(value))


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """The inverse of :func:`to_dict` for a noun of this module."""
    converters = _fields_of(typing.cast(Any, cls))  # mypy takes a type variable's class as not hashable
    return cls(**{name: converters[name](value) for name, value in data.items()})


@cache
def _fields_of(cls: type) -> dict[str, Callable[[Any], Any]]:
    """What makes a field's value of its plain data, for each of them."""
    return {name: _converter(hint) for name, hint in typing.get_type_hints(cls).items()}


def _converter(hint: Any) -> Callable[[Any], Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        convert = _converter(next(one for one in inner if one is not type(None)))
        return lambda value: None if value is None else convert(value)
    if origin is tuple:
        each = _converter(inner[0])
        return tuple if each is _same else lambda value: tuple(each(item) for item in value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return partial(from_dict, hint)
    return hint if isinstance(hint, type) and issubclass(hint, StrEnum) else _same


def _same(value: Any) -> Any:
    return value
