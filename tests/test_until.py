"""The early end of a run: by a metric's value, or because it no longer gains."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny

from opd_agents.config import Until, load_config
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.schedules import reached, watch
from opd_agents.trainer import train


def ends_after(values: list[float | None], *ends: Until) -> int | None:
    """With which of the steps the run is over."""
    watched: dict[str, list[float]] = {}
    for step, value in enumerate(values, start=1):
        row = {"other": 1.0} if value is None and step > 1 else {"m": value}
        watched = watch(ends, watched, row)
        if reached(ends, watched):
            return step
    return None


@pytest.mark.parametrize(
    ("values", "end", "step"),
    [
        ([0.1, 0.5, 0.8, 0.9], {"above": 0.8}, 3),
        ([0.9, 0.1, 0.9, 0.8], {"above": 0.8, "window": 2}, 4),
        ([3, 2, 1, 0], {"below": 1}, 3),
        ([3, 2, 1], {"below": 0.5}, None),
        ([1, 2, 3, 3.05, 9], {"gain": 0.1}, 4),
        ([1, 2, 1.5], {"gain": 0.0}, 3),  # it falls
        ([0, 1, 2, 3, 3, 3, 3], {"gain": 0.6, "window": 2}, 6),  # (2 + 3) / 2 to (3 + 3) / 2 is .5
        ([3, 2, 1.95], {"gain": -0.1}, 3),
        ([3, 2, 1, 0], {"gain": -0.1}, None),
        ([1, None, None, 1.05], {"gain": 0.1}, 4),  # measured in two steps only
        ([None, None, 5], {"above": 5}, 3),
    ],
)
def test_when_a_run_ends(values: list[float | None], end: dict[str, Any], step: int | None) -> None:
    assert ends_after(values, Until(metric="m", **end)) == step


def test_the_first_end_that_holds_is_told() -> None:
    ends = [Until(metric="m", above=5), Until(metric="m", window=2, gain=0.5)]
    assert ends_after([1, 1, 1, 1], *ends) == 4
    assert reached(ends, {"m": [1, 1, 1, 1]}) == "m over 2: 1 after 1, a gain short of 0.5"
    assert reached(ends, {"m": [1, 1, 1, 7]}) == "m: 7, at least 5"


def test_what_cannot_be_watched_is_refused() -> None:
    end = [Until(metric="m", above=1)]
    with pytest.raises(ConfigError, match=r"trainer\.until follows the metric 'm'.*It has a, eval/success\."):
        watch(end, {}, {"a": 1.0}, ["eval/success"])
    waiting = watch(end, {}, {"a": 1.0}, ["m"])
    assert waiting == {"m": []} == watch(end, waiting, {"a": 1.0})
    with pytest.raises(AlignmentError, match="metric m is nan"):
        watch(end, waiting, {"m": math.nan})


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ("[{metric: m}]", "one of `above`, `below` and `gain`"),
        ("[{metric: m, above: 1, gain: 1}]", "one of `above`, `below` and `gain`"),
        ("[{metric: eval/success, above: 1}]", "eval/success is never measured"),
    ],
)
def test_an_end_that_cannot_come_is_refused(tmp_path: Path, until: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny.sft(tmp_path), f"trainer.until={until}")
    with pytest.raises(ConfigError, match=r"eval/succes is never measured.* eval/success,"):
        raw = tiny.sft(tmp_path, evaluation={"suite": tiny.SUITE})
        load_config(raw, "trainer.until=[{metric: eval/succes, above: 1}]")


def test_a_run_ends_with_the_evaluation_that_is_good_enough(tmp_path: Path) -> None:
    raw = tiny.sft(tmp_path, evaluation={"suite": tiny.SUITE, "limit": 4, "every": 2})
    run = train(load_config(raw, "trainer.until=[{metric: eval/success, above: 0.0}]"))
    rows = tiny.metrics(run)
    assert len(rows) == 2
    ended = tiny.final_state(run)["summary"]["ended"]
    assert ended == f"trainer.until, eval/success: {rows[-1]['eval/success']:.4g}, at least 0"
