"""Who may teach: one section a kind, and what a teacher is told beyond the student's history."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from opd_agents.config.base import PLUG_IN, Section


class Conditioning(Section):
    """What a teacher is told beyond the student's history: privileged context, rendered into ``template``
    where it says ``{context}`` and put at the end of the system prompt or of the first user message.

    ``sources``, the first that has something for an episode: a constant ``text``; the scripted ``expert``'s
    actions on the same task; the actions of another, successful episode (``peer``) of the group; what the
    environment last said to a failed one (``feedback``). An episode for which none has any is not taught.
    """

    sources: list[Literal["text", "expert", "peer", "feedback"]] = Field(min_length=1)
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


class Local(Section):
    """The checkpoint ``model``, in this process; without a ``dtype`` in the student's."""

    kind: Literal["local"] = "local"
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
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


class PlugIn(Section):
    """A class of yours, made with ``options``."""

    kind: Annotated[str, Field(pattern=PLUG_IN)]
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    options: dict[str, Any] = {}


OWN = "module:name"


def kind_of(given: Any) -> str:
    """The kind of a section that is yet to be read, or of one that has been."""
    kind = str(given.get("kind", "local") if isinstance(given, dict) else given.kind)
    return OWN if ":" in kind else kind


Teacher: TypeAlias = Annotated[
    Annotated[Local, Tag("local")] | Annotated[Self, Tag("self")] | Annotated[PlugIn, Tag(OWN)],
    Discriminator(kind_of),
]


def conditioning_of(teacher: Teacher | None) -> Conditioning | None:
    """What this teacher is told, of the kinds that can be told anything."""
    return teacher.conditioning if isinstance(teacher, Local | Self) else None
