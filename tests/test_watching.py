"""`opd-agents watch`: what it shows of a folder, and when it ends."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from test_report import write_lines

from opd_agents import watching
from opd_agents.errors import RunFolderError
from opd_agents.watching import sparkline, watch

CONFIG = "name: desk\ntrainer: {steps: 10}\n"


def rows(n: int, success: float = 0.2) -> list[dict]:
    return [
        {
            "step": i, "progress": i / 10, "rollout/success": success, "distill/kl": 1.0 / i,
            "loss/teach": 0.5, "total/seconds": 6.0 * i, "tokens_per_second": 1234.0, "groups/total": 8,
            "groups/nonzero": 0, "rollout/pass_at_8": success,
        }
        for i in range(1, n + 1)
    ]  # fmt: skip


def begun(path: Path, n: int) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    if n:
        write_lines(path / "metrics.jsonl", rows(n))
    return path


def shown(path: Path, terminal: bool = False, once: bool = False, width: int = 100) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    watch(path, console, once=once)
    return console.file.getvalue().replace("\N{NO-BREAK SPACE}", " ")


def test_a_frame_shows_progress_figures_and_alarms(tmp_path: Path) -> None:
    text = shown(begun(tmp_path / "desk", 5))
    for words in (
        *("desk  running, last step", "step 5 of 10   30 s so far, about 30 s left", "success of rollouts"),
        *("20.0 %", "KL to the teacher", "1.000", "0.200", "█▄▂▁▁", "loss, teach", "1.23k"),
        *("alarm equal rewards (step 5)", "try `rollout.redraws=3`"),
    ):
        assert words in text, words
    assert "validation" not in text  # was not measured


@pytest.mark.parametrize("width", [40, 80])
def test_a_frame_fits_a_narrow_terminal(tmp_path: Path, width: int) -> None:
    lines = shown(begun(tmp_path / "desk", 9), terminal=True, once=True, width=width).splitlines()
    assert max(map(len, lines)) <= width and any("KL to the" in line for line in lines)


def test_it_follows_a_run_from_before_its_first_step_to_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "desk", 0)
    done: list[float] = []

    def next_step(seconds: float) -> None:
        done.append(seconds)
        assert len(done) < 5
        write_lines(run / "metrics.jsonl", rows(3 * len(done)))
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "los')  # is being written
        if len(done) == 3:
            (run / "summary.json").write_text(json.dumps({"ended": "trainer.until, loss"}))

    monkeypatch.setattr(watching.time, "sleep", next_step)
    text = shown(run, terminal=True)
    assert len(done) == 3
    course = (
        "waiting for the first step",
        "step 3 of 10",
        "step 6 of 10",
        "finished, ended by trainer.until",
    )
    places = [text.find(words) for words in (*course, "step 9 of 10")]
    assert -1 not in places and places == sorted(places)
    assert "step 9 of 10" in shown(run, terminal=True) and len(done) == 3  # ends at once


def test_ctrl_c_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupted)
    assert "step 2 of 10" in shown(begun(tmp_path / "desk", 2), terminal=True)


def test_of_stages_the_one_that_runs_is_shown(tmp_path: Path) -> None:
    first, _ = begun(tmp_path / "two" / "cold", 4), begun(tmp_path / "two" / "opd", 2)
    (tmp_path / "two" / "config.yaml").write_text("stages: {cold: {}, opd: {}}\n")
    (first / "summary.json").write_text(json.dumps({"evaluation": {"success": 0.25}}))
    text = shown(tmp_path / "two")
    assert (
        "two, opd  running" in text and "cold: 4 steps, validation 25.0 %" in text and "step 2 of 10" in text
    )


def test_what_is_no_single_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        shown(tmp_path / "absent")
    for seed in (0, 1):
        begun(tmp_path / "seeds" / f"seed-{seed}", 1)
    with pytest.raises(RunFolderError, match=r"2 seeds; watch one of them, such as .*seed-0"):
        shown(tmp_path / "seeds")
    (tmp_path / "evaluation.json").write_text('{"suite": "a", "split": "b", "policies": []}')
    (tmp_path / "seeds").rename(tmp_path.parent / "elsewhere")
    with pytest.raises(RunFolderError, match="is an evaluation"):
        shown(tmp_path)


def test_sparklines_go_from_lowest_to_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([5.0]) == "▁"
    assert sparkline([0.0] * 500 + [1.0] * 500, width=4) == "▁▁██"
