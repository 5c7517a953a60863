"""Signs, in the metrics of a run, that something goes wrong: what was seen, why it may be, what to change.

An alarm is a function of the rows of ``metrics.jsonl`` and of nothing else, and of a step's row and those
before it only: what a run says while it trains, what its report says afterwards and what a resumed run says
are the same. Where the level of a figure means nothing by itself it is compared with the run's own beginning:
the mean of its first `WINDOW` measured steps with that of the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

from opd_agents.runs import read_metrics

WINDOW = 5  # measured steps that a figure is the mean of

NO_GAIN = 0.02  # of success: less is no rise
FALL = 0.1  # of success or pass@k: what is lost beyond noise
DONE = 0.95  # of success, from which on a figure that stands still is no trouble
NEARER = 0.9  # of its beginning: a KL below shows that the student goes the teacher's way, wherever it leads
FOLLOWED = 0.5  # of its beginning: a KL below shows that the student follows the teacher
TOO_LONG = 1.5  # times the tokens an action had
LEFT = 0.5  # of the diversity at the beginning
MANY = 0.1  # of the episodes: so many go on after a wrong action that what comes of them counts
SPOILT = 0.5  # of the actions after a wrong one that are wrong
STANDS = 0.9  # of the wrong actions after a wrong one at the beginning: not fewer
COMPOUNDED = 3.0  # times as often wrong as while nothing was
TOLD = 2.0  # standard errors: a mean d nearer to 0 is noise
NEAR = 0.01  # nats a token: whose distributions are nearer has nothing to tell, as for `opd-agents check`
OVERCONFIDENT = 0.1  # more confidence than success, beyond the beginning's
DOMINANT = 0.5  # of all that a component says: too much for one token
LOPSIDED = 100.0  # times as large, one part of an advantage leaves the other without a say
EQUAL = 0.05  # of the groups: with fewer that differ in reward there is nothing to learn
BARELY, NEARLY = 0.001, 0.999  # shares of tokens that are none and all

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Row]
Seen: TypeAlias = Iterator[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Alarm:
    """``name`` is a key of `SIGNS`, ``step`` the first whose row showed it, ``seen`` the figures, ``remedy``
    a change of the config, ``about`` the loss component that it is of ("": of the run)."""

    name: str
    step: int
    seen: str
    cause: str
    remedy: str
    about: str = ""

    def __str__(self) -> str:
        of = f" of {self.about}" if self.about else ""
        return f"{self.name}{of}, step {self.step}: {self.seen}. {self.cause}. Try: {self.remedy}."


@dataclass(frozen=True, slots=True)
class Sign:
    """``seen`` of the rows, and of what it is ``about``, yields each step whose row shows it, with the
    figures. It is asked about every component that a metric beginning with ``each`` names, else about the
    run ("")."""

    cause: str
    remedy: str
    seen: Callable[[Rows, str], Seen]
    each: str = ""


def alarms(rows: Rows) -> tuple[Alarm, ...]:
    """Those of a run (or stage) whose steps so far left these rows, each once, the earliest first."""
    found = []
    for name, sign in SIGNS.items():
        for about in _components(rows, sign.each) if sign.each else [""]:
            seen = sign.seen(rows, about)
            if first := min(seen, key=lambda one: one[0], default=None):
                found.append(Alarm(name, *first, sign.cause, sign.remedy, about))
    return tuple(sorted(found, key=lambda alarm: alarm.step))


def read_alarms(run: Path) -> tuple[Alarm, ...]:
    """Those of the run or stage whose folder this is; none of one that has no metrics yet. Stages and seeds
    are folders of their own. Raises RunFolderError for a broken file."""
    return alarms(read_metrics(run))


# ---- figures


def _components(rows: Rows, start: str) -> list[str]:
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(start))
    return sorted(key.removeprefix(start) for key in names)


def _measured(rows: Rows, keys: Sequence[str]) -> list[Row]:
    """Those with all of these figures, none of them null (or what becomes null in the file)."""

    def known(value: Any) -> bool:
        return isinstance(value, (int, float)) and isfinite(value)

    return [row for row in rows if all(known(row.get(key)) for key in keys)]


def _latest(rows: Rows, *keys: str) -> Iterator[tuple[int, dict[str, float]]]:
    """At each step where `WINDOW` rows with all of these figures end: their means."""
    kept = _measured(rows, keys)
    sums = {key: [0.0, *accumulate(float(row[key]) for row in kept)] for key in keys}
    for end in range(WINDOW, len(kept) + 1):
        means = {key: (upto[end] - upto[end - WINDOW]) / WINDOW for key, upto in sums.items()}
        yield kept[end - 1]["step"], means


def _since(rows: Rows, *keys: str) -> Iterator[tuple[int, dict[str, float], dict[str, float]]]:
    """As `_latest`, behind the means of the beginning, which the newest rows must not reach into."""
    windows = list(_latest(rows, *keys))
    for step, now in windows[WINDOW:]:
        yield step, windows[0][1], now


# ---- the five failure modes of on-policy distillation

SUCCESS, ASTRAY = "rollout/success", "rollout/astray"


def _distance(rows: Rows) -> str:
    """The KL to the teacher, or what estimates it where the teacher tells log-probs only."""
    return "distill/kl" if any("distill/kl" in row for row in rows) else "distill/log_ratio"


def _flawed_prefix(rows: Rows, about: str) -> Seen:
    """The student follows the teacher, and is no better for it: on the whole, or after its own mistakes."""
    kl = _distance(rows)
    for step, then, now in _since(rows, kl, SUCCESS):
        if now[kl] < NEARER * then[kl] and now[SUCCESS] < min(then[SUCCESS] - FALL, DONE):
            yield step, f"KL to the teacher {_from(then[kl], now[kl])}, success {_share(then, now, SUCCESS)}"
    kl, after, recovered = "distill/kl_astray", "rollout/wrong_after", "rollout/recovery"
    for step, then, now in _since(rows, kl, after, recovered, ASTRAY, SUCCESS):
        lost = now[recovered] < min(then[recovered] + NO_GAIN, SPOILT) and _stands(then, now)
        if now[kl] < FOLLOWED * then[kl] and lost and now[ASTRAY] > MANY:
            seen = f"after a wrong action KL to the teacher {_from(then[kl], now[kl])}, but {now[after]:.0%}"
            yield step, f"{seen} of the actions are wrong and {now[recovered]:.0%} of such episodes succeed"


def _saturation(rows: Rows, about: str) -> Seen:
    noise, kl = "distill/snr", _distance(rows)
    windows = list(_latest(rows, noise, kl, SUCCESS))
    for (_, former), (step, now) in zip(windows, windows[WINDOW:], strict=False):
        idle = now[SUCCESS] < min(former[SUCCESS] + NO_GAIN, DONE)
        if now[noise] < TOLD and now[kl] < NEAR and idle:
            seen = f"the mean d of a step is {now[noise]:.2g} standard errors from 0"
            yield step, f"{seen}, at a KL of {now[kl]:.2g} and {now[SUCCESS]:.0%} success"


def _widest(rows: Rows) -> str:
    """pass@k of the most episodes."""
    ks = [int(k) for k in _components(rows, "rollout/pass_at_")]
    return f"rollout/pass_at_{max(ks, default=0)}"


def _diversity_collapse(rows: Rows, about: str) -> Seen:
    covered, distinct = _widest(rows), "rollout/distinct"
    for step, then, now in _since(rows, covered, distinct, SUCCESS):
        alike = now[distinct] < LEFT * then[distinct]
        idle = now[covered] < min(then[covered] + NO_GAIN, DONE)
        lost = now[covered] < then[covered] - FALL and now[SUCCESS] > then[SUCCESS] - NO_GAIN
        if lost or (alike and idle):
            seen = f"episodes of one task that differ {_share(then, now, distinct)}, success"
            passes = f"{covered} {_share(then, now, covered)}"
            yield step, f"{seen} {_share(then, now, SUCCESS)}, {passes}"


def _calibration_gap(rows: Rows, about: str) -> Seen:
    confidence, error = "calibration/confidence", "calibration/ece"
    for step, then, now in _since(rows, confidence, error, SUCCESS):
        surer, righter = (now[key] - then[key] for key in (confidence, SUCCESS))
        if surer > max(righter + OVERCONFIDENT, NO_GAIN) and now[confidence] > now[SUCCESS]:
            right = f"success {_share(then, now, SUCCESS)}; expected calibration error {now[error]:.2f}"
            yield step, f"confidence in an action {_share(then, now, confidence)}, {right}"


def _derailed_turns(rows: Rows, about: str) -> Seen:
    after, first = "rollout/wrong_after", "rollout/wrong_first"
    for step, then, now in _since(rows, after, first, ASTRAY, SUCCESS):
        compounds = now[after] > max(SPOILT, COMPOUNDED * now[first])
        if compounds and _stands(then, now) and now[ASTRAY] > MANY:
            seen = f"of the actions after a wrong one {now[after]:.0%} are wrong, before it {now[first]:.0%}"
            went = f"{now[ASTRAY]:.0%} of the episodes go on after one, {now[SUCCESS]:.0%} succeed"
            yield step, f"{seen}; {went}"


def _stands(then: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """As many actions after a wrong one are wrong as at the beginning, and as few episodes succeed."""
    after = "rollout/wrong_after"
    return now[after] > STANDS * then[after] and now[SUCCESS] < min(then[SUCCESS] + FALL, DONE)


# ---- documented pitfalls


def _one_token(rows: Rows, component: str) -> Seen:
    key = f"top_token/{component}"
    for step, now in _latest(rows, key):
        if now[key] > DOMINANT:
            yield step, f"one token holds {now[key]:.0%} of what the component says of a step"


def _length_inflation(rows: Rows, about: str) -> Seen:
    length, cut = "rollout/action_tokens", "rollout/cut_actions"
    for step, then, now in _since(rows, length, cut, SUCCESS):
        idle = now[SUCCESS] < then[SUCCESS] + NO_GAIN or now[cut] > then[cut] + FALL
        if now[length] > TOO_LONG * then[length] and idle:
            seen = f"tokens of an action {_from(then[length], now[length])}, {now[cut]:.0%} are cut off"
            yield step, f"{seen}; success {_share(then, now, SUCCESS)}"


def _mask_error(rows: Rows, component: str) -> Seen:
    """Spans that select nothing or all of what there is; or nothing to select since the run began."""
    spans, chosen = f"spans/{component}", f"selected/{component}"
    for step, now in _latest(rows, spans):
        if not BARELY < now[spans] < NEARLY:
            yield step, f"`select.spans` takes {now[spans]:.1%} of the tokens that it may choose from"
    kept = _measured(rows, [chosen])[: 2 * WINDOW]
    if len(kept) == 2 * WINDOW and not any(row[chosen] for row in kept):
        refused = all(row.get("correction/accepted") == 0 for row in kept)
        why = ", in which no repair was accepted" if refused else ""
        yield kept[-1]["step"], f"it has selected no token in {len(kept)} steps{why}"


def _lopsided_advantage(rows: Rows, component: str) -> Seen:
    key = f"advantage_ratio/{component}"
    for step, now in _latest(rows, key):
        if not 1 / LOPSIDED < now[key] < LOPSIDED:
            yield step, f"the parts from references are {now[key]:.2g} times as large as those from rewards"


def _equal_rewards(rows: Rows, about: str) -> Seen:
    """Told by the rewards, and by successes: rewards may be of other episodes than the step's rollouts."""
    told, groups, covered = "groups/nonzero", "groups/total", _widest(rows)
    for step, now in _latest(rows, told, groups, covered, SUCCESS):
        alike = now[covered] < now[SUCCESS] + EQUAL
        if now[told] < EQUAL * now[groups] and alike and now[SUCCESS] < DONE:
            seen = f"{now[told]:.2g} of {now[groups]:.3g} groups differ in reward"
            yield step, f"{seen}; success {now[SUCCESS]:.0%}"


