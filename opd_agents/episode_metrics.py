"""Figures of a step's episodes as a whole: how they end, how they differ, whether they recover, how sure the
student is of its actions. Means are per episode; what cannot be told is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import fmean
from typing import TypeAlias

import numpy as np

from opd_agents.evaluation.metrics import invalid_calls
from opd_agents.evaluation.rates import pass_at
from opd_agents.types import Actor, Outcome, SpanKind, StopReason, Trajectory, Turn, to_json

BINS = 10  # of confidence, for the calibration error
NGRAMS = (1, 2)  # the lengths of the n-grams of distinct-n
Figures: TypeAlias = dict[str, float]
Wrong: TypeAlias = Sequence[Sequence[bool]]
"""Of each episode, of each of its turns: whether its action was wrong."""


def episode_metrics(rolled: Sequence[Trajectory]) -> Figures:
    """Of the step's rollouts; nothing where all experience is recorded."""
    if not rolled:
        return {}
    n, turns = len(rolled), [turn for t in rolled for turn in t.turns]
    written = sum(turn.logprobs is not None for turn in turns)
    lengths = {"rollout/action_tokens": sum(t.n_action_tokens for t in rolled) / written} if written else {}
    reasons = Counter(turn.stop_reason for turn in turns)
    return {
        "rollout/success": sum(t.success for t in rolled) / n,
        "rollout/reward": sum(t.reward for t in rolled) / n,
        "rollout/turns": len(turns) / n,
        "rollout/invalid_calls": sum(map(invalid_calls, rolled)) / n,
        "rollout/errors": sum(t.outcome is Outcome.ERROR for t in rolled),
        "rollout/unfinished": sum(t.outcome is Outcome.UNFINISHED for t in rolled) / n,
        "rollout/cut_actions": reasons[StopReason.LENGTH] / max(1, len(turns)),
        "rollout/context_overflow": sum(t.exhausted == "context" for t in rolled) / n,
        # what rendering the history anew costs: rows, and the context that is read anew with each of them
        "rollout/segments": sum(len(list(t.segments())) for t in rolled) / n,
        "rollout/context_tokens": sum(len(turn.context_ids) for turn in turns) / n,
        **lengths,
        **_span_tokens(turns),
        **_groups(rolled),
        **_calibration(rolled),
    }


def _span_tokens(turns: Sequence[Turn]) -> dict[str, float]:
    """Sampled and forced tokens of each kind of span that occurs."""
    counts: Counter[SpanKind] = Counter()
    for turn in turns:
        for span in turn.spans if turn.logprobs is not None else ():
            counts[span.kind] += span.stop - span.start
    return {f"rollout/{kind}_tokens": counts[kind] for kind in SpanKind if counts[kind]}


def _groups(rolled: Sequence[Trajectory]) -> Figures:
    """pass@k, and how often two episodes of a group do not act alike: a share of pairs, which unlike a count
    of different episodes does not depend on how many there are."""
    groups: dict[str, list[Trajectory]] = {}
    for one in rolled:
        groups.setdefault(one.group, []).append(one)
    several = [group for name, group in groups.items() if name and len(group) > 1]
    if not several:
        return {}
    counts = [(len(group), sum(one.success for one in group)) for group in several]
    fewest = min(size for size, _ in counts)
    ks = {2**i for i in range(1, fewest.bit_length())} | {fewest}
    found = {f"rollout/pass_at_{k}": fmean(pass_at(k, *count) for count in counts) for k in sorted(ks)}
    won = [[one for one in group if one.success] for group in several]
    for name, which in (("distinct", several), ("distinct_successes", won)):
        differ = [a != b for group in which for a, b in combinations(map(_actions, group), 2)]
        found |= {f"rollout/{name}": fmean(differ)} if differ else {}
    for n in NGRAMS:
        shares = [share for group in several if (share := _different_ngrams(group, n)) is not None]
        found |= {f"rollout/distinct_{n}": fmean(shares)} if shares else {}
    return found


def _different_ngrams(group: Sequence[Trajectory], n: int) -> float | None:
    """How many of all n-grams of the actions' tokens differ, of all that there are (distinct-n, arXiv
    1510.03055); it falls with the number of tokens, so that only groups of equal size can be compared."""
    actions = [turn.action_ids for one in group for turn in one.turns]
    grams = [tuple(ids[i : i + n]) for ids in actions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _actions(one: Trajectory) -> list[str]:
    return [turn.action for turn in one.turns]


def _calibration(rolled: Sequence[Trajectory]) -> Figures:
    """Confidence in an action: the geometric mean of its tokens' probabilities, which compares long actions
    with short ones. It is right where its episode succeeds."""
    pairs = [
        (float(np.exp(np.mean(turn.logprobs))), one.success)
        for one in rolled
        for turn in one.turns
        if turn.actor is Actor.STUDENT and turn.logprobs and one.outcome is not Outcome.ERROR
    ]
    if not pairs:
        return {}
    confidence, right = np.array(pairs, dtype=np.float64).T
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(place, weights=confidence - right, minlength=BINS)
    return {
        "calibration/confidence": float(confidence.mean()),
        "calibration/ece": float(np.abs(gaps).sum() / len(pairs)),
    }


# ---- wrong actions


def refused_or_repeated(one: Trajectory) -> Iterator[bool]:
    """Of each turn: its text was no valid action, the environment refused it, or it repeats calls that were
    answered in the same state of the environment before."""
    seen: set[tuple[str, str]] = set()
    for turn in one.turns:
        key = (turn.state_digest, to_json(turn.calls))
        refused = turn.parse_error is not None or turn.tool_error is not None
        yield refused or key in seen
        if turn.calls and not refused:
            seen.add(key)


def recovery(rolled: Sequence[Trajectory], wrong: Wrong) -> Figures:
    """What a wrong action does to the actions and the episode after it: how often an action is wrong while
    none was before (``wrong_first``), and after one (``wrong_after``); the share of episodes that go on
    after a wrong action (``astray``), and of these the share that succeeds (``recovery``)."""
    before, after, won = list[bool](), list[bool](), list[bool]()
    for one, of_turns in zip(rolled, wrong, strict=True):
        first = next((i for i, is_wrong in enumerate(of_turns) if is_wrong), len(of_turns))
        before += of_turns[: first + 1]
        after += of_turns[first + 1 :]
        won += [one.success] if of_turns[first + 1 :] else []
    found = {"rollout/astray": len(won) / len(rolled)} if rolled else {}
    known = {"wrong_first": before, "wrong_after": after, "recovery": won}
    return found | {f"rollout/{name}": fmean(values) for name, values in known.items() if values}
