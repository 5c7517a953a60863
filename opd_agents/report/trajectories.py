"""All trajectories of the runs for the viewer: a list of them for the page, a sample of them in the page, and
the others as a script beside it, which a page can load from a file where it can fetch nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from opd_agents.alarms import WINDOW, alarms
from opd_agents.report.episode_data import episode_data, first_error, mean_kl
from opd_agents.report.escaping import script_json, visible
from opd_agents.report.examples import environment_name, nouns, proposer, unreadable
from opd_agents.report.groups import Group
from opd_agents.report.pieces import Pieces, pieces_of_policy, pieces_of_run
from opd_agents.report.reading import HOW, number, read_jsonl, repaired
from opd_agents.types import ActionFeedback, Outcome, Trajectory, from_dict

MOST = 10_000  # trajectories
MOST_BYTES = 160_000_000  # of trajectory files that are read: a side file has about a third of that
MOST_NAME = 120  # characters of the name of a task or an environment
SAMPLE_BYTES = 1_500_000  # of the trajectories in the page
OUTCOMES = tuple(Outcome)


@dataclass(frozen=True, slots=True)
class Source:
    """A trajectory file. ``part`` is what a filter calls it, the stage or the policy; ``step`` is the
    training step (0: none), ``signs`` are the alarms that rang for it."""

    path: Path
    label: str
    part: str
    step: int
    by: str
    pieces: Pieces
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Viewer:
    """``page`` is the JSON that the page holds, ``side`` the script beside it ("": all is in the page),
    ``shown`` of ``known`` trajectories are in the list; of ``coloured`` turns there are the tokens."""

    page: str
    side: str
    shown: int
    known: int
    in_page: int
    coloured: bool


def viewer(groups: Sequence[Group], side_name: str) -> Viewer | None:
    """The trajectories of all runs, evenly thinned out where there are too many, those with a repair kept;
    None where there are none. ``side_name`` is that of the script's file.

    Raises:
        RunFolderError: a trajectory line that cannot be read.
    """
    sources = [source for group in groups for source in _sources(group, several=len(groups) > 1)]
    sizes = [_size(source.path) for source in sources]
    known, read = sum(n for n, _ in sizes), sum(size for _, size in sizes)
    if not known:
        return None
    share = min(1.0, MOST / known, MOST_BYTES / max(1, read))
    rows, bodies, numbers = [], [], count(1)
    lists: dict[str, dict[str, int]] = {"environments": {}, "signs": {}}
    for place, source in enumerate(sources):
        for row, body in _episodes(source, share, numbers):
            environment = lists["environments"].setdefault(row.pop("environment"), len(lists["environments"]))
            rows.append([place, environment, *row.values()])
            bodies.append(body)
    listed = [
        [visible(s.label), visible(s.part), s.step, [_placed(lists["signs"], name) for name in s.signs]]
        for s in sources
    ]
    sample = _sample([len(body) for body in bodies], [row[-1] for row in rows])
    own_id = hashlib.sha256("".join(bodies).encode("utf-8", "replace")).hexdigest()[:16]
    side = "" if len(sample) == len(bodies) else f'opdTrajectories("{own_id}",{script_json(bodies)});\n'
    page = {
        "id": own_id, "side": side_name if side else "", "sources": listed, "rows": rows,
        "outcomes": [outcome.value for outcome in OUTCOMES],
        "environments": [visible(name) for name in lists["environments"]],
        "signs": [visible(name) for name in lists["signs"]],
        "sample": {str(i): json.loads(bodies[i]) for i in sample},
    }  # fmt: skip
    coloured = any('"sizes":' in body for body in bodies)
    return Viewer(script_json(page), side, len(rows), known, len(sample), coloured)


def _placed(names: dict[str, int], name: str) -> int:
    return names.setdefault(name, len(names))


def _sources(group: Group, several: bool) -> Iterator[Source]:
    for run in group.runs:
        first = [group.name] if several else []
        first += [run.name] if len(group.runs) > 1 else []
        policies = _policies(run.path / HOW) if run.evaluated else {}
        for label, stage in run.everything():
            rang = alarms(stage.metrics)
            own = None if run.evaluated else pieces_of_run(stage, run)
            for path in stage.episode_files():
                step = int(path.stem.removeprefix("step-")) if path.stem.startswith("step-") else 0
                name = path.stem.removeprefix("eval-")
                part = (label or "training") if step else f"{name.replace('.greedy', ', greedy')} (evaluated)"
                yield Source(
                    path, "/".join([*first, *filter(None, [label]), path.stem]),
                    "/".join([*first, part]), step, proposer(stage.config),
                    own or policies.get(name.removesuffix(".greedy"), Pieces(None)),
                    tuple(a.name for a in rang if step and a.step - WINDOW < step <= a.step),
                )  # fmt: skip


def _policies(how: Path) -> dict[str, Pieces]:
    """The tokenizers of an evaluation's policies, by the names of their files."""
    from opd_agents.evaluation.records import stem

    known = json.loads(how.read_bytes()).get("policies", {}) if how.is_file() else {}
    return {stem(name): pieces_of_policy(identity) for name, identity in known.items()}


