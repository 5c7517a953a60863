"""Is any part of the training inert? A plain verdict per part, from the metrics alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from opd_agents.report.formatting import percent
from opd_agents.report.groups import Group
from opd_agents.report.reading import Run, number

SMALLEST_SHARE = 0.05  # of the gradient norm; below it, on average, a component counts as inert


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a stage: ``figures`` are the sentence that the verdict rests on."""

    stage: str
    name: str
    inert: bool
    figures: str


def parts(group: Group) -> list[Part]:
    """The verdict per part; with several seeds a part is inert if it is so in any of them."""
    found: list[Part] = []
    for label, stages in group.training().items():
        found += _total(
            label, stages, "Corrections", "correction/proposed", "correction/accepted", "repairs accepted"
        )
        found += _total(
            label, stages, "Rewards", "groups/total", "groups/nonzero", "groups with a non-zero advantage"
        )
        names = component_names(stages)
        # The only component of a stage makes its whole gradient: nothing to judge.
        for name in names if len(names) > 1 else ():
            found += _share(label, stages, name)
    return found


def component_names(stages: Iterable[Run]) -> list[str]:
    """Names of the loss components whose gradient share was measured, in order of appearance."""
    keys = (key for stage in stages for row in stage.metrics for key in row if key.startswith("grad_share/"))
    return list(dict.fromkeys(key.removeprefix("grad_share/") for key in keys))


def values(stage: Run, key: str) -> list[float]:
    return [value for row in stage.metrics if (value := number(row.get(key))) is not None]


def _total(label: str, stages: Sequence[Run], name: str, tried: str, done: str, what: str) -> Iterator[Part]:
    counts = [values(stage, done) for stage in stages]
    if not any(counts):
        return
    totals = [sum(of_seed) for of_seed in counts]
    figures = f"{sum(totals):,.0f} of {sum(sum(values(stage, tried)) for stage in stages):,.0f} {what}"
    shares = [share for stage in stages for share in values(stage, f"{tried.split('/')[0]}/token_share")]
    if shares:
        figures += f"; {percent(statistics.fmean(shares))} of the generated tokens in the mean step"
    inert = [total == 0 for total in totals]
    yield Part(label, name, any(inert), figures + _seeds(inert))


def _share(label: str, stages: Sequence[Run], name: str) -> Iterator[Part]:
    by_seed = [shares for stage in stages if (shares := values(stage, f"grad_share/{name}"))]
    if not by_seed:
        return
    pooled = [share for shares in by_seed for share in shares]
    steps = sum(len(stage.metrics) for stage in stages)
    inert = [statistics.fmean(shares) < SMALLEST_SHARE for shares in by_seed]
    low = sum(share < SMALLEST_SHARE for share in pooled)
    figures = (
        f"mean {percent(statistics.fmean(pooled))} of the gradient norm, minimum {percent(min(pooled))}, "
        f"below {percent(SMALLEST_SHARE)} in {low} of {len(pooled)} measured steps ({steps} steps in all)"
    )
    yield Part(label, f"Component {name}", any(inert), figures + _seeds(inert))


def _seeds(inert: Sequence[bool]) -> str:
    return f"; inert in {sum(inert)} of {len(inert)} seeds" if len(inert) > 1 and any(inert) else ""
