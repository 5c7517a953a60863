"""Does everybody see the same tokens? Told from one made-up episode of each environment, before any training.

Its calls are drawn from the tools' schemas, so that neither the student nor a teacher has to act, and the
chat writes them: what stands before each action must then be what the chat template makes of the whole
conversation. A teacher is asked three times: on the episode, with one action token changed, and with one
token of what the environment said changed. What comes before a change must be scored the same, what comes
after it must not.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_agents import envs
from opd_agents.api.client import store_of
from opd_agents.api.connection import base_url_of, check_reachable
from opd_agents.batch import pack
from opd_agents.chat.reasoning import Thought
from opd_agents.config import Api
from opd_agents.episode import Episode, Live, segment_ids
from opd_agents.errors import AlignmentError, OpdError
from opd_agents.frozen import frozen_terms
from opd_agents.policies.base import RandomPolicy
from opd_agents.session import Session
from opd_agents.tasks import draw_episodes
from opd_agents.teachers.aligned import AlignedTeacher
from opd_agents.teaching import settings_of
from opd_agents.types import Message, ToolSpec, Trajectory, Turn, to_json

TURNS = 2
SAME = {"float32": 1e-3, "bfloat16": 0.25}  # nats by which one token's log-prob may differ between two passes
ABSURD = -300.0  # nats; no model at a usual temperature gives a token less


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, and what was found; ``passed`` is None for what is told and not judged."""

    about: str
    passed: bool | None
    says: str
    error: OpdError | None = None  # what was raised


@dataclass(frozen=True, slots=True)
class Probe:
    """A made-up episode and the tools of its environment."""

    trajectory: Trajectory
    tools: Sequence[ToolSpec]


def probe(session: Session) -> Iterator[Finding]:
    """Findings on endpoints, on the history and on every reference that scores. What an environment, a
    template or a teacher raises is a finding, too."""
    yield from _endpoints(session)
    for episode in _first_episodes(session):
        try:
            made = _made_up(session, episode)
        except OpdError as error:
            yield Finding("history", False, f"{episode.env_id}: {error}", error)
            continue
        if made.trajectory.error is not None:  # as any episode's may: data
            says = f"{episode.env_id}: not looked at, the environment failed: {made.trajectory.error}"
            yield Finding("history", None, says)
            continue
        yield _history(session, made)
        if made.trajectory.turns and session.references.needs:
            yield from _alignments(session, made.trajectory)
            yield from _references(session, made.trajectory)


def refuse_misaligned(session: Session) -> None:
    """Raise the first thing that :func:`probe` finds wrong: what was raised there, or AlignmentError."""
    for finding in probe(session):
        if finding.passed is False:
            raise finding.error or AlignmentError(f"{finding.about}: {finding.says}")
    session.leave_out()


def _endpoints(session: Session) -> Iterator[Finding]:
    """Whether models behind an API are there; not asked where answers are stored, which may be all it
    takes."""
    for name, settings in settings_of(session.config).items():
        if not isinstance(settings, Api) or store_of(settings.endpoint, session.config.folder).exists():
            continue
        try:
            check_reachable(settings.endpoint)
        except OpdError as error:
            yield Finding(name, False, str(error), error)
        else:
            yield Finding(name, True, f"{base_url_of(settings.endpoint)} answers")


def _first_episodes(session: Session) -> list[Episode]:
    """One of each environment with its options."""
    first: dict[str, Episode] = {}
    for episode in draw_episodes(session.config, 0, session.task_counts):
        first.setdefault(to_json([episode.env_id, episode.env_kwargs]), episode)
    return list(first.values())


def _made_up(session: Session, episode: Episode) -> Probe:
    """``TURNS`` random calls, written by the chat and taken by the environment."""
    live, policy = Live(episode, session.chat, session.limits), RandomPolicy()
    live.make(envs.launch)
    try:
        if live.outcome is None:
            live.begin()()
        while live.outcome is None and len(live.turns) < TURNS:
            [action] = policy.act([live.history()])
            live.step(action)()
        tools = () if live.host.env is None else live.host.env.tools
    finally:
        trajectory = live.finish(session.config.rollout.temperature)
    return Probe(trajectory, tools)


def _history(session: Session, made: Probe) -> Finding:
    """The ids before every action against the conversation rendered whole, as text: where words meet, a
    tokenizer may cut one text in two ways."""
    chat, trajectory = session.chat, made.trajectory
    system, *opening = trajectory.messages
    messages: list[Message] = list(opening)
    for number, turn in enumerate(trajectory.turns):
        past = () if turn.starts_segment else segment_ids(trajectory.turns[:number])
        seen, whole = past + turn.context_ids, chat.prompt_ids(messages, made.tools, system.content)
        shown, rendered = (str(chat.tokenizer.decode(list(ids))) for ids in (seen, whole))
        if chat.thought is not None and chat.history == "append":  # which keeps what a template may strip
            shown, rendered = (_without_thought(text, chat.thought) for text in (shown, rendered))
        if shown != rendered:
            problem = f"before action {number + 1} the student sees {_difference(shown, rendered)}"
            return Finding("history", False, f"{trajectory.env_id}: {problem}")
        said = chat.read_message(
            turn.action_ids, ended=True, context_ids=turn.context_ids, tools=made.tools,
            text_only=not made.tools,
        )  # fmt: skip
        messages += [said, *turn.messages]
    says = f"{trajectory.env_id}: {len(trajectory.turns)} prompts are what the chat template renders"
    return Finding("history", True, says)


def _without_thought(text: str, thought: Thought) -> str:
    return re.sub(f"{re.escape(thought.open)}.*?{re.escape(thought.close)}\\s*", "", text, flags=re.DOTALL)