def _size(path: Path) -> tuple[int, int]:
    """Lines and bytes of a file."""
    with path.open("rb") as file:
        return sum(1 for _ in file), path.stat().st_size


def _episodes(source: Source, share: float, numbers: Iterator[int]) -> Iterator[tuple[dict[str, Any], str]]:
    """The chosen lines of a file: what the list says of each, and its body as JSON."""

    def wanted(line: bytes) -> bool:
        number = next(numbers)
        return int(number * share) > int((number - 1) * share) or repaired(line)

    for line in read_jsonl(source.path, wanted):
        line["path"] = source.path
        trajectory, credits = nouns(line)
        try:
            feedback = [from_dict(ActionFeedback, one) for one in line.get("feedback") or ()]
            repair = line.get("repair")
            body = episode_data(trajectory, credits, feedback, repair, source.by, source.pieces)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise unreadable(source.path, error) from error
        kl = mean_kl(trajectory, credits)
        row = {
            "environment": visible(environment_name(trajectory)[:MOST_NAME]),
            "uid": visible(trajectory.uid),
            "task": visible(f"{trajectory.task.split} {trajectory.task.id}"[:MOST_NAME]),
            "outcome": OUTCOMES.index(trajectory.outcome),
            "reward": number(trajectory.reward) or 0,
            "turns": len(trajectory.turns),
            "kl": None if kl is None else round(kl, 4),
            "error": first_error(trajectory),
            "kind": _kind(trajectory),
            "parent": "" if trajectory.branch is None else visible(trajectory.branch.parent),
            "repair": 0 if not repair else 2 if repair["accepted"] else 1,
        }
        yield row, json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _kind(trajectory: Trajectory) -> str:
    """What it is, where it is not simply an episode of the policy."""
    if trajectory.branch is not None:
        return "correction" if trajectory.branch.tried else "alternative"
    if trajectory.demonstration:
        return "demonstration"
    return "recorded" if trajectory.recorded or trajectory.stored else ""


def _sample(sizes: Sequence[int], repairs: Sequence[int]) -> list[int]:
    """The places of those in the page: all if they fit, else up to half of it with a repair, and others."""
    chosen, room = list[int](), SAMPLE_BYTES
    for with_repair, most in ((True, SAMPLE_BYTES // 2), (False, SAMPLE_BYTES)):
        mine = [i for i in range(len(sizes)) if bool(repairs[i]) is with_repair]
        share = min(1.0, min(room, most) / max(1, sum(sizes[i] for i in mine)))
        kept = [one for n, one in enumerate(mine, 1) if int(n * share) > int((n - 1) * share)]
        room -= sum(sizes[i] for i in kept)
        chosen += kept
    return sorted(chosen)
