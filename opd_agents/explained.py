"""What `opd-agents rollout --explain` shows of a repaired episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from opd_agents.correction.evidence import Arm, probability_better
from opd_agents.explaining import Explained, Told
from opd_agents.report.examples import ActionView, action_view
from opd_agents.terminal import out
from opd_agents.types import Actor, Credit, Turn

LONGEST = 240  # characters of an action or an answer
LOCATED = {
    "improbable": "the first one to which the teacher gives less than {below} nats",
    "divergent": "the first one on which student and teacher differ by more than {above} nats a token",
    "disagreed": "the first one that is none of {samples} of the {by}'s",
    "dropped": "the one with which the student's success falls, by bisection with {rollouts} rollouts each",
}
ARMS = {"repair": "after the repair", "own": "after its own action", "retry": "where it tries again"}


def show_explained(found: Explained) -> None:
    """The episode with its error, what was done instead, what proves it, what is learned from."""
    episode, turn = found.episode.trajectory, found.repair["turn"]
    out.print(
        f"[bold]{escape(found.where)}[/]: {episode.outcome}, reward {episode.reward:g}", highlight=False
    )
    for message in episode.messages:
        if message.role == "user":
            out.print(escape(_short(message.content)), highlight=False)
    _heading("What the student did")
    out.print(_turns(found.episode, marked=turn))
    out.print("[dim]nats: KL(student || teacher), the teacher's log-prob of the action[/]", highlight=False)
    _show_repair(found, found.repair)
    later = found.repair.get("then")
    while later:
        _heading("A run after that failed, too, and was repaired in turn")
        _show_repair(found, later)
        later = later.get("then")
    if not found.branches:
        _heading("Nothing of it is learned from")
    for branch in found.branches:
        if (start := branch.trajectory.branch) is not None and not branch.trajectory.group:
            _heading(f"Learned from: {branch.trajectory.uid}, {branch.trajectory.outcome}")
            out.print(_turns(branch, first=start.turn))
    if practised := [branch for branch in found.branches if branch.trajectory.group]:
        _heading("Practised, and learned from: what the student does in the state before the error")
        out.print(_key_steps(practised))


def _heading(text: str) -> None:
    out.print(f"\n[bold]{escape(text)}[/]", highlight=False)


def _show_repair(found: Explained, repair: Mapping[str, Any]) -> None:
    turn, propose = repair["turn"], found.correction.propose
    where = "the one that the judge names" if propose.by == "judge" else LOCATED[propose.where]
    _heading(f"The error: action {turn + 1}, {where.format(**propose.model_dump())}")
    if reason := found.episode.reasons.get(turn):
        out.print(escape(f"judge: {reason}"), highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("done", f"[red]{_action(action_view(repair['student_action']))}[/]")
    instead = _action(action_view(repair["teacher_action"]))
    table.add_row("instead", f"[green]{instead}[/], as the {propose.by} has it")
    out.print(table)
    _heading("The proof: fresh rollouts from the state before it")
    out.print(_proof(repair))
    rules, better = found.correction.verify, repair["evidence"]["better"]
    verdict = "[green]accepted[/]" if repair["accepted"] else "[red]rejected[/]"
    asked = f"{rules.accept:g} is asked for" if rules.rivals else "one success is asked for"
    out.print(
        f"{verdict}: better than every rival with a probability of {better:.3f}; {asked}", highlight=False
    )


def _proof(repair: Mapping[str, Any]) -> Table:
    """A line an arm; of an audit, which decides nothing, beside."""
    evidence, audit = repair["evidence"], repair["audit"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "succeed", "repair better", *(["audit"] if audit else [])):
        table.add_column(column, no_wrap=True, justify="right" if column else "left")
    for name, label in ARMS.items():
        if name in evidence:
            beside = "" if name == "repair" else f"{probability_better(*_arms(evidence, name)):.3f}"
            row = [label, "{} of {}".format(*evidence[name]), beside]
            table.add_row(*row, *(["{} of {}".format(*audit[name])] if audit else []))
    return table


def _arms(evidence: Mapping[str, Any], rival: str) -> tuple[Arm, Arm]:
    return Arm(*evidence["repair"]), Arm(*evidence[rival])


def _key_steps(practised: Sequence[Told]) -> Table:
    """A line an episode."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("outcome", no_wrap=True)
    table.add_column("it is", no_wrap=True)
    table.add_column("action and answer", overflow="fold", ratio=3)
    table.add_column("credit", overflow="fold", ratio=2)
    for told in practised:
        episode, start = told.trajectory, told.trajectory.branch
        if start is not None and len(episode.turns) > start.turn:  # else its environment failed
            credit = "\n".join(_credit(told.credits[start.turn], told.counted[start.turn]))
            said, reason = _said(episode.turns[start.turn]), told.reasons.get(start.turn)
            said += f"\n[dim]judge: {escape(_short(reason))}[/]" if reason else ""
            table.add_row(episode.outcome, start.key, said, credit)
    return table


def _turns(told: Told, *, marked: int | None = None, first: int = 0) -> Table:
    """A line an action, with its answer and its credit; those before ``first`` are inherited."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("action and answer", overflow="fold", ratio=3)
    table.add_column("KL", justify="right", no_wrap=True)
    table.add_column("teacher", justify="right", no_wrap=True)
    table.add_column("credit", overflow="fold", ratio=2)
    if first:
        weights = {turn.weight for turn in told.trajectory.turns[:first]}
        table.add_row(
            "", f"[dim]its first {first} as they were, weight {', '.join(f'{w:g}' for w in weights)}[/]"
        )
    for number, turn in list(enumerate(told.trajectory.turns))[first:]:
        credit = told.credits[number]
        sign = "[red]>[/]" if number == marked else " "
        table.add_row(
            f"{sign}{number + 1}", _said(turn), _nats(credit.kl_sum), _nats(credit.teacher_logprob),
            "\n".join(_credit(credit, told.counted[number])),
        )  # fmt: skip
    return table


def _said(turn: Turn) -> str:
    actor = "" if turn.actor is Actor.STUDENT else f"[green]{turn.actor}[/] "
    action = ActionView((), turn.text or turn.action) if turn.parse_error else action_view(turn.action)
    problem = turn.parse_error or turn.tool_error
    answer = (
        f"[yellow]{escape(_short(problem))}[/]" if problem else f"[dim]{escape(_short(turn.observation))}[/]"
    )
    return f"{actor}{_action(action)}\n{answer}"


def _action(view: ActionView) -> str:
    calls = (f"{tool}({', '.join(f'{key}={value}' for key, value in given)})" for tool, given in view.calls)
    return escape(_short("; ".join(calls) or view.text))


def _credit(credit: Credit, counted: Mapping[str, float]) -> Iterator[str]:
    """All that is not as it is where nobody said anything; then the components that count the action."""
    elsewhere = {"kl_sum", "kl_mean", "teacher_logprob", "token_kl", "token_advantage", "unlearned"}
    for field in dataclasses.fields(credit):
        value, nothing = getattr(credit, field.name), getattr(Credit(), field.name)
        if field.name in elsewhere or value == nothing:
            continue
        parts = value.items() if isinstance(value, Mapping) else [(field.name, value)]
        yield from (f"{escape(name)} {_number(part)}" for name, part in parts if part != 0)
    weighed = (name if weight == 1 else f"{name} x {weight:.3g}" for name, weight in counted.items())
    yield f"[dim]in {escape(', '.join(weighed)) or 'no component'}[/]"


def _number(value: Any) -> str:
    return f"{value:+.2f}" if isinstance(value, float) else escape(str(value))


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)"
