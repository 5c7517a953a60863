"""Conditions that an evaluation must meet, such as ``success >= baseline - 0.02``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_agents.errors import ConfigError, UnknownName
from opd_agents.evaluation.metrics import summarise
from opd_agents.types import Actor, Outcome, StopReason, Task, Trajectory, Turn

NUMBER = r"\d+(?:\.\d*)?|\.\d+"
GATE = re.compile(
    rf"(?P<metric>[a-z_]+(?:\.\w+)*)\s*(?P<sign>>=|<=|>|<)\s*"
    rf"(?:(?P<baseline>baseline)(?:\s*(?P<plus>[+-])\s*(?P<shift>{NUMBER}))?|(?P<number>-?(?:{NUMBER})))"
)
SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt
}  # fmt: skip
DIFFERENCES = ("difference", "difference.low", "difference.high")  # to the baseline
UNCHECKED = ("spent", "without_known_bad")  # what these hold depends on policy and suite
ROUNDING = 1e-9  # 0.5 - 0.02 is no number of binary digits


@dataclass(frozen=True, slots=True)
class Gate:
    """``metric sign bound``, where ``bound`` is added to the first policy's figure if ``relative``."""

    text: str
    metric: str
    sign: str
    bound: float
    relative: bool


def parse_gate(text: str, policies: int, samples: int) -> Gate:
    """Raises ConfigError for what is no condition, or has no baseline among so many policies, UnknownName for
    a figure that does not exist with so many samples a task."""
    match = GATE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"Cannot read the gate {text!r}. Write a figure of --json, >=, >, <= or <, and a number or "
            "`baseline` with or without a number, such as 'success >= baseline - 0.02' or 'turns <= 8'."
        )
    metric, known = match["metric"], _names(samples)
    if metric not in known and metric.partition(".")[0] not in UNCHECKED:
        raise UnknownName("figure", metric, known, "opd-agents evaluate SUITE --policy random --json")
    relative = match["baseline"] is not None
    if policies < 2 and (relative or metric in DIFFERENCES):
        raise ConfigError(
            f"The gate {text!r} compares with the baseline, which is the first --policy: give it one more."
        )
    number = float(match["shift"] or 0) if relative else float(match["number"])
    bound = -number if match["plus"] == "-" else number
    return Gate(text.strip(), metric, match["sign"], bound, relative)


def _names(samples: int) -> list[str]:
    """All figures that there may be, by their dotted names: those of a task with an error in each episode."""
    turn = Turn(
        context_ids=(), action_ids=(), logprobs=None, actor=Actor.RANDOM, policy_version=0, text="",
        action="", observation="", reward=1.0, terminated=True, truncated=False,
        stop_reason=StopReason.NOT_SAMPLED, state_digest="", parse_error="made up",
    )  # fmt: skip
    episode = Trajectory(
        uid="", env_id="", env_kwargs={}, seed=0, task=Task("0", ""), turns=(turn,), outcome=Outcome.SUCCESS,
        reward=1.0,
    )  # fmt: skip
    return [*flat(summarise([episode] * samples, [episode])), *DIFFERENCES]


def check(gates: Sequence[Gate], figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether each policy but the baseline, or the only one, meets each gate; ``figures`` by name, those of
    the baseline first. A figure that is not defined here fails."""
    baseline, *others = figures
    numbers = {policy: flat(row) for policy, row in figures.items()}
    results = []
    for gate in gates:
        for policy in others or [baseline]:
            value = numbers[policy].get(gate.metric)
            start = numbers[baseline].get(gate.metric) if gate.relative else 0.0
            bound = None if start is None else start + gate.bound
            slack = ROUNDING if gate.sign in (">=", "<") else -ROUNDING
            passed = value is not None and bound is not None and SIGNS[gate.sign](value, bound - slack)
            results.append(
                {"gate": gate.text, "policy": policy, "value": value, "bound": bound, "passed": passed}
            )
    return results


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """The numbers of a row by dotted names; of intervals ``.low`` and ``.high``."""
    found: dict[str, float | None] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list) and len(value) == 2:
            found |= {f"{name}.low": value[0], f"{name}.high": value[1]}
        elif value is None or isinstance(value, (int, float)):
            found[name] = value
    return found
