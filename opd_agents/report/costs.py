"""What the models behind an API were asked and cost, and what a success cost there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd_agents.report import formatting
from opd_agents.report.reading import Run, number

KINDS = ("total/api/failures/", "total/api/retries/")


def api_facts(stages: Sequence[Run]) -> list[tuple[str, str]]:
    """As titles and texts, of all these stages together; nothing where none asked an API.

    What an answer is worth counts also where it was stored already; `paid` is what was not.
    """
    asking = [stage for stage in stages if _last(stage, "total/api/requests")]
    if not asking:
        return []
    requests, cached, prompts, answers, cost, paid = (
        sum(_last(stage, f"total/api/{key}") for stage in asking)
        for key in ("requests", "cached", "prompt_tokens", "completion_tokens", "cost", "paid")
    )
    facts = [
        ("API requests", f"{formatting.count(requests)}, {formatting.count(cached)} of them stored already"),
        ("API tokens", f"{formatting.count(prompts)} read, {formatting.count(answers)} written"),
    ]
    if cost:
        facts.append(("API cost", f"{_money(cost)}, {_money(paid)} of it paid"))
    if cost and (successes := sum(_successes(stage) for stage in asking)):
        facts.append(("API cost per successful episode", _money(cost / successes)))
    if (points := sum(_points_gained(stage) for stage in asking)) > 0:
        each = [f"{formatting.count(requests / points)} requests"]
        each += [f"{formatting.count((prompts + answers) / points)} tokens"]
        each += [f"cost {_money(cost / points)}"] if cost else []
        facts.append(("API per point of validation success", ", ".join(each)))
    for start in KINDS:
        if told := _kinds(asking, start):
            facts.append((f"API {start.split('/')[2]}", told))
    return facts


def _kinds(stages: Sequence[Run], start: str) -> str:
    keys = sorted({key for stage in stages for key in stage.metrics[-1] if key.startswith(start)})
    counts = {key.removeprefix(start): sum(_last(stage, key) for stage in stages) for key in keys}
    return ", ".join(f"{kind} {formatting.count(value)}" for kind, value in counts.items())


def _last(stage: Run, key: str) -> float:
    return number(stage.metrics[-1].get(key)) or 0.0


def _successes(stage: Run) -> float:
    """Successful episodes of its rollouts."""
    return sum(
        (number(row.get("rollout/success")) or 0.0) * (number(row.get("rollout/episodes")) or 0.0)
        for row in stage.metrics
    )


def _points_gained(stage: Run) -> float:
    """Of validation success, in percentage points, from its start to its end; 0 without both."""
    first, last = (_success(stage.summary.get(key)) for key in ("evaluation_at_start", "evaluation"))
    return 0.0 if first is None or last is None else 100 * (last - first)


def _success(evaluation: Mapping[str, Any] | None) -> float | None:
    return number((evaluation or {}).get("success"))


def _money(value: float) -> str:
    """In the currency of the prices."""
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"
