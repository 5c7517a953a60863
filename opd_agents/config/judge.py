"""Who judges the student's actions in words, and what is asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opd_agents.config.base import Section


class Judge(Section):
    """A teacher that judges finished episodes of the student, each once, from their text alone: ``score``
    from 0 to 9 (OVD, arXiv 2601.21968), ``verdict`` skip, weak or strong (SAGE-OPD, arXiv 2606.19659), per
    ``action`` or per ``episode``; of an episode also a ``hint``, what the agent should have known when it
    began (OpenClaw-RL, arXiv 2603.10165; OPID, arXiv 2606.26790). One request an episode asks for all of it.
    What the answers are used for says the loss (``verbal`` rewards, the weights `verbal_score` and
    `verdict`), `rollout.demonstrations` and, of a hint, a teacher's `conditioning`. Where
    `correction.propose`, `correction.key_by` or `rollout.alternatives` names the judge, it also corrects
    episodes or compares actions."""

    by: str = "teacher"  # or one of `references`
    ask: list[Literal["score", "verdict", "hint"]]  # may be empty where it corrects or compares alone
    per: Literal["action", "episode"] = "action"
    share: float = Field(1.0, gt=0, le=1)  # of the student's episodes
    rubric: str | None = None  # what counts, in your own words, added to the instructions
    sees_outcome: bool = False  # whether it is told how the episode ended
    max_tokens: int = Field(2048, gt=0)  # of one answer
