"""Episodes as rows of TRL's conversational datasets: prompt and completion for SFTTrainer, preferences for
DPOTrainer, prompts for GRPOTrainer.

Messages are TRL's: arguments of a call as an object, tools as JSON in one text, so that a table of many
schemas stays simple.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opd_agents.errors import DataError
from opd_agents.evaluation.metrics import by_task, task_key
from opd_agents.messages import Conversation, to_row
from opd_agents.rows import shared
from opd_agents.types import Outcome, Trajectory, to_json

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two episodes of one task from one state, of which one is better. With a ``turn`` (0-based) they are
    compared by their actions in that turn alone, which all before it have in common."""

    chosen: Trajectory
    rejected: Trajectory
    turn: int | None = None


def completion_row(conversation: Conversation) -> Row:
    """``prompt``: all before the first action that is learned from; ``completion``: the rest, the answers of
    tools included. Raises DataError where a later action is not to be learned from: TRL has no mask for it.
    """
    messages, tools = _messages(conversation), _tools(conversation)
    begin = len(messages) - len(conversation.trained) + conversation.trained.index(True)
    learned = [conversation.trained[i] for i in conversation.actions()]
    if not all(learned[learned.index(True) :]):
        raise DataError("an action after others is not to be learned from, which TRL's rows cannot say.")
    row = {"id": conversation.id, "prompt": messages[:begin], "completion": messages[begin:]} | tools
    return row | {"success": conversation.success, "reward": conversation.reward}


def pairs(episodes: Sequence[Trajectory]) -> Iterator[Pair]:
    """Every success of a task against every failure of it from the same prompt, or the same state of an
    episode; every accepted repair against what was repaired, and every action of another against the
    student's, where they are of one of the ``episodes``.

    Episodes that their environment broke, and those that a demonstration has replaced, are in none.
    """
    sound = [one for one in episodes if one.outcome is not Outcome.ERROR and not one.replaced]
    groups: dict[str, list[Trajectory]] = {}
    for one in sound:
        if one.branch is None or one.group:  # what is practised is of a group
            place = one.branch and (one.branch.parent, one.branch.turn)
            groups.setdefault(to_json((task_key(one), one.messages, place)), []).append(one)
    for group in groups.values():
        failures = [one for one in group if not one.success]
        yield from (Pair(good, bad) for good in group if good.success for bad in failures)
    known = {one.uid: one for one in sound}
    for one in sound:
        if one.branch is not None and not one.group and one.branch.parent in known:
            own, turn = known[one.branch.parent], one.branch.turn
            yield Pair(one, own, turn) if one.branch.better else Pair(own, one, turn)


def preference_row(pair: Pair, chosen: Conversation, rejected: Conversation) -> Row | None:
    """``prompt``: what both sides have in common up to an action; ``chosen`` and ``rejected``: the rest of
    each, or its action in the pair's turn alone. None where the two do the same."""
    sides = [_messages(chosen), _messages(rejected)]
    places = [[i for i, message in enumerate(side) if message["role"] == "assistant"] for side in sides]
    if pair.turn is None:
        alike = shared(*sides)
        begin = max(place for place in {*places[0]} & {*places[1]} if place <= alike)
    else:
        begin = places[0][pair.turn]
        sides = [side[: begin + 1] for side in sides]
    better, worse = (side[begin:] for side in sides)
    if better == worse:
        return None
    row: Row = {"id": f"{pair.chosen.uid} / {pair.rejected.uid}", "prompt": sides[0][:begin]}
    return row | {"chosen": better, "rejected": worse} | _tools(chosen)


def prompt_rows(episodes: Iterable[Trajectory]) -> Iterator[Row]:
    """Every task once for each prompt that it had, in the order of their first episodes.

    ``environment`` selects one of `environment_factory`; it, ``options`` (JSON), ``split``, ``task`` and
    ``seed`` (of the first episode) make the episode again, and go to the reward functions. ``success`` and
    ``reward`` are means over its ``episodes``; those of branches and demonstrations do not count, nor what an
    environment broke.
    """
    own = [one for one in episodes if one.branch is None and not one.demonstration]
    sound = [one for one in own if one.outcome is not Outcome.ERROR]
    for of_task in by_task(sound).values():
        prompts: dict[str, list[Trajectory]] = {}
        for one in of_task:
            prompts.setdefault(to_json(one.messages), []).append(one)
        for group in prompts.values():
            first, size = group[0], len(group)
            yield {
                "prompt": [{"role": m.role, "content": m.content} for m in first.messages],
                "environment": first.env_id, "options": to_json(first.env_kwargs),
                "split": first.task.split, "task": first.task.id, "seed": first.seed, "episodes": size,
                "success": sum(one.success for one in group) / size,
                "reward": sum(one.reward for one in group) / size,
            }  # fmt: skip


def _messages(conversation: Conversation) -> list[Row]:
    return [_message(row) for row in to_row(conversation)["messages"]]


def _message(row: Row) -> Row:
    calls = [
        call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
        for call in row.get("tool_calls", ())
    ]
    kept = {key: value for key, value in row.items() if key != "weight"}
    return kept | ({"tool_calls": calls} if calls else {})


def _tools(conversation: Conversation) -> Row:
    tools = to_row(conversation).get("tools")
    return {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
