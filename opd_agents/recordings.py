"""Recorded conversations -> trajectories, as if the policy of a rollout had written them.

A recording is packed, scored and trained on like an episode; its actor is the corpus and it has no behaviour
log-probs. Which recordings a step draws depends on (seed, step) alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from opd_agents import envs
from opd_agents.chat import Chat
from opd_agents.config import Recorded, RunConfig, Trajectories
from opd_agents.envs.actions import format_calls
from opd_agents.errors import ConfigError, DataError
from opd_agents.messages import Conversation, read_conversation
from opd_agents.rows import Pairs, Rows
from opd_agents.schedules import dealt
from opd_agents.types import (
    Actor,
    Message,
    Outcome,
    StopReason,
    Task,
    ToolSpec,
    Trajectory,
    Turn,
    from_dict,
    to_dict,
    to_json,
)

T = TypeVar("T")
RECORDED = "recorded"  # in place of an environment's id
MANY = 2000  # rows that take long enough to show a bar
MOST_ERRORS = 3  # shown at once


def to_trajectory(
    conversation: Conversation, chat: Chat, *, uid: str, task: Task, temperature: float = 1.0
) -> Trajectory:
    """The token ids that a rollout would hold, had the policy written these messages in the template's way.

    The last turn has the reward. Turns that are not learned from weigh 0. Raises ConfigError where the
    template cannot render the messages, DataError for a text that the tokenizer cannot write.
    """
    turns = tuple(_turns(conversation, chat))
    system = [Message("system", conversation.system)] if conversation.system else []
    return Trajectory(
        uid=uid, env_id=RECORDED, env_kwargs={"tools": to_dict(conversation.tools)}, seed=0, task=task,
        turns=turns, outcome=Outcome.SUCCESS if conversation.success else Outcome.FAILURE,
        reward=conversation.reward, temperature=temperature,
        messages=(*system, *conversation.messages[: conversation.actions()[0]]),
    )  # fmt: skip


def _turns(conversation: Conversation, chat: Chat) -> Iterator[Turn]:
    messages, places, tools = conversation.messages, conversation.actions(), conversation.tools
    ids: tuple[int, ...] = ()
    before = 0
    for place, following in zip(places, [*places[1:], len(messages)], strict=True):
        message = messages[place]
        if spelled := chat.spells_control(message.content + (message.reasoning or "")):
            raise DataError(
                f"the assistant's text holds {spelled!r}, which would be learned as words: take it out. Calls"
                " belong into `tool_calls`, thoughts into `reasoning_content`; the template adds markers."
            )
        if ids and chat.history == "append":
            since, calls = messages[before + 1 : place], messages[before].tool_calls
            prompt = ids + chat.suffix_ids(since, ended=True, calls=calls, end=ids[-1])
        else:
            prompt = chat.prompt_ids(messages[:place], tools, conversation.system)
        starts = not ids or prompt[: len(ids)] != ids
        context_ids = prompt if starts else prompt[len(ids) :]
        action_ids = chat.encode_message(message, after=messages[place - 1].role, tools=tools)
        if chat.tokenizer.unk_token_id in set(action_ids) - chat.end_ids:
            raise DataError(f"the tokenizer has no token for some character of {message.content[:60]!r}.")
        parsed = chat.parse(action_ids, ended=True, context_ids=context_ids, tools=tools)
        if len(parsed.calls) < len(message.tool_calls):  # values without a type may come back as others
            raise DataError(
                f"what chat.syntax {chat.syntax.name} writes for {format_calls(message.tool_calls)[:200]} is"
                f" not read back as calls ({parsed.error}); change the call, or give another chat.syntax."
            )
        last, answers = following == len(messages), messages[place + 1 : following]
        yield Turn(
            context_ids=context_ids, action_ids=action_ids, logprobs=None, actor=Actor.CORPUS,
            policy_version=0, text=parsed.text,
            action=format_calls(message.tool_calls) if message.tool_calls else message.content,
            observation="\n".join(answer.content for answer in answers), messages=tuple(answers),
            reward=conversation.reward if last else 0.0, terminated=last, truncated=False,
            stop_reason=StopReason.NOT_SAMPLED, state_digest="", calls=message.tool_calls,
            spans=parsed.spans, starts_segment=starts, weight=float(conversation.trained[place]),
        )  # fmt: skip
        ids, before = prompt + action_ids, place


def to_conversation(trajectory: Trajectory, chat: Chat | None, tools: Sequence[ToolSpec]) -> Conversation:
    """The other direction: an episode of any actor as messages. ``chat`` reads its token ids, if it has any;
    ``tools`` are those of its environment.

    Raises DataError for an episode without an action, for token ids without a chat, and for a turn whose
    calls the template does not write or of which some got an answer and others did not.
    """
    opening = trajectory.messages
    system = opening[0].content if opening and opening[0].role == "system" else ""
    system = system if chat is None or chat.system is None else chat.system  # as the model saw it
    messages = [message for message in opening if message.role != "system"]
    trained = [False] * len(messages)
    for number, turn in enumerate(trajectory.turns):
        where = f"{trajectory.uid}, turn {number}"
        said = _said(turn, chat, tools, where)
        answers = turn.messages
        ends_there = not answers and number + 1 == len(trajectory.turns)  # with calls that nothing answers
        if said.tool_calls and len(answers) != len(said.tool_calls) and not ends_there:
            raise DataError(f"{where}: {len(said.tool_calls)} calls have {len(answers)} answers.")
        messages += [said, *answers]
        trained += [turn.weight > 0, *(False for _ in answers)]
    if not any(trained):
        raise DataError(f"{trajectory.uid}: there is no action in it.")
    if messages[-1].role == "user":  # an environment's last word to a finished episode
        messages, trained = messages[:-1], trained[:-1]
    return Conversation(
        system, tuple(tools), tuple(messages), tuple(trained), trajectory.success, trajectory.reward,
        trajectory.task.id,
    )  # fmt: skip


def _said(turn: Turn, chat: Chat | None, tools: Sequence[ToolSpec], where: str) -> Message:
    if not turn.action_ids:  # of an actor without tokens
        return Message("assistant", "" if turn.calls else turn.action, turn.calls)
    if chat is None:
        raise DataError(f"{where}: it holds token ids; name the model that wrote them.")
    ended = turn.stop_reason in (StopReason.END, StopReason.NOT_SAMPLED)
    said = chat.read_message(turn.action_ids, ended=ended, context_ids=turn.context_ids, tools=tools)
    if not turn.calls and said.tool_calls:  # the environment did not take it for a call
        return Message("assistant", turn.text)
    if len(said.tool_calls) != len(turn.calls):
        raise DataError(f"{where}: its calls cannot be written as messages by this model's chat template.")
    return said


def encode_row(
    rows: Rows, index: int, chat: Chat, most_tokens: int | None, *, uid: str = "", temperature: float = 1.0
) -> Trajectory:
    """Row ``index`` as a trajectory. Raises DataError, with file, row and field, for a row that cannot be
    used, also for one of more than ``most_tokens`` tokens."""
    where = rows.where(index)
    conversation = read_conversation(rows[index], where)
    task = Task(conversation.id or str(index), rows.split)
    try:
        trajectory = to_trajectory(conversation, chat, uid=uid, task=task, temperature=temperature)
    except (ConfigError, DataError) as error:
        raise DataError(f"{where}: {error}") from error
    check_length(trajectory, most_tokens, where)
    return trajectory


def check_length(trajectory: Trajectory, most_tokens: int | None, where: str) -> None:
    """Raise DataError for a row of more than ``most_tokens`` tokens."""
    longest = max(
        (
            sum(len(turn.context_ids) + len(turn.action_ids) for turn in trajectory.turns[start:stop])
            for start, stop in trajectory.segments()
        ),
        default=0,
    )
    if most_tokens is not None and longest > most_tokens:
        raise DataError(
            f"{where}: {longest} tokens, more than rollout.max_context_tokens {most_tokens}; raise that, or"
            " shorten or leave out the row."
        )


def tools_of(trajectory: Trajectory) -> tuple[ToolSpec, ...]:
    """Those of its environment; a recorded conversation has its own. Raises UserError for an environment that
    is not known."""
    if trajectory.recorded:
        return tuple(from_dict(ToolSpec, tool) for tool in trajectory.env_kwargs["tools"])
    return _environments_tools(trajectory.env_id, to_json(trajectory.env_kwargs))


@lru_cache(maxsize=64)
def _environments_tools(env_id: str, env_kwargs: str) -> tuple[ToolSpec, ...]:
    env = envs.make(env_id, **json.loads(env_kwargs))
    try:
        return env.tools
    finally:
        env.close()


def encode_rows(rows: Rows, chat: Chat, most_tokens: int | None) -> Iterator[Trajectory | DataError]:
    """Every row as a trajectory, or what is wrong with it."""
    return read_all(rows, lambda rows, index, uid: encode_row(rows, index, chat, most_tokens, uid=uid))


def read_all(rows: Rows, read: Callable[[Rows, int, str], T]) -> Iterator[T | DataError]:
    """What ``read`` makes of every row, its number and a uid, or what is wrong with it."""
    for index in _told(rows):
        try:
            yield read(rows, index, _uid(index))
        except DataError as error:
            yield error


def _uid(index: int) -> str:
    return f"{RECORDED}-{index:06d}"


def read_conversations(rows: Rows) -> Iterator[Conversation | DataError]:
    """Every row as a conversation, or what is wrong with it."""
    for index in _told(rows):
        try:
            yield read_conversation(rows[index], rows.where(index))
        except DataError as error:
            yield error


def refuse_bad(results: Iterable[object], total: int) -> None:
    """Raise one DataError with the first bad rows, if there are any among ``results``."""
    errors = [result for result in results if isinstance(result, DataError)]
    if errors:
        more = f"\n({len(errors) - MOST_ERRORS} more of {total} rows are bad.)"
        first = "\n".join(map(str, errors[:MOST_ERRORS]))
        raise DataError(first + (more if len(errors) > MOST_ERRORS else ""))


def _told(rows: Rows) -> Iterable[int]:
    doing, console = f"Reading {rows.path.name}", Console(stderr=True)
    return track(range(len(rows)), doing, console=console, transient=True, disable=len(rows) < MANY)


def texts(rows: Rows) -> Iterator[str]:
    """All that a tokenizer must be able to write, row by row."""
    for index in range(len(rows)):
        conversation = read_conversation(rows[index], rows.where(index))
        yield conversation.system
        yield from (json.dumps(to_dict(tool)) for tool in conversation.tools)
        for message in conversation.messages:
            yield message.content
            yield message.reasoning or ""
            if message.tool_calls:
                yield format_calls(message.tool_calls)


def student_groups(config: RunConfig, step: int) -> np.ndarray:
    """Which groups of a step are rolled out (bool [groups]); the others are recorded."""
    rollout = config.rollout
    groups = rollout.episodes_per_step // rollout.group_size
    if isinstance(rollout.source, Trajectories):
        return np.zeros(groups, dtype=bool)
    if not isinstance(rollout.source, Recorded):
        return np.ones(groups, dtype=bool)
    random = np.random.Generator(np.random.Philox(key=[config.seed, step], counter=[0, 0, 3, 2**63]))
    mine = student_groups_before(config, step + 1) - student_groups_before(config, step)
    return random.permutation(groups) < mine


def student_groups_before(config: RunConfig, step: int) -> int:
    """How many groups are rolled out in the steps before ``step``."""
    rollout = config.rollout
    groups = step * (rollout.episodes_per_step // rollout.group_size)
    if isinstance(rollout.source, Trajectories):
        return 0
    if not isinstance(rollout.source, Recorded):
        return groups
    return dealt(groups, [rollout.source.student, 1 - rollout.source.student])[0]


class Recordings:
    """The recorded part of a run's experience, all ``rows`` checked: ``read`` makes an episode of row, number
    and uid. Raises DataError."""

    def __init__(self, config: RunConfig, rows: Rows, read: Callable[[Rows, int, str], Trajectory]) -> None:
        self.config, self.rows, self._read = config, rows, read
        refuse_bad(read_all(rows, read), len(rows))

    def __iter__(self) -> Iterator[Trajectory]:
        """Each once, in the order of the rows."""
        return (self._read(self.rows, index, _uid(index)) for index in range(len(self.rows)))

    def drawn(self, step: int) -> int:
        """How many conversations the steps before ``step`` take."""
        rollout = self.config.rollout
        played = student_groups_before(self.config, step) * rollout.group_size
        return step * rollout.episodes_per_step - played

    def epoch(self, step: int) -> float:
        """Passes over the data after ``step`` steps."""
        return self.drawn(step) / len(self.rows)

    def draw(self, step: int) -> list[Trajectory]:
        """The next conversations, in the places of the step's groups that the student does not roll out."""
        size, next_ = self.config.rollout.group_size, self.drawn(step)
        sides = 2 if isinstance(self.rows, Pairs) else 1  # the two of a preference are a group
        trajectories = []
        for group in (~student_groups(self.config, step)).nonzero()[0].tolist():
            for number in range(group * size, (group + 1) * size):
                epoch, place = divmod(next_, len(self.rows))
                row, side = divmod(place, sides)
                index = int(_order(self.config.seed, len(self.rows) // sides, epoch)[row]) * sides + side
                drawn = self._read(self.rows, index, f"{step:06d}-{number:04d}")
                trajectories.append(replace(drawn, group=f"{step:06d}-g{group:04d}") if sides > 1 else drawn)
                next_ += 1
        return trajectories


@lru_cache(maxsize=4)
def _order(seed: int, size: int, epoch: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, size, 2**61]))
    return random.permutation(size)