def _difference(shown: str, rendered: str) -> str:
    """The first place where they part, with what stands around it."""
    blocks = difflib.SequenceMatcher(None, shown, rendered, autojunk=False).get_matching_blocks()
    place = blocks[0].size if blocks and blocks[0].a == blocks[0].b == 0 else 0
    around = slice(max(0, place - 20), place + 40)
    return f"{shown[around]!r} where the chat template writes {rendered[around]!r}"


def _alignments(session: Session, trajectory: Trajectory) -> Iterator[Finding]:
    """What teachers with another tokenizer can be asked about; all of these actions are plain calls."""
    for name, teacher in session.references.teachers.items():
        if not (isinstance(teacher, AlignedTeacher) and name in session.references.needs):
            continue
        try:
            found = teacher.aligner.align([trajectory])
        except OpdError as error:
            yield Finding(name, False, str(error), error)
            continue
        spans, tokens = len(found.ours[found.ours >= 0].unique()), len(found.ours)
        says = f"its tokens and the student's have {spans} spans in common, of {tokens} action tokens"
        if found.left_out:
            reasons = ", ".join(f"{count} for {why}" for why, count in found.left_out.items())
            says += (
                f"; without a span are {reasons}. The two chats must write and read one syntax of calls"
                " (chat.syntax) and mark thoughts alike"
            )
        yield Finding(name, not found.left_out, says)


def _references(session: Session, trajectory: Trajectory) -> Iterator[Finding]:
    try:
        plain = _logprobs(session, trajectory)
    except OpdError as error:
        yield Finding("teacher", False, str(error), error)
        return
    turns = trajectory.turns
    action = _logprobs(session, _with(trajectory, len(turns) - 1, _other_action(session, turns[-1])))
    heard = {}
    if len(turns) > 1 and not turns[1].starts_segment:
        other = _with(trajectory, 1, _other_context(session, turns[1]))
        heard = _logprobs(session, _with(other, 0, _other_answer(turns[0])))
    first = sum(turn.n_chosen for turn in turns[:-1])  # the action token that was changed
    for name, values in plain.items():
        if name not in action:
            yield Finding(name, None, "not asked about another action token, which is of no span")
            continue
        problem = _values_wrong(values) or _order_wrong(
            values,
            action[name],
            heard.get(name),
            first,
            turns[0].n_chosen,
            SAME[session.config.student.dtype],
        )
        mean = float(values.mean())
        told = f"{len(values)} action tokens, each scored on what stands before it, mean {mean:.2f} nats"
        yield Finding(name, problem is None, problem or told)


def _logprobs(session: Session, trajectory: Trajectory) -> dict[str, Tensor]:
    """Of the action tokens [N] under every reference that the loss needs."""
    packed = pack([trajectory])
    owned = torch.ones(len(packed.target), dtype=torch.bool)
    signals, taught = session.score(packed, [trajectory], owned)
    rollout, tokens = session.config.rollout, session.config.trainer.micro_batch_tokens
    terms = frozen_terms(session.model, packed, signals, rollout.temperature, tokens).references
    return {name: terms[name].logprob for name in terms if name not in taught or bool(taught[name].all())}


def _values_wrong(values: Tensor) -> str | None:
    if not bool(values.isfinite().all()):
        return (
            f"{int((~values.isfinite()).sum())} of {len(values)} action tokens have no finite log-prob: it"
            " scores at temperature 0, with top-k or top-p sampling, or with values left out"
        )
    if float(values.min()) < ABSURD:
        return f"a log-prob of {float(values.min()):.0f} nats: it scores at a temperature near 0"
    if not bool(values.any()):
        return "every log-prob is exactly 0: the values are left out, or it scores at temperature 0"
    return None


def _order_wrong(
    plain: Tensor, action: Tensor, heard: Tensor | None, first: int, opening: int, same: float
) -> str | None:
    """``action``: with token ``first`` changed; ``heard``: with the context behind the ``opening`` tokens of
    the first action changed."""
    gap = (plain - action).abs()
    if bool((gap[:first] > same).any()):
        return (
            "another action token changes the log-probs of tokens before it: they are shifted, or look ahead"
        )
    if not bool(gap[first] > 0):
        return "another action token has the same log-prob: it does not score the tokens that it is given"
    if heard is None:
        return None
    gap = (plain - heard).abs()
    if bool((gap[:opening] > same).any()):
        return "another observation changes log-probs of the action before it: they are shifted or look ahead"
    if not bool((gap[opening:] > 0).any()):
        return "another observation changes no log-prob after it: it does not see the student's history"
    return None


def _with(trajectory: Trajectory, place: int, turn: Turn) -> Trajectory:
    turns = trajectory.turns
    return dataclasses.replace(trajectory, turns=(*turns[:place], turn, *turns[place + 1 :]))


def _other_action(session: Session, turn: Turn) -> Turn:
    ids = list(turn.action_ids)
    ids[0] = _other_id(session, ids[0])
    return dataclasses.replace(turn, action_ids=tuple(ids))


def _other_context(session: Session, turn: Turn) -> Turn:
    ids = list(turn.context_ids)
    ids[len(ids) // 2] = _other_id(session, ids[len(ids) // 2])
    return dataclasses.replace(turn, context_ids=tuple(ids))


def _other_answer(turn: Turn) -> Turn:
    """The same for who reads messages and not ids."""
    messages = tuple(dataclasses.replace(m, content=f"{m.content} {m.content}") for m in turn.messages)
    return dataclasses.replace(turn, messages=messages)


def _other_id(session: Session, id: int) -> int:
    """Of an ordinary token."""
    special = set(session.tokenizer.all_special_ids) | {id}
    return next(other for other in range(len(session.tokenizer)) if other not in special)
