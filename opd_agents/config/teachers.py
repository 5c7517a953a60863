"""Who may teach: one section a kind, and what a teacher is told beyond the student's history."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from opd_agents.config.base import PLUG_IN, Section
from opd_agents.config.endpoint import Endpoint
from opd_agents.config.serving import Engine, Server

OWN = "module:name"


def kind_of(given: Any) -> str:
    """The kind of a section that is yet to be read, or of one that has been."""
    kind = str(given.get("kind", "local") if isinstance(given, dict) else given.kind)
    return OWN if ":" in kind else kind


class Conditioning(Section):
    """What a teacher is told beyond the student's history: privileged context, rendered into ``template``
    where it says ``{context}`` and put at the end of the system prompt or of the first user message.

    ``sources``, the first that has something for an episode: a constant ``text``; the scripted ``expert``'s
    actions on the same task; the actions of another, successful episode (``peer``) of the group; what the
    environment last said to a failed one (``feedback``); what a judge says of it in ``hindsight``. An episode
    for which none has any is not taught.
    """

    sources: list[Literal["text", "expert", "peer", "feedback", "hindsight"]] = Field(min_length=1)
    text: str | None = None
    template: str = "{context}"
    place: Literal["system", "user"] = "user"

    @model_validator(mode="after")
    def _complete(self) -> Conditioning:
        if ("text" in self.sources) != (self.text is not None):
            raise ValueError("`text` is needed with the source `text`, and only there")
        if "{context}" not in self.template:
            raise ValueError("`template` must say where the {context} goes")
        return self


Alignment: TypeAlias = Literal["bytes"]
Quantisation: TypeAlias = Literal["int8", "int4"]


class Local(Section):
    """The checkpoint ``model``, in this process; without a ``dtype`` in the student's. ``quantise`` rounds
    its matrices to 8 or 4 bits, in blocks of 64 weights of one scale; embeddings and head stay as they are.
    ``offload``: its layers are on the GPU only while it scores or acts, else in the CPU's memory. ``align:
    bytes``: it has a tokenizer and a chat template of its own, reads the student's text in them, and gives
    the log-prob of every span of bytes that is whole tokens to both."""

    kind: Literal["local"] = "local"
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    quantise: Quantisation | None = None
    offload: bool = False
    align: Alignment | None = None
    conditioning: Conditioning | None = None


class Self(Section):
    """The student itself, by ``weights`` as it was at the start (``frozen``), copied ``every`` so many steps
    (``copy``) or a copy behind (``previous``), as the moving average that takes ``rate`` of it after each
    update (``ema``), or as it is (``live``)."""

    kind: Literal["self"]
    weights: Literal["frozen", "copy", "ema", "live", "previous"] = "frozen"
    every: int | None = Field(None, gt=0)
    rate: float | None = Field(None, gt=0, lt=1)
    conditioning: Conditioning | None = None

    @model_validator(mode="after")
    def _moves(self) -> Self:
        if (self.every is not None) != (self.weights in ("copy", "previous")):
            raise ValueError("`every` (steps) is needed with weights copy and previous, and only there")
        if (self.rate is not None) != (self.weights == "ema"):
            raise ValueError("`rate` is needed with weights ema, and only there")
        return self


class Api(Section):
    """A model behind an ``endpoint``. It sees the conversation as text and answers with text or tool calls,
    so it acts and judges; ``system`` replaces the environment's system prompt, for it alone. At a
    ``temperature`` of 0 a state has one answer, at others each episode draws its own."""

    kind: Literal["api"]
    model: str
    endpoint: Endpoint = Endpoint()
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(1024, gt=0)  # of one answer
    system: str | None = None


class Vllm(Server):
    """The checkpoint ``model`` on vLLM servers, or instead of ``urls`` in an ``engine`` of this process: it
    gives log-probs, at temperature 1, and acts. Its tokenizer and its template are read here; ``align`` as of
    kind local."""

    kind: Literal["vllm"]
    model: str
    urls: list[str] = []
    engine: Engine | None = None
    align: Alignment | None = None
    conditioning: Conditioning | None = None

    @model_validator(mode="after")
    def _somewhere(self) -> Vllm:
        if bool(self.urls) == (self.engine is not None):
            raise ValueError("give either `urls`, of servers, or `engine: {}`, for vLLM in this process")
        own = type(self).model_fields
        idle = [name for name in Server.model_fields if getattr(self, name) != own[name].default]
        if self.engine is not None and idle:
            raise ValueError(f"`{idle[0]}` is of servers, and `engine` is in this process; drop one of them")
        return self


Asked: TypeAlias = Annotated[
    Annotated[Local, Tag("local")] | Annotated[Vllm, Tag("vllm")], Discriminator(kind_of)
]


class Cached(Section):
    """Log-probs that were taken once and are kept in the folder ``cache``, for experience that does not
    change (`rollout.source`: a file). What it lacks is asked ``of`` another teacher before the run; without
    one it must be whole."""

    kind: Literal["cached"]
    cache: str
    of: Asked | None = None

    @model_validator(mode="after")
    def _unconditioned(self) -> Cached:
        if self.of is not None and self.of.conditioning is not None:
            raise ValueError(
                "`of.conditioning`: a cache holds what a teacher says of the student's own prompts"
            )
        if is_aligned(self.of):
            raise ValueError("`of.align`: a cache holds log-probs of the student's own tokens")
        return self


class PlugIn(Section):
    """A class of yours, made with ``options``."""

    kind: Annotated[str, Field(pattern=PLUG_IN)]
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    options: dict[str, Any] = {}


Member: TypeAlias = Annotated[
    Annotated[Cached, Tag("cached")]
    | Annotated[Local, Tag("local")]
    | Annotated[Self, Tag("self")]
    | Annotated[Vllm, Tag("vllm")]
    | Annotated[PlugIn, Tag(OWN)],
    Discriminator(kind_of),
]


Weights: TypeAlias = dict[str, Annotated[float, Field(ge=0)]]


class Route(Section):
    """Episodes that get other ``weights``: of environments and tasks whose ids match the patterns, in which
    `*` stands for anything."""

    environment: str = "*"
    task: str = "*"
    weights: Weights


class Debate(Section):
    """In each of ``rounds`` every member says, in at most ``max_tokens``, how it would do an episode's task,
    from the second round on knowing what all have said. They score the student behind all of it, and their
    weights are multiplied by softmax(c / 100), c from 0 to 100 being the confidence that each ends with
    (equal, where one has given none)."""

    rounds: int = Field(2, ge=0)
    max_tokens: int = Field(512, gt=0)  # of what one says in a round


class Ensemble(Section):
    """Several teachers, by name: the mixture of their distributions, sum_i w_i p_i. Their ``weights`` (null:
    equal ones; divided by their sum) are those of the first of the ``routes`` that an episode matches, where
    there is one. Who has no weight in an episode is not asked. With a ``debate`` they talk before."""

    kind: Literal["ensemble"]
    members: dict[str, Member] = Field(min_length=2)
    weights: Weights | None = None
    routes: list[Route] = []
    debate: Debate | None = None

    @model_validator(mode="after")
    def _weighed(self) -> Ensemble:
        if aligned := [name for name, member in self.members.items() if is_aligned(member)]:
            raise ValueError(
                f"`members.{aligned[0]}.align`: distributions over different vocabularies have no mixture;"
                " put it under `references`, with a part of its own in an advantage"
            )
        told = [name for name, member in self.members.items() if conditioning_of(member) is not None]
        if self.debate is not None and told:
            raise ValueError(f"`members.{told[0]}.conditioning`: members who debate are told that; drop one")
        moving = [n for n, m in self.members.items() if isinstance(m, Self) and m.weights != "frozen"]
        if self.debate is not None and moving:
            raise ValueError(
                f"`members.{moving[0]}.weights`: a task has one debate, of teachers that stay: take frozen"
            )
        places = {f"routes[{index}].weights": route.weights for index, route in enumerate(self.routes)}
        if self.weights is not None:
            places = {"weights": self.weights} | places
        for place, weights in places.items():
            if unknown := weights.keys() - self.members.keys():
                raise ValueError(f"`{place}` names {min(unknown)}, and `members` has no such")
            if not sum(weights.values()):
                raise ValueError(f"`{place}` are all 0: nobody would teach")
        asked = {name for weights in places.values() for name, weight in weights.items() if weight}
        if self.weights is not None and (idle := self.members.keys() - asked):
            raise ValueError(f"`members.{min(idle)}` has no weight anywhere; give it one, or take it out")
        return self


Teacher: TypeAlias = Annotated[
    Annotated[Api, Tag("api")]
    | Annotated[Cached, Tag("cached")]
    | Annotated[Ensemble, Tag("ensemble")]
    | Annotated[Local, Tag("local")]
    | Annotated[Self, Tag("self")]
    | Annotated[Vllm, Tag("vllm")]
    | Annotated[PlugIn, Tag(OWN)],
    Discriminator(kind_of),
]


Single: TypeAlias = Api | Cached | Local | Self | Vllm | PlugIn
"""One teacher."""


def sections_in(place: str, teacher: Teacher) -> Iterator[tuple[str, Teacher]]:
    """This section and those within it, each with its place in the config."""
    yield place, teacher
    if isinstance(teacher, Cached) and teacher.of is not None:
        yield f"{place}.of", teacher.of
    if isinstance(teacher, Ensemble):
        for name, member in teacher.members.items():
            yield from sections_in(f"{place}.members.{name}", member)


def is_aligned(teacher: Teacher | None) -> bool:
    """Whether this teacher has a tokenizer of its own."""
    return isinstance(teacher, Local | Vllm) and teacher.align is not None


def conditioning_of(teacher: Teacher | None) -> Conditioning | None:
    """What this teacher is told, of the kinds that can be told anything."""
    return teacher.conditioning if isinstance(teacher, Local | Self | Vllm) else None
