"""Episodes that were played before the run: what `opd-agents rollout --out` writes, token by token."""

from __future__ import annotations

import dataclasses

from opd_agents.chat import Chat
from opd_agents.config import Recorded, RunConfig, Trajectories
from opd_agents.errors import DataError, UserError
from opd_agents.recordings import Recordings, check_length, encode_row, tools_of
from opd_agents.rows import Rows, read_rows, sided
from opd_agents.types import Actor, Outcome, Trajectory, from_dict

AGAIN = "Play them anew: opd-agents rollout ENV_ID --policy CHECKPOINT --out FILE."


def recordings_of(config: RunConfig, chat: Chat) -> Recordings | None:
    """The recorded part of a run's experience, if it has one, all rows checked. Raises DataError."""
    rollout = config.rollout
    most, temperature = rollout.max_context_tokens, rollout.temperature

    def encoded(rows: Rows, index: int, uid: str) -> Trajectory:
        return encode_row(rows, index, chat, most, uid=uid, temperature=temperature)

    def stored(rows: Rows, index: int, uid: str) -> Trajectory:
        return stored_row(rows, index, chat, most, uid=uid, temperature=temperature)

    match rollout.source:
        case Recorded(dataset=path, split=split):
            return Recordings(config, sided(read_rows(path, split)), encoded)
        case Trajectories(trajectories=path):
            return Recordings(config, read_rows(path), stored)
    return None


def stored_row(
    rows: Rows, index: int, chat: Chat, most_tokens: int, *, uid: str, temperature: float
) -> Trajectory:
    """The episode in row ``index``, as the student's at the start of the run: its policy version is 0.

    Raises DataError, with file and row, for what is no episode of the student's own, was not sampled at
    ``temperature``, is of the test split or longer than ``most_tokens``, and for one whose prompt or actions
    are not, token by token, what ``chat`` makes of its messages.
    """
    where = rows.where(index)
    try:
        episode = from_dict(Trajectory, rows[index]["trajectory"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: no episode ({error!r}). {AGAIN}") from None
    problem = _problem(episode, chat, temperature)
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    check_length(episode, most_tokens, where)
    turns = tuple(dataclasses.replace(turn, policy_version=0) for turn in episode.turns)
    return dataclasses.replace(episode, uid=uid, turns=turns, group="", stored=True)


def _problem(episode: Trajectory, chat: Chat, temperature: float) -> str | None:
    """Why an episode cannot be learned from."""
    if episode.task.split == "test":
        return "its task is of the split `test`, which is for `opd-agents evaluate` alone."
    if episode.outcome is Outcome.ERROR:
        return f"the episode failed: {episode.error}. Leave the row out."
    for number, turn in enumerate(episode.turns):
        if turn.actor is not Actor.STUDENT or turn.logprobs is None:
            return f"turn {number} is the {turn.actor}'s, and not sampled by the student. {AGAIN}"
        if len(turn.logprobs) != len(turn.action_ids):
            return f"turn {number} has {len(turn.logprobs)} log-probs for {len(turn.action_ids)} ids. {AGAIN}"
    if episode.temperature != temperature:
        return (
            f"it was sampled at temperature {episode.temperature:g}, and rollout.temperature is "
            f"{temperature:g}: its log-probs are of another distribution. Set rollout.temperature to that."
        )
    return _misread(episode, chat)


def _misread(episode: Trajectory, chat: Chat) -> str | None:
    """Where its tokens are not what the chat makes of its messages."""
    system, *opening = episode.messages
    try:
        prompt = chat.prompt_ids(opening, tools_of(episode), system.content)
    except UserError as error:
        return str(error)
    if episode.turns and episode.turns[0].context_ids != prompt:
        return (
            "its first prompt is not what the student's chat template makes of its messages: it was played"
            f" with another tokenizer or other `chat` settings. {AGAIN}"
        )
    for number, turn in enumerate(episode.turns):
        ended = turn.action_ids[-1] in chat.end_ids
        if chat.parse(turn.action_ids, ended=ended, context_ids=turn.context_ids).text != turn.text:
            return f"the ids of turn {number} are not the tokens of its text. {AGAIN}"
    return None
