"""What the commands show: lists, results and episodes; standard error is for what goes wrong."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from opd_agents.traces import Traces
    from opd_agents.types import Trajectory

out = Console()
err = Console(stderr=True)


def print_result(data: Any, table: RenderableType, as_json: bool, least_width: int = 0) -> None:
    """The table, at least so many characters wide, or the one JSON document that ``--json`` asks for."""
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        console = out if out.width >= least_width else Console(width=least_width)
        console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def envs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The environments, those of a family together; one line for ids that differ only after a dot."""
    table = Table(box=None, header_style="bold", pad_edge=False, caption_justify="left")
    for column in ("id", "tools", "turns", "splits", "fork", "extra", "licence"):
        table.add_column(column, overflow="fold", no_wrap=column in ("id", "fork"))
    for family, members in groupby(
        sorted(rows, key=lambda row: row["family"]), key=lambda row: row["family"]
    ):
        table.add_row(f"[bold]{escape(family)}[/]")
        names = sorted(members, key=lambda row: row["id"])
        for name, alike in groupby(names, key=lambda row: re.sub(r"\..*(-v\d+)$", r".*\1", row["id"])):
            row, *others = alike
            known = row["missing"] is None
            table.add_row(
                f"  {escape(name)}" + (f" ({len(others) + 1})" if others else ""),
                str(len(row["tools"])) if known else "",
                str(row["max_turns"]),
                _splits(row["splits"]) if known else "not installed",
                row["fork_mode"],
                row["extra"] or "",
                escape(row["licence"]),
            )
    return table


def _splits(sizes: Mapping[str, int]) -> str:
    """Their sizes, shortly, in their order."""
    short = [
        f"{n // 10**6}M" if n >= 10**6 else f"{n // 1000}k" if n >= 10**4 else str(n) for n in sizes.values()
    ]
    return " + ".join(short) or "your file's"


def details(row: dict[str, Any]) -> Table:
    """A line for each field of one row."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in row.items():
        table.add_row(key, escape(_text(value)))
    return table


def methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The methods, those of a family together."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("title", overflow="fold", ratio=1)
    table.add_column("paper", overflow="fold", max_width=16)
    for family, members in groupby(rows, key=lambda row: row["family"]):
        table.add_row(f"[bold]{escape(family)}[/]")
        for row in members:
            table.add_row(f"  {row['name']}", escape(row["title"]), escape(row["paper"]))
    return table


def show_method(row: Mapping[str, Any], text: str) -> None:
    """A method: what is known of it, and the settings of its preset as its YAML ``text`` has them."""
    said = {key: value for key, value in row.items() if key not in ("name", "config")}
    out.print(details({"method": row["name"]} | said))
    settings = dedent(text.partition("\nconfig:\n")[2])
    shown = f"\n# what `method: {row['name']}` stands for; a config may change any of it\n{settings}"
    out.print(shown, markup=False, highlight=False, soft_wrap=True, end="")


def check_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """What was looked at in each stage, what was found, and what a step and the run would take."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold", ratio=1)
    signs = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: ""}
    for stage in stages:
        table.add_row(f"[bold]{escape(stage['name'])}[/]", "", "")
        for finding in stage["findings"]:
            table.add_row(f"  {signs[finding['passed']]}", finding["about"], escape(finding["says"]))
        if stage["memory"]:
            sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in stage["memory"].items())
            table.add_row("", "memory in GiB", sizes)
        if stage["seconds"]:
            step, whole = stage["seconds"]["step"], stage["seconds"]["run"]
            table.add_row("", "time", f"about {step:.1f} s a step, {whole / 60:.1f} minutes in all, here")
        if asked := stage["questions"]:
            _add_questions(table, asked)
    return table


