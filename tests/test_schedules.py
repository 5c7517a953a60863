"""Coefficients over a run: by progress, by a metric, and over an interruption."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_agents import trainer
from opd_agents.config import Adaptive, RunConfig, load_config
from opd_agents.config.base import Ramp, Switch, bounds
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.schedules import Clock, adapt, adaptive_schedules, value_at
from opd_agents.session import Session
from opd_agents.trainer import train

quick = settings(max_examples=60, deadline=None, derandomize=True)
RISING = Adaptive(kind="adaptive", metric="m", target=2.0, start=1.0, rate=0.5, low=0.1, high=3.0)
FALLING = RISING.model_copy(update={"rate": -0.5})


def at(progress: float, adapted: dict[str, float] | None = None) -> Clock:
    return Clock(progress, adapted or {})


def test_a_schedule_stays_within_its_bounds() -> None:
    falling = Ramp(kind="cosine", start=3.0, end=0.5, until=0.5)
    jump = Switch(kind="switch", start=1.0, end=4.0, at=0.5)
    assert [bounds(one) for one in (2.0, falling, jump, RISING)] == [(2, 2), (0.5, 3), (1, 4), (0.1, 3)]


def test_values_by_progress() -> None:
    linear, cosine = (Ramp(kind=kind, start=1.0, end=0.2) for kind in ("linear", "cosine"))
    switch = Switch(kind="switch", start=1.0, end=0.2, at=0.5)
    halfway = (1 + math.cos(math.pi / 4)) / 2  # of the way down, a quarter through
    for progress, expected in {
        -0.1: (3.0, 1.0, 1.0, 1.0),
        0.0: (3.0, 1.0, 1.0, 1.0),
        0.25: (3.0, 0.8, 0.2 + 0.8 * halfway, 1.0),
        0.5: (3.0, 0.6, 0.6, 0.2),
        1.0: (3.0, 0.2, 0.2, 0.2),
        1.7: (3.0, 0.2, 0.2, 0.2),  # a last step goes beyond its budget of FLOPs
    }.items():
        values = [value_at(schedule, at(progress)) for schedule in (3, linear, cosine, switch)]
        assert values == pytest.approx(expected)
    assert value_at(switch, at(0.4999)) == 1.0


def test_an_adaptive_value_moves_with_its_metric_within_its_bounds() -> None:
    assert value_at(RISING, at(0.7)) == 1.0  # before the first step, however far the run is
    up, down = math.exp(0.5), math.exp(-0.5)
    metrics = [3.0, 3, 9.0, 2.0, None, math.inf, 1.0, -math.inf, 0.0, 0, 0, 0, 0, 0, 0]
    rising = [
        up,
        up**2,
        3,
        3,
        3,
        3,
        3 * down,
        3 * down**2,
        3 * down**3,
        3 * down**4,
        3 * down**5,
        3 * down**6,
        0.1,
    ]
    falling = [down, down**2, down**3, down**3, down**3, down**4, down**3, down**2, down, 1, up, up**2, 3]
    adapted: dict[str, float] = {}
    for metric, one, other in zip(metrics, rising + [0.1] * 2, falling + [3.0] * 2, strict=True):
        row = {"other": 1.0} if metric is None else {"m": metric}
        adapted = adapt([RISING, FALLING], adapted, row)
        assert value_at(RISING, at(0.0, adapted)) == pytest.approx(one)
        assert value_at(FALLING, at(0.0, adapted)) == pytest.approx(other)


@quick
@given(
    start=st.floats(0.1, 1.0),
    rate=st.floats(-2, 2).filter(bool),
    metrics=st.lists(st.floats(-9, 9), max_size=9),
)
def test_an_adaptive_value_stays_within_its_bounds(start: float, rate: float, metrics: list[float]) -> None:
    schedule = Adaptive(kind="adaptive", metric="m", target=0.0, start=start, rate=rate, low=0.1, high=1.0)
    adapted: dict[str, float] = {}
    for metric in metrics:
        before = value_at(schedule, at(0.0, adapted))
        adapted = adapt([schedule], adapted, {"m": metric})
        after = value_at(schedule, at(0.0, adapted))
        assert 0.1 <= after <= 1.0 and (after - before) * metric * rate >= 0


def test_metrics_that_cannot_be_followed_are_refused() -> None:
    row = {"a": 1, "text": "b", "b": 2.0}
    with pytest.raises(ConfigError, match=r"'m'.*It has a, b\."):
        adapt([RISING], {}, row)
    with pytest.raises(ConfigError, match=r"'m'.*It has a, b, eval/success\."):
        adapt([RISING], {}, row, ["eval/success"])
    waiting = adapt([RISING], {}, row, ["m"])  # an evaluation comes with some steps only
    assert list(waiting.values()) == [1.0]
    assert adapt([RISING], waiting, row) == waiting  # as a metric that was there at the first step
    assert adapt([RISING], {}, {"m": None}) == waiting
    for bad in (math.nan, "much", [1.0]):
        with pytest.raises(AlignmentError, match="metric m"):
            adapt([RISING], waiting, {"m": bad})


def config(output: Path, *overrides: str, **changes: Any) -> RunConfig:
    parts = ("trainer.steps=6", "trainer.checkpoint_every=2", "trainer.optimizer=adamw")
    return load_config(tiny.sft(output, **changes), *parts, *overrides)


def following(metric: str, target: float) -> str:
    parts = f"metric: {metric}, target: {target}, start: 0.01, rate: 0.5, low: 0.002, high: 0.03"
    return f"trainer.learning_rate={{kind: adaptive, {parts}}}"


def test_adaptive_schedules_are_found_wherever_they_stand(tmp_path: Path) -> None:
    assert adaptive_schedules(config(tmp_path)) == []
    rising = RISING.model_dump()
    weights = [{"kind": "outcome"}, {"kind": "prefix", "tokens": FALLING.model_dump()}]
    components = {
        "a": {"kind": "ce", "coef": rising, "weights": weights},
        "b": {"kind": "ce", "coef": rising},
    }
    found = adaptive_schedules(
        config(tmp_path, following("loss", 1.0), loss={"components": components}, method=None)
    )
    assert {(schedule.metric, schedule.rate) for schedule in found} == {
        ("m", 0.5),
        ("m", -0.5),
        ("loss", 0.5),
    }
    assert len(found) == 3  # the one that stands twice moves as one


def test_the_learning_rate_follows_a_metric_of_the_run(tmp_path: Path) -> None:
    rows = tiny.metrics(train(config(tmp_path, following("step", 3))))
    up = math.exp(0.5)
    expected = [0.01, 0.01 / up, 0.01 / up**2, 0.01 / up**2, 0.01 / up, 0.01]  # steps 1 2 | 3 | 4 5 6
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected)


def test_a_run_that_died_adapts_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both between two checkpoints and right after one."""
    schedule, original = following("loss", 2.5), trainer.train_step
    straight = tiny.final_state(train(config(tmp_path / "a", schedule)))
    rates = [row["learning_rate"] for row in straight["metrics"]]
    assert len(set(rates)) > 2

    def dies(session: Session, *, last: int) -> dict[str, Any]:
        if session.step == last:
            raise KeyboardInterrupt
        return original(session)

    for last in (3, 4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer, "train_step", partial(dies, last=last))
            train(config(tmp_path / "b", schedule), resume=True)
    assert tiny.final_state(train(config(tmp_path / "b", schedule), resume=True)) == straight


def test_a_metric_that_the_run_does_not_have_ends_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'distill/kl'.* loss, "):
        train(config(tmp_path, following("distill/kl", 0.1)))


def test_an_evaluation_may_be_followed_although_few_steps_have_one(tmp_path: Path) -> None:
    evaluation = {"suite": tiny.SUITE, "limit": 2, "every": 3, "at_start": False}
    rows = tiny.metrics(train(config(tmp_path, following("eval/success", -1), evaluation=evaluation)))
    up = math.exp(0.5)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01] * 3 + [0.01 * up] * 3)
