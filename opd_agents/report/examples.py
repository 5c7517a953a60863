"""Episodes to look at: the same tasks before and after, and corrected actions, as views for the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_agents.errors import RunFolderError
from opd_agents.evaluation.suites import shown_options
from opd_agents.report.groups import Group
from opd_agents.report.reading import Run, number, read_jsonl, repaired
from opd_agents.types import Actor, Credit, Outcome, SpanKind, StopReason, Trajectory, Turn, from_dict

MOST_TURNS = 40  # of one episode; the middle of a longer one is left out
BEFORE, AFTER = "student_before", "student_after"
CUT_BY = {
    StopReason.LENGTH: "tokens per turn",
    StopReason.CONTEXT: "context tokens",
    StopReason.ACTIONS: "action tokens",
}
TIME_OUT = re.compile(r"time[sd]?[ -_]?out", re.IGNORECASE)
# (before succeeded, after succeeded) -> how many to show: gains, and losses and shared failures as well.
SHOWN = {(False, True): 2, (True, False): 1, (False, False): 1, (True, True): 1}
MOST_PAIRS = 4
MOST_ACCEPTED, MOST_REJECTED = 3, 1


@dataclass(frozen=True, slots=True)
class ActionView:
    """``calls``: (tool, ((argument, value), ...)); ``text`` where the action is no call."""

    calls: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    text: str


@dataclass(frozen=True, slots=True)
class TurnView:
    """``number`` counts from 1; KL(student || teacher) in nats, None where no teacher scored the turn."""

    number: int
    actor: str
    action: ActionView
    written: str  # the policy's own text, where it held more than the action
    observation: str
    kl_sum: float | None
    kl_mean: float | None
    flags: tuple[tuple[str, str], ...]  # (short name, what happened)


@dataclass(frozen=True, slots=True)
class EpisodeView:
    outcome: str
    success: bool
    reward: float
    turns: tuple[TurnView, ...]
    n_turns: int
    error: str
    temperature: float

    @property
    def n_left_out(self) -> int:
        return self.n_turns - len(self.turns)


@dataclass(frozen=True, slots=True)
class Pair:
    task: str
    env: str
    request: str  # what the user asked, from the reset's messages
    before: EpisodeView
    after: EpisodeView


@dataclass(frozen=True, slots=True)
class LaterRepair:
    """What was tried in a run after a repair, which failed, too."""

    accepted: bool
    turn: int  # counts from 1
    student: ActionView
    teacher: ActionView
    better: float


@dataclass(frozen=True, slots=True)
class RepairView:
    where: str
    accepted: bool
    turn: int  # counts from 1
    request: str
    turns_before: tuple[TurnView, ...]
    n_left_out: int
    student: ActionView
    teacher: ActionView
    observation: str  # what the student's action led to
    kl_sum: float | None
    by: str  # who proposed the other action
    arms: Mapping[str, tuple[int, int]]  # successes and rollouts of `repair`, and of `own` or `retry` or both
    audit: Mapping[str, tuple[int, int]]  # the same of the audit; empty where there was none
    better: float  # probability that the repair is the best of them
    control: bool
    later: tuple[LaterRepair, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """``counts``: tasks by (before succeeded, after succeeded); ``largest_kl`` scales all KL bars."""

    pairs: tuple[Pair, ...]
    counts: Mapping[tuple[bool, bool], int]
    repairs: tuple[RepairView, ...]
    largest_kl: float


def examples(group: Group) -> Examples:
    """A few episodes of the group's first run.

    Raises:
        RunFolderError: a trajectory line that cannot be read.
    """
    run = group.runs[0]
    pairs, counts = _pairs(run)
    repairs = _repairs(run)
    turns = [turn for pair in pairs for episode in (pair.before, pair.after) for turn in episode.turns]
    turns += [turn for repair in repairs for turn in repair.turns_before]
    kls = [turn.kl_sum for turn in turns] + [repair.kl_sum for repair in repairs]
    return Examples(pairs, counts, repairs, max((kl for kl in kls if kl is not None), default=0.0))


def action_view(action: str) -> ActionView:
    """An action as the environment receives it: JSON calls, or text."""
    try:
        value = json.loads(action)
    except ValueError:
        return ActionView((), action)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return ActionView((), action)
    return ActionView(tuple((call["name"], _arguments(call.get("arguments"))) for call in calls), "")


def _arguments(arguments: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(arguments, Mapping):
        return () if arguments is None else (("", _plain(arguments)),)
    return tuple((str(key), _plain(value)) for key, value in arguments.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pairs(run: Run) -> tuple[tuple[Pair, ...], dict[tuple[bool, bool], int]]:
    folder = run.path / "trajectories"
    before, after = (_by_task(folder / f"eval-{policy}.jsonl") for policy in (BEFORE, AFTER))
    kinds: dict[tuple[bool, bool], list[Any]] = {kind: [] for kind in SHOWN}
    for key in before:
        if key in after:
            kinds[_success(before[key]), _success(after[key])].append(key)
    chosen = [key for kind, limit in SHOWN.items() for key in kinds[kind][:limit]][:MOST_PAIRS]
    return (
        tuple(_pair(before[key], after[key]) for key in chosen),
        {kind: len(keys) for kind, keys in kinds.items()},
    )


def _by_task(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The first line of each task at the highest temperature in the file (sampled, not greedy)."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    heat: dict[tuple[str, str, str], float] = {}
    for line in read_jsonl(path):
        try:
            trajectory = line["trajectory"]
            key = (trajectory["env_id"], trajectory["task"]["split"], trajectory["task"]["id"])
            temperature = float(trajectory["temperature"])
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(path, error) from error
        if key not in found or temperature > heat[key]:
            found[key], heat[key] = {**line, "path": path}, temperature
    return found


def _success(line: Mapping[str, Any]) -> bool:
    return bool(line["trajectory"].get("outcome") == Outcome.SUCCESS.value)


def _pair(before: Mapping[str, Any], after: Mapping[str, Any]) -> Pair:
    trajectory, _ = nouns(before)
    return Pair(
        task=f"{trajectory.task.split} task {trajectory.task.id}",
        env=environment_name(trajectory),
        request=_request(trajectory),
        before=_episode(*nouns(before)),
        after=_episode(*nouns(after)),
    )


def environment_name(trajectory: Trajectory) -> str:
    """With its options, which tell apart those that each have a task 0."""
    return f"{trajectory.env_id} {shown_options(trajectory.env_kwargs)}".rstrip()


def nouns(line: Mapping[str, Any]) -> tuple[Trajectory, tuple[Credit, ...]]:
    try:
        trajectory = from_dict(Trajectory, line["trajectory"])
        return trajectory, tuple(from_dict(Credit, credit) for credit in line.get("credit") or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(line["path"], error) from error


def unreadable(path: Path, error: Exception) -> RunFolderError:
    return RunFolderError(
        f"{path} holds a line that is no trajectory ({type(error).__name__}: {error}). "
        "It was written by another version or changed by hand; remove the file to report without it."
    )


def _request(trajectory: Trajectory) -> str:
    return "\n\n".join(message.content for message in trajectory.messages if message.role == "user")


def _episode(trajectory: Trajectory, credit: Sequence[Credit]) -> EpisodeView:
    views = _turns(trajectory, credit)
    kept = views if len(views) <= MOST_TURNS else (*views[: MOST_TURNS - 10], *views[-10:])
    return EpisodeView(
        outcome=trajectory.outcome.value,
        success=trajectory.success,
        reward=trajectory.reward,
        turns=kept,
        n_turns=len(views),
        error=trajectory.error or "",
        temperature=trajectory.temperature,
    )


def _turns(trajectory: Trajectory, credit: Sequence[Credit]) -> tuple[TurnView, ...]:
    scored = credit if len(credit) == len(trajectory.turns) else [Credit()] * len(trajectory.turns)
    return tuple(
        TurnView(
            number=i,
            actor="" if turn.actor is Actor.STUDENT else turn.actor.value,
            action=ActionView((), turn.text or turn.action) if turn.parse_error else action_view(turn.action),
            written=turn.text if any(span.kind is SpanKind.THINK for span in turn.spans) else "",
            observation=turn.observation,
            kl_sum=number(given.kl_sum),
            kl_mean=number(given.kl_mean),
            flags=(*flags(turn), *judged(given)),
        )
        for i, (turn, given) in enumerate(zip(trajectory.turns, scored, strict=True), start=1)
    )


def flags(turn: Turn) -> Iterator[tuple[str, str]]:
    """What went wrong with an action."""
    if turn.parse_error:
        yield "parse error", turn.parse_error
    if turn.tool_error:
        yield ("time-out" if TIME_OUT.search(turn.tool_error) else "tool error"), turn.tool_error
    if limit := CUT_BY.get(turn.stop_reason):
        yield "cut", f"the limit of {limit} was reached"
    if turn.truncated:
        yield "turn limit", "the environment ended the episode unfinished"


def judged(credit: Credit) -> Iterator[tuple[str, str]]:
    """What a judge said of the action."""
    if credit.score is not None:
        yield f"score {credit.score}", credit.reason
    if credit.verdict is not None:
        yield f"verdict {credit.verdict}", credit.reason


def _repairs(run: Run) -> tuple[RepairView, ...]:
    """Accepted repairs spread over the training, and a rejected one, of every stage together."""
    accepted: list[RepairView] = []
    rejected: list[RepairView] = []
    for label, stage in run.training():
        by = proposer(stage.config)
        for path in sorted((stage.path / "trajectories").glob("step-*.jsonl")):
            of_file: dict[bool, RepairView] = {}
            for line in read_jsonl(path, repaired):
                if line.get("repair") and (bool(line["repair"].get("accepted")) not in of_file):
                    view = _repair({**line, "path": path}, label, by)
                    of_file[view.accepted] = view
            accepted += [of_file[True]] if True in of_file else []
            rejected += [of_file[False]] if False in of_file else []
    return (*_spread(accepted, MOST_ACCEPTED), *_spread(rejected, MOST_REJECTED))


def _spread(views: Sequence[RepairView], n: int) -> Sequence[RepairView]:
    """``n`` of them at even distances, the first included."""
    return views if len(views) <= n else [views[i * len(views) // n] for i in range(n)]


def proposer(config: Mapping[str, Any]) -> str:
    """Of a run's config, in which a section may be null."""
    correction = config.get("correction") or {}
    return str((correction.get("propose") or {}).get("by", "teacher"))


