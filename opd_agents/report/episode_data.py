"""One trajectory as plain data for the viewer; every text is visible, bounded, and nothing but text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_agents.report.differences import difference
from opd_agents.report.escaping import visible
from opd_agents.report.examples import action_view, flags, judged
from opd_agents.report.pieces import Pieces, cut
from opd_agents.report.reading import number
from opd_agents.types import ActionFeedback, Actor, Credit, Trajectory, Turn

MOST_ACTION, MOST_TEXT, MOST_VALUE = 8000, 4000, 300  # characters
ARMS = {"repair": "after the repair", "own": "after its own action", "retry": "where it tries again"}


def episode_data(
    trajectory: Trajectory,
    credits: Sequence[Credit],
    feedback: Sequence[ActionFeedback],
    repair: Mapping[str, Any] | None,
    by: str,
    pieces: Pieces,
) -> dict[str, Any]:
    """What the viewer shows of an episode; ``by`` is who proposes repairs. Figures of tokens are in
    thousandths, what is known of a turn's credit is in the order of ``columns``, and what there is nothing
    of is left out. Raises KeyError, TypeError or ValueError for a repair that is none."""
    aligned = credits if len(credits) == len(trajectory.turns) else [None] * len(trajectory.turns)
    turns = [_turn(turn, credit, pieces) for turn, credit in zip(trajectory.turns, aligned, strict=True)]
    columns = list(dict.fromkeys(name for turn in turns for name in turn.get("credit", ())))
    branch = trajectory.branch
    said = {
        "seed": trajectory.seed,
        "temperature": trajectory.temperature,
        "messages": [[message.role, *_bounded(message.content)] for message in trajectory.messages],
        "columns": columns,
        "turns": [_in_columns(turn, columns) for turn in turns],
        "repairs": [_repair(one, by) for one in _chain(repair)],
        "feedback": [_feedback(one) for one in feedback],
        "error": visible(trajectory.error or ""),
        "hint": visible(trajectory.hint),
        "parent": None if branch is None else [visible(branch.parent), branch.turn + 1],
    }
    return {key: value for key, value in said.items() if value not in ("", [], None)}


def first_error(trajectory: Trajectory) -> int:
    """The turn, from 1, of the first action that was not valid or was refused; 0: there is none."""
    wrong = (i for i, turn in enumerate(trajectory.turns, 1) if turn.parse_error or turn.tool_error)
    return next(wrong, 0)


def mean_kl(trajectory: Trajectory, credits: Sequence[Credit]) -> float | None:
    """KL(student || teacher) in nats per token of the scored actions."""
    if len(credits) != len(trajectory.turns):
        return None
    found = [
        (credit.kl_sum, turn.n_chosen)
        for credit, turn in zip(credits, trajectory.turns, strict=True)
        if number(credit.kl_sum) is not None
    ]
    tokens = sum(n for _, n in found)
    return sum(kl for kl, _ in found if kl) / tokens if tokens else None


def _turn(turn: Turn, credit: Credit | None, pieces: Pieces) -> dict[str, Any]:
    text, sizes, left_out = cut(pieces.of(turn), MOST_ACTION)
    n = len(sizes)
    if not n:
        text, left_out = _bounded(turn.text or turn.action, MOST_ACTION)
    calls = () if turn.parse_error else action_view(turn.action).calls
    said = {
        "actor": "" if turn.actor is Actor.STUDENT else turn.actor.value,
        "text": text,
        "rest": left_out,
        "sizes": sizes,
        "spans": [[span.kind.value, span.start, min(span.stop, n)] for span in turn.spans if span.start < n],
        "surprise": [-value for value in _thousandths((turn.logprobs or ())[:n])],
        "calls": [[visible(tool), [[visible(k), _short(v)] for k, v in given]] for tool, given in calls],
        "observation": _bounded(turn.observation),
        "flags": [[name, visible(message)] for name, message in flags(turn)],
        "kept": turn.weight == 0,
    }
    if credit is not None:
        said |= {
            "kl": _thousandths(credit.token_kl[:n]),
            "advantage": _thousandths(credit.token_advantage[:n]),
            "unlearned": [[start, min(stop, n)] for start, stop in credit.unlearned if start < n],
            "credit": {name: visible(text) for name, text in _credit(credit)},
        }
    return {key: value for key, value in said.items() if value}


def _in_columns(turn: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    known = turn.get("credit")
    return turn | ({"credit": [known.get(name, "") for name in columns]} if known else {})


def _credit(credit: Credit) -> Iterator[tuple[str, str]]:
    """All that is known of why the action is reinforced."""
    if (kl := number(credit.kl_sum)) is not None:
        mean = number(credit.kl_mean)
        yield "KL", f"{kl:.2f} nats" + ("" if mean is None else f", {mean:.3f} a token")
    if (logprob := number(credit.teacher_logprob)) is not None:
        yield "teacher's log p", f"{logprob:.2f}".replace("-0.00", "0.00")
    yield from ((f"advantage {visible(name)}", f"{value:+.2f}") for name, value in credit.advantage.items())
    yield from ((f"factor {visible(name)}", f"{value:.2f}") for name, value in credit.factors.items())
    if credit.agreement is not None:
        yield "as others act here", f"{100 * credit.agreement:.0f} %"
    if credit.correction is not None:
        yield "repair", credit.correction
    if credit.weight != 1:
        yield "weight", f"{credit.weight:g}"
    yield from judged(credit)


def _repair(repair: Mapping[str, Any], by: str) -> dict[str, Any]:
    evidence, audit = repair["evidence"], repair.get("audit") or {}
    student, teacher = (str(repair[f"{who}_action"])[:MOST_TEXT] for who in ("student", "teacher"))
    return {
        "turn": int(repair["turn"]) + 1,
        "accepted": bool(repair["accepted"]),
        "by": "a random action" if repair["control"] else f"the {visible(by)}",
        "diff": [[sign, visible(text)] for sign, text in difference(student, teacher)],
        "proof": [
            [label, *map(int, evidence[arm]), *map(int, audit.get(arm, ()))]
            for arm, label in ARMS.items()
            if arm in evidence
        ],
        "better": number(evidence["better"]),
    }


def _chain(repair: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A repair and those of the runs after it that failed, too."""
    while repair:
        yield repair
        repair = repair.get("then")


def _feedback(said: ActionFeedback) -> list[Any]:
    """Of which turn, from 1 (0: of the episode), and what a judge said of it."""
    parts = [
        "" if said.score is None else f"score {said.score}",
        "" if said.verdict is None else f"verdict {said.verdict}",
        said.reason,
        f"instead: {said.replacement}" if said.replacement else "",
        f"hint: {said.hint}" if said.hint else "",
    ]
    text, _ = _bounded("; ".join(filter(None, parts)))
    return [0 if said.turn is None else said.turn + 1, text]


def _short(value: str) -> str:
    return visible(value if len(value) <= MOST_VALUE else f"{value[:MOST_VALUE]}…")


def _bounded(text: str, most: int = MOST_TEXT) -> tuple[str, int]:
    """Visible, and how many characters are left out."""
    return visible(text[:most]), max(0, len(text) - most)


def _thousandths(values: Sequence[float]) -> list[int]:
    """What is not finite becomes as large as a token can mean anything."""
    return [round(1000 * max(-1e3, min(1e3, value))) for value in values]