def _add_questions(table: Table, asked: Mapping[str, Any]) -> None:
    """The four answers, a question mark where the intervals leave doubt; figures by depth; what to do."""
    words = {True: "[green]yes[/]", False: "[yellow]no[/]", None: "unknown"}
    table.add_row(
        "",
        "questions",
        f"asked of {asked['figures']['student']['played']} episodes in {asked['seconds']:.0f} s",
    )
    for name, said in asked["answers"].items():
        doubt = "?" if said["holds"] is not None and not said["sure"] else ""
        table.add_row(f"  {words[said['holds']]}{doubt}", name, escape(said["says"]))
    for depth in asked["figures"]["depths"]:
        first, last = depth["first"], depth["last"]
        table.add_row("", f"turn {first}" if first == last else f"turns {first}-{last}", _of_depth(depth))
    advice = asked["recommendation"]
    says = f"[bold]{advice['choice']}[/]: {escape(advice['reason'])}."
    if advice["open"]:
        says += f" Undecided: {', '.join(advice['open'])}; more --rollouts narrow the intervals."
    table.add_row("", "advice", says)


def _of_depth(depth: Mapping[str, Any]) -> str:
    parts = (
        [f"KL {depth['kl']['value']:.2f} nats a token"]
        if depth["kl"] and depth["kl"]["value"] is not None
        else []
    )
    parts.append(f"{_share(depth['refused'])} refused")
    if depth["agreement"]["played"]:
        parts.append(f"as the teacher {_share(depth['agreement'])}")
    if depth["continued"]["played"]:
        teacher, student = _share(depth["continued"]), _share(depth["student"])
        parts.append(f"from here on the teacher solves {teacher}, the student {student}")
    return "; ".join(parts)


def _share(arm: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in arm["interval"])
    return f"{100 * arm['share']:.0f} % ({low:.0f}-{high:.0f})"


def show_run(run: Path) -> None:
    """A finished run, and what its stages reached on the validation tasks."""
    out.print(f"Run: {run}", soft_wrap=True)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for stage in summary.get("stages", {"": summary}).values():
        if result := stage["evaluation"]:
            low, high = (round(100 * bound) for bound in result["interval"])
            sampled, greedy = (f"{100 * result[key]:.1f} %" for key in ("success", "success_greedy"))
            place = f"{stage['name']}, validation after step {stage['steps']}"
            shown = f"{place}: success {sampled} ({low}-{high}) sampled, {greedy} greedy"
            if "trainer.until" in (end := stage.get("ended", "")):
                shown += f"; ended early by {end}"
            out.print(shown, soft_wrap=True, highlight=False)


def show_outcome(trajectory: Trajectory) -> None:
    """An episode in one line, and what made it fail."""
    facts = f"reward {trajectory.reward:g}, {len(trajectory.turns)} turns"
    out.print(f"[bold]task {trajectory.task.id}: {trajectory.outcome}[/], {facts}", highlight=False)
    if trajectory.error:
        out.print(escape(trajectory.error), style="red", soft_wrap=True)


def show_episode(trajectory: Trajectory) -> None:
    """An episode turn by turn."""
    show = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)
    for message in trajectory.messages:
        show(f"{message.role}: {message.content}", style="dim" if message.role == "system" else "bold")
    for number, turn in enumerate(trajectory.turns, 1):
        show(f"{number} {turn.actor}: {turn.text or turn.action}", style="cyan")
        for problem in filter(None, (turn.parse_error, turn.tool_error)):
            show(f"  refused: {problem}", style="yellow")
        show(f"  {turn.observation}")
    show_outcome(trajectory)


def print_written(written: Traces, file: Path) -> None:
    """What a conversion gave; the rows left out are told on standard error."""
    for reason in written.skipped:
        err.print(f"skipped: {escape(reason)}", soft_wrap=True, highlight=False)
    learned = f", {written.turns} turns, {written.tokens} action tokens" if written.turns else ""
    counts = f"{written.rows} {written.kind}{learned}"
    out.print(f"{file}: {counts}; {len(written.skipped)} skipped.", soft_wrap=True, highlight=False)
