"""How single actions are corrected: who proposes, what proves it, what is learned from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from opd_agents.config.base import Section


class Proposal(Section):
    """Which action was the earliest error, and what should have been done there: what the ``teacher`` or the
    ``expert`` does, or what the ``judge`` says, who names both in words, of which nothing may come from
    elsewhere than the student's own history (see `opd_agents.judging.leaks`); or, as a control without any
    teacher, what the ``student`` does in another try.

    Unless a judge names it, the action is the first one (``where``)

    - ``improbable``: to which the teacher gives a log-prob under ``below`` (nats);
    - ``divergent``: of whose tokens the student's and the teacher's log-probs differ by more than ``above``
      (nats, mean of the absolute values);
    - ``disagreed``: that is none of ``samples`` of theirs in the same state, in words or in effect;
    - ``dropped``: with which the student's success falls below half of what it was from the start, by
      bisection with ``rollouts`` of the student from each state that it looks at.
    """

    by: Literal["teacher", "judge", "expert", "student"] = "teacher"
    where: Literal["improbable", "divergent", "disagreed", "dropped"] = "improbable"
    below: float = Field(-2.3, lt=0)
    above: float = Field(0.5, gt=0)
    samples: int = Field(1, gt=0)
    rollouts: int = Field(4, gt=0)

    @property
    def scored(self) -> bool:
        """Whether the teacher's log-probs say where."""
        return self.by != "judge" and self.where in ("improbable", "divergent")

    @model_validator(mode="after")
    def _used(self) -> Proposal:
        keys = {"below": "improbable", "above": "divergent", "samples": "disagreed", "rollouts": "dropped"}
        where = None if self.by == "judge" else self.where
        given = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        for key in (key for key, of in keys.items() if key in given and of != where):
            raise ValueError(f"`{key}` is of `where: {keys[key]}`, and nothing here asks for it")
        if where is None and "where" in given:
            raise ValueError("`where` is not asked with `by: judge`, who names the action")
        if self.by == "student" and self.where != "dropped":
            raise ValueError("`by: student` has no teacher to say where: take `where: dropped`")
        if self.by == "expert" and self.where == "disagreed" and self.samples > 1:
            raise ValueError("`samples`: a scripted expert always does the same")
        return self


class Verification(Section):
    """How a repair is proved: by fresh rollouts of the student after it, beside as many of each of its
    ``rivals``, after the student's ``own`` action and where it tries again (``retry``) in the same state. At
    each number of ``rollouts`` an arm, it is accepted where it is better than every rival with a probability
    of ``accept``, and given up below ``stop`` or without a single success; what the last look leaves open is
    rejected. Without ``rivals`` it is accepted where one of the rollouts succeeds."""

    rollouts: list[Annotated[int, Field(gt=0)]] = Field([4, 8, 16], min_length=1)
    rivals: list[Literal["own", "retry"]] = ["own", "retry"]
    accept: float = Field(0.975, gt=0.5, lt=1)
    stop: float = Field(0.5, ge=0, le=0.5)

    @model_validator(mode="after")
    def _looks(self) -> Verification:
        if self.rollouts != sorted(set(self.rollouts)):
            raise ValueError("`rollouts` of an arm, all told, must rise from look to look")
        if len(self.rivals) != len(set(self.rivals)):
            raise ValueError("`rivals`: each once")
        return self


class Audit(Section):
    """Fresh ``rollouts`` an arm for a ``share`` of the repairs, accepted and rejected alike. They, not those
    that decided (the accepted were the lucky ones), say what the repairs gained and how many were wrong."""

    share: float = Field(0.1, gt=0, le=1)
    rollouts: int = Field(32, gt=0)


class Correction(Section):
    """Earliest-error correction at the action level (after SCoRe, 2509.14257), verified by re-rollouts.

    ``resumes`` plays on after the repaired action. Where that fails after a repair which does no worse than
    its rivals, it is repaired in turn, up to ``repairs`` times an episode. In the branch that is trained on,
    the turns before the repair weigh ``prefix_weight``, and those from it on 1.

    ``practice``: from the state before each accepted repair, whose history is thereby proved good, the
    student plays on itself, a group of so many rollouts whose inherited turns weigh 0 (the short horizon of
    SCoRe). They are of the source ``practice``; a `policy` compares their rewards with each other. The first
    action, the key step, is the repair or the student's former action where it asks for the same or has the
    same effect (``key_by: execution``). Where that finds neither, a ``judge`` can say whether it amounts to
    one of them, asked once for all equal actions in a state.

    Before the corrected action stands its author's own thought, if it has one (``reasoning: replace``), the
    student's (``keep``), or none (``drop``).

    What came of a step's repairs is learned from in ``kept`` further steps, too, with the log-probs of the
    policy that played it: the most by which it may be stale.

    ``random`` is the share of repairs that are put in the place of proposals as a control: another turn of
    the episode, and a random call there. They are verified like the others and never trained on.
    """

    propose: Proposal = Proposal()
    episodes_per_step: int = Field(8, gt=0)
    repairs: int = Field(1, gt=0, le=16)
    reasoning: Literal["replace", "keep", "drop"] = "replace"
    resumes: Literal["student", "teacher"] = "student"
    prefix_weight: float = Field(0.0, ge=0, le=1)
    practice: int | None = Field(None, gt=1)
    key_by: Literal["execution", "judge"] = "execution"
    kept: int = Field(0, ge=0)
    verify: Verification = Verification()
    audit: Audit | None = Audit()
    random: float = Field(0.0, ge=0, lt=1)
    token_share: float = Field(0.18, gt=0, lt=1)  # of all generated tokens, spent on repairs and their proof

    @model_validator(mode="after")
    def _practised(self) -> Correction:
        if self.key_by == "judge" and self.practice is None:
            raise ValueError(
                "`key_by: judge` is of what is practised: say how many rollouts, such as `practice: 8`, or"
                " leave it out"
            )
        return self