def _repair(line: Mapping[str, Any], stage: str, by: str) -> RepairView:
    trajectory, credit = nouns(line)
    try:
        repair = line["repair"]
        turn = int(repair["turn"])
        views = _turns(trajectory, credit)
        shown = views[max(0, turn - 12) : turn]
        step = int(line["path"].stem.removeprefix("step-"))
        where = [stage, f"step {step}", f"{trajectory.task.split} task {trajectory.task.id}"]
        return RepairView(
            where=", ".join(filter(None, where)),
            accepted=bool(repair["accepted"]),
            turn=turn + 1,
            request=_request(trajectory),
            turns_before=shown,
            n_left_out=turn - len(shown),
            student=action_view(repair["student_action"]),
            teacher=action_view(repair["teacher_action"]),
            observation=views[turn].observation,
            kl_sum=views[turn].kl_sum,
            by=by,
            arms=_arms(repair["evidence"]),
            audit=_arms(repair["audit"] or {}),
            better=float(repair["evidence"]["better"]),
            control=bool(repair["control"]),
            later=tuple(_later(repair)),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise unreadable(line["path"], error) from error


def _arms(evidence: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (int(of[0]), int(of[1])) for name, of in evidence.items() if name != "better"}


def _later(repair: Mapping[str, Any]) -> Iterator[LaterRepair]:
    """Those tried after one that failed, in their order; runs of before had at most one an episode."""
    while later := repair.get("then"):
        yield LaterRepair(
            accepted=bool(later["accepted"]),
            turn=int(later["turn"]) + 1,
            student=action_view(later["student_action"]),
            teacher=action_view(later["teacher_action"]),
            better=float(later["evidence"]["better"]),
        )
        repair = later