def _from(then: float, now: float) -> str:
    return f"{then:.3g} -> {now:.3g}"


def _share(then: Mapping[str, float], now: Mapping[str, float], key: str) -> str:
    return f"{then[key]:.0%} -> {now[key]:.0%}"


SIGNS: Mapping[str, Sign] = {
    "flawed_prefix": Sign(
        "The teacher may be unreliable in states that it would not have come to: it was trained on others,"
        " or goes along with whatever stands there",
        "`opd-agents check` says how often the teacher succeeds from the student's states; a teacher trained"
        " in such states, or `method=score_verified`, where nothing of it counts that is not proved",
        _flawed_prefix,
    ),
    "saturation": Sign(
        "The gap to the teacher has shrunk to noise: it has nothing more to say of these tasks",
        "`rollout.curriculum={band: [0.2, 0.8]}` for tasks at the frontier, a stronger or better informed"
        " teacher, or go on with the verifier's reward (`method=opd_then_rl`)",
        _saturation,
    ),
    "diversity_collapse": Sign(
        "The student settles on one way, as a reward asks for, and a reverse KL to a teacher that has one",
        "beside a reward a `distill` component to a teacher that knows several ways, or a larger `coef` of"
        " it; `divergence: jsd`; an `entropy` component",
        _diversity_collapse,
    ),
    "calibration_gap": Sign(
        "The student takes over the sharpness of its teacher, which reinforcement has made surer than right",
        "`method=temperature_aware`, or `loss.components.NAME.temperature_teacher` above the rollout's"
        " temperature",
        _calibration_gap,
    ),
    "derailed_turns": Sign(
        "One wrong action spoils the turns after it, and a divergence of tokens does not see which it was",
        "`method=score_verified`, or the section `correction` beside the method: the earliest error is"
        " replaced",
        _derailed_turns,
    ),
    "one_token": Sign(
        "A token that one model finds all but impossible drowns all others",
        "`loss.components.NAME.clip=1.0` (of a part of an advantage its own `clip`), or for markers and ends"
        " of turns the weight `{kind: without_tokens, tokens: [end]}`",
        _one_token,
        each="top_token/",
    ),
    "length_inflation": Sign(
        "Longer actions earn more of the loss without being better, often by repetition",
        "`denominator: episode` in the loss component, `rollout.max_tokens_per_turn`, or a divergence to a"
        " reference `{kind: self}` beside recorded conversations",
        _length_inflation,
    ),
    "mask_error": Sign(
        "The component's `select` does not see what it means to see: the spans that the chat's reader finds,"
        " or the source, actor and outcome of this run's episodes",
        "`loss.components.NAME.select`; `opd-agents rollout ENV --watch` shows the actions, and"
        " `rollout/*_tokens` the spans in them",
        _mask_error,
        each="selected/",
    ),
    "lopsided_advantage": Sign(
        "d is of 0.1 to 10 nats a token and a group's advantage of about 1: without a coefficient one part"
        " has no say",
        "the `coef` of the parts `references` and `rewards` of the component",
        _lopsided_advantage,
        each="advantage_ratio/",
    ),
    "equal_rewards": Sign(
        "The tasks are too hard, or too easy, for episodes of one group to differ",
        "`rollout.redraws=3`, `rollout.curriculum={band: [0.2, 0.8]}`, larger groups, or"
        " `rollout.demonstrations={actor: teacher}` where all fail",
        _equal_rewards,
    ),
}
