"""The report: made from synthetic run folders, read back as HTML, and opened in a browser."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from opd_agents.errors import RunFolderError
from opd_agents.report import write_report
from opd_agents.types import (
    Actor,
    Branch,
    Credit,
    Message,
    Outcome,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
    to_dict,
)

NASTY = "<script>alert('x')</script> & \"quoted\" </style><img src=x onerror=alert(1)> \ud83d\x00\u202e$x_1$"
VOID = {"meta", "link", "img", "br", "hr", "input"}
COMPONENTS = {"distill": 0.55, "policy": 0.28, "correction": 0.17}


# -- synthetic run folders -----------------------------------------------------------------------------


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rate(success: float, n: int, **more: float) -> dict[str, Any]:
    half = 1.96 * (success * (1 - success) / n) ** 0.5
    interval = [max(0, success - half), min(1, success + half)]
    greedy = min(1, success + 0.09)
    return {
        "episodes": n,
        "success": success,
        "interval": interval,
        "success_greedy": greedy,
        "interval_greedy": [max(0, greedy - half / 2), min(1, greedy + half / 2)],
        "errors": 0,
        **more,
    }


def metrics(rng: np.random.Generator, steps: int, start: float, end: float) -> list[dict[str, Any]]:
    rows = []
    for step in range(steps):
        done = 1 - np.exp(-3.5 * step / steps)
        success = float(start + (end - start) * done)
        proposed = int(rng.integers(3, 9))
        row: dict[str, Any] = {
            "step": step,
            "rollout/success": float(np.clip(success + rng.normal(0, 0.06), 0, 1)),
            "rollout/turns": 7.5 + rng.normal(0, 0.3),
            "distill/kl": float(0.4 * np.exp(-3 * step / steps) + 0.03 + abs(rng.normal(0, 0.01))),
            "loss": float(0.5 - 0.4 * done),
            "correction/proposed": proposed,
            "correction/accepted": int(rng.integers(0, proposed)),
            "correction/token_share": float(rng.uniform(0.08, 0.18)),
            "groups/total": 16,
            "groups/nonzero": int(rng.integers(4, 13)),
            "total/flops": 1.6e10 * (step + 1),
            "total/generated_tokens": 13_000 * (step + 1),
            "total/teacher_tokens": 21_000 * (step + 1),
            "total/seconds": 1.4 * (step + 1),
        }
        for name, share in COMPONENTS.items():
            row[f"loss/{name}"] = float(share * (0.6 - 0.4 * done) + rng.normal(0, 0.01))
            row[f"grad_share/{name}"] = float(np.clip(share + rng.normal(0, 0.04), 0.01, 1))
        if step % 10 == 0 or step == steps - 1:
            row |= {"eval/success": success, "eval/success_greedy": min(1, success + 0.08)}
            row |= {"eval/success_low": success - 0.06, "eval/success_high": min(1, success + 0.05)}
        rows.append(row)
    return rows


def turn(tool: str, arguments: dict[str, Any], observation: str, **more: Any) -> Turn:
    action = json.dumps({"name": tool, "arguments": arguments})
    given: dict[str, Any] = {
        "context_ids": (1, 2),
        "action_ids": (3, 4, 5),
        "logprobs": (-0.1, -0.2, -0.1),
        "actor": Actor.STUDENT,
        "policy_version": 0,
        "text": f"<tool_call>{action}</tool_call>",
        "action": action,
        "observation": observation,
        "reward": 0.0,
        "terminated": False,
        "truncated": False,
        "stop_reason": StopReason.END,
        "state_digest": "d",
        "calls": (ToolCall(tool, arguments),),
    }
    return Turn(**{**given, **more})


def episode(task: str, success: bool, uid: str, branch: Branch | None = None) -> Trajectory:
    customer = {"id": "C4", "name": "Ada", "since": 2019}
    turns = [
        turn("find_customer", {"name": "Ada"}, json.dumps(customer)),
        turn(
            "list_orders",
            {"customer_id": "C4"},
            '{"error":"timed out, try again"}',
            tool_error="list_orders timed out",
        ),
        turn(
            "list_orders", {"customer_id": "C4"}, '[{"id":"O7","status":"sent"},{"id":"O9","status":"open"}]'
        ),
    ]
    if success:
        turns += [
            turn("cancel_order", {"order_id": "O9", "reason": "customer request"}, '{"cancelled":"O9"}'),
            turn("done", {}, "The desk is closed.", reward=1.0, terminated=True),
        ]
    else:
        turns += [
            turn("refund", {"order_id": NASTY, "amount": 12.5}, NASTY, tool_error=f"no order {NASTY}"),
            turn("", {}, NASTY, action=NASTY, text=NASTY, calls=(), parse_error="no JSON: " + NASTY),
            turn("done", {}, "The desk is closed.", terminated=True),
        ]
    return Trajectory(
        uid=uid,
        env_id="opd_agents/OrderDesk-v0",
        env_kwargs={},
        seed=0,
        task=Task(task, "test"),
        turns=tuple(turns),
        outcome=Outcome.SUCCESS if success else Outcome.FAILURE,
        reward=float(success),
        messages=(
            Message("system", "You work at an order desk."),
            Message("user", "Ada wants her open order cancelled."),
        ),
        branch=branch,
    )


def line(
    rng: np.random.Generator, trajectory: Trajectory, repair: dict[str, Any] | None = None
) -> dict[str, Any]:
    kls = rng.exponential(0.1 if trajectory.success else 1.0, len(trajectory.turns)).tolist()
    credit = [Credit(kl_sum=kl, kl_mean=kl / 9) for kl in kls]
    return {"trajectory": to_dict(trajectory), "credit": to_dict(credit), "repair": repair}


def write_opd_stage(
    path: Path, rng: np.random.Generator, seed: int, steps: int = 40, end: float = 0.88
) -> None:
    write_lines(path / "metrics.jsonl", metrics(rng, steps, 0.24, end))
    (path / "config.yaml").write_text(yaml.safe_dump({"name": path.name, "seed": seed}))
    for step in (3, 17, 31):
        accepted = step != 17
        arms = {"repair": [6 if accepted else 0, 8], "own": [1, 8], "retry": [2, 8]}
        repair: dict[str, Any] = {"turn": 3, "accepted": accepted, "evidence": arms | {"better": 0.98}}
        repair |= {"audit": None, "control": False}
        if step == 31:  # of a run without that rival
            del arms["retry"]
            repair["evidence"] = arms | {"better": 0.98}
            repair["audit"] = {"repair": [20, 32], "own": [7, 32], "better": 0.999}
        repair |= {"student_action": json.dumps({"name": "refund", "arguments": {"order_id": NASTY}})}
        repair |= {"teacher_action": json.dumps({"name": "cancel_order", "arguments": {"order_id": "O9"}})}
        repair["then"] = {**repair, "turn": 5, "accepted": False} if step == 31 else None
        parent = episode(str(step), False, f"e{step}")
        rows = [
            line(rng, episode("5", True, "plain")),
            line(rng, parent, repair),
            line(rng, episode(str(step), True, "b", Branch(parent.uid, 3))),
        ]
        write_lines(path / "trajectories" / f"step-{step:06d}.jsonl", rows)


def write_quickstart(path: Path, seed: int = 0, end: float = 0.88) -> Path:
    rng = np.random.default_rng(seed)
    cold = metrics(rng, 30, 0.02, 0.24)
    kept = {"step", "loss", "eval/success", "eval/success_low", "eval/success_high", "total/flops"}
    cold = [{k: v for k, v in row.items() if k in kept} for row in cold]
    write_lines(path / "cold_start" / "metrics.jsonl", cold)
    write_opd_stage(path / "opd", rng, seed, end=end)
    config = {"name": path.name, "output": str(path), "seed": seed, "stages": {"cold_start": {}, "opd": {}}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    spent = {"generated_tokens": 520_000, "teacher_tokens": 840_000, "flops": 6.4e11, "seconds": 58.0}
    none = {"generated_tokens": 0, "teacher_tokens": 0, "flops": 0, "seconds": 0}
    jitter = float(rng.normal(0, 0.015))
    policies = {
        "expert": rate(1.0, 400, turns=6.9, invalid_calls=0, **none),
        "teacher": rate(0.925, 400, turns=7.4, invalid_calls=0.04, **none),
        "student_before": rate(0.235 + jitter, 400, turns=9.1, invalid_calls=1.7, **{**none, "seconds": 24}),
        "student_after": rate(end + jitter, 400, turns=7.6, invalid_calls=0.12, **spent),
        "student_sft_fresh": rate(0.84, 400, turns=7.7, invalid_calls=0.2, **spent),
        "student_grpo": rate(0.42, 400, turns=8.3, invalid_calls=0.8, **{**spent, "teacher_tokens": 0}),
    }
    (path / "summary.json").write_text(json.dumps({"seconds": 171.0, "policies": policies}))
    for policy, solved in (("student_before", {3, 6}), ("student_after", {0, 1, 2, 3, 5, 7})):
        rows = [line(rng, episode(str(task), task in solved, f"{policy}{task}")) for task in range(8)]
        write_lines(path / "trajectories" / f"eval-{policy}.jsonl", rows)
    return path


# -- reading a page ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing that was open"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def count(self, tag: str, class_: str = "") -> int:
        return sum(t == tag and class_ in ["", *(a.get("class") or "").split()] for t, a in self.tags)


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quickstart(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def report(quickstart: Path) -> Path:
    return write_report([quickstart])


def test_page_has_every_section_and_is_small(report: Path, quickstart: Path) -> None:
    assert report == quickstart / "report.html"
    found = page(report)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"policies", "parts", "curves", "episodes", "corrections"} <= set(ids)
    assert found.count("svg") == found.count("figure") >= 8
    assert found.count("article", "pair") == 4
    assert found.count("article", "repair") == 3
    assert report.stat().st_size < 1_000_000
    for words in ("Expert", "Student, SFT fresh", "0.64 TFLOP", "520k", "58 s", "95 % Wilson"):
        assert words in found.text


def test_what_a_model_wrote_is_text(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    found = page(report)
    assert found.count("img") == 0
    ours, data = (a for tag, a in found.tags if tag == "script")  # the viewer's data, then its script
    assert (ours["type"], [*data]) == ("application/json", ["nonce"])
    assert "<script>alert('x')</script>" in found.text
    assert "\x00" not in html and "\u202e" not in html
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_page_refers_to_nothing_outside(report: Path) -> None:
    links = [a[name] for _, a in page(report).tags for name in ("href", "src", "xlink:href") if name in a]
    assert links and all(link is not None and link.startswith(("#", "data:,")) for link in links)
    ids = {a["id"] for _, a in page(report).tags if "id" in a}
    assert all(link[1:] in ids for link in links if link and link.startswith("#"))


def test_turns_show_calls_kl_and_flags(report: Path) -> None:
    found = page(report)
    assert "cancel_order" in found.text and "order_id=" in found.text
    assert "time-out" in found.text and "parse error" in found.text and "tool error" in found.text
    words = " ".join(found.text.split())
    assert "5 failed before and succeed after, 1 succeeded before and fail after" in words
    assert "1 of 8 rollouts succeed (12.5 %)" in found.text and "tried again: 2 of 8" in found.text
    assert "6 of 8 rollouts succeed (75.0 %)" in found.text and "probability 0.980" in found.text
    assert "audit: 20 of 32 rollouts succeed" in words and "audit: 7 of 32" in words
    assert words.count("A run after this failed, too, and was corrected at turn 6: rejected") == 1
    assert "The teacher's action in the same state" in words
    assert found.count("div", "kl") > 20


def test_inert_parts_are_named(tmp_path: Path) -> None:
    rows = metrics(np.random.default_rng(0), 20, 0.2, 0.8)
    for row in rows:
        row |= {"correction/accepted": 0, "grad_share/policy": 0.01}
    write_lines(tmp_path / "run" / "metrics.jsonl", rows)
    text = " ".join(page(write_report([tmp_path / "run"])).text.split())
    assert "Yes: 2 of 5 parts." in text
    assert "inert Corrections 0 of" in text
    assert "inert Component policy mean 1.0 % of the gradient norm" in text
    assert "active Rewards" in text


def test_what_a_loss_is_composed_of_is_drawn(tmp_path: Path) -> None:
    """Coefficients, limits and the parts of an advantage, by the names of the config."""
    keys = {
        "Parts of the advantage": ("advantage/joint.teacher", "advantage/joint.verifier"),
        "Scheduled: joint.coef": ("scheduled/loss.components.joint.coef",),
        "Norm of the gradient": ("grad_norm", "grad_norm/joint", "grad_norm/other"),
        "Most action tokens of an episode": ("scheduled/rollout.max_action_tokens",),
        "Most turns of an episode": ("scheduled/rollout.max_turns",),
        "Learning rate": ("learning_rate", "scheduled/trainer.learning_rate"),
        "KL per student token, in nats": ("distill/kl", "kl/base"),
    }
    write_lines(tmp_path / "plain" / "metrics.jsonl", [{"step": i, "loss": 1.0} for i in range(3)])
    rows = [{"step": i} | {key: 0.1 * i for some in keys.values() for key in some} for i in range(3)]
    write_lines(tmp_path / "run" / "metrics.jsonl", rows)
    plain, full = (page(write_report([tmp_path / name])).text for name in ("plain", "run"))
    assert [title for title in keys if title in plain] == []
    assert [title for title in keys if title not in full] == []
    for label in ("joint.teacher", "joint.verifier", "other", "to base"):
        assert label in full, label


def test_seeds_are_averaged_with_t_intervals(tmp_path: Path) -> None:
    for seed in range(3):
        write_quickstart(tmp_path / "runs" / f"seed-{seed}", seed)
    summaries = [json.loads((tmp_path / "runs" / f"seed-{i}" / "summary.json").read_text()) for i in range(3)]
    values = [summary["policies"]["student_after"]["success"] for summary in summaries]
    half = 4.302653 * float(np.std(values, ddof=1)) / 3**0.5
    text = page(write_report([tmp_path / "runs"])).text
    assert f"{100 * float(np.mean(values)):.1f} %" in text
    assert f"± {100 * half:.1f} points" in text
    assert "3 seeds; intervals are 95 % t-intervals" in text
    given = page(write_report([tmp_path / "runs" / f"seed-{i}" for i in range(3)], tmp_path / "b.html")).text
    assert "3 seeds; intervals" in given


def test_different_runs_stand_side_by_side(tmp_path: Path) -> None:
    for name, end in (("one", 0.88), ("two", 0.6)):
        write_opd_stage(tmp_path / name, np.random.default_rng(1), 0, end=end)
    found = page(write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html"))
    assert found.count("section", "headline-card") == 2
    assert "Rollout success over compute" in found.text
    assert found.count("tr", "group") == 2


def test_a_running_run_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    write_lines(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "loss": 0.5, "rollout/success": None}])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    text = " ".join(page(write_report([tmp_path / "run"])).text.split())
    assert "This run has no summary yet" in text and "The last step written is 0." in text
    assert "There is no evaluation before and after yet." in text


def test_plain_run_shows_first_and_last_evaluation(tmp_path: Path) -> None:
    write_opd_stage(tmp_path / "run", np.random.default_rng(0), 0)
    text = " ".join(page(write_report([tmp_path / "run"])).text.split())
    assert "Sampled success in validation, “Student, step 0” to “Student, step 39”: +" in text


def test_the_evaluation_before_training_comes_first(tmp_path: Path) -> None:
    rows = [{"step": step, "loss/ce": 1.0, "grad_share/ce": 1.0, "eval/success": 0.9} for step in (10, 20)]
    write_lines(tmp_path / "run" / "metrics.jsonl", rows)
    write_summary = (tmp_path / "run" / "summary.json").write_text
    write_summary(json.dumps({"evaluation_at_start": None}))
    text = " ".join(page(write_report([tmp_path / "run"])).text.split())
    assert "in validation, “Student, step 10” to “Student, step 20”: +0.0 points" in text
    write_summary(json.dumps({"evaluation_at_start": rate(0.2, 100)}))
    text = " ".join(page(write_report([tmp_path / "run"])).text.split())
    assert "in validation, “Student, step 0” to “Student, step 20”: +70.0 points" in text
    assert "Nothing to judge" in text and "Share of the gradient norm" not in text  # of the only component


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("metrics.jsonl", '{"step": 0}\n{"step": \n{"step": 2}\n', "metrics.jsonl, line 2"),
        ("metrics.jsonl", "[1]\n{}\n", "line 1"),
        ("summary.json", "{", "summary.json is no JSON"),
        ("summary.json", '{"policies": [1]}', "no mapping of policies"),
        ("config.yaml", "a: [", "config.yaml is no YAML"),
        ("trajectories/eval-student_before.jsonl", '{"trajectory": {}}\n', "no trajectory"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: str, says: str) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    (tmp_path / "trajectories").mkdir()
    (tmp_path / file).write_text(content)
    with pytest.raises(RunFolderError, match=says):
        write_report([tmp_path])


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run folder .*absent"):
        write_report([tmp_path / "absent"])
    with pytest.raises(RunFolderError, match="is no run folder"):
        write_report([tmp_path])
    with pytest.raises(RunFolderError, match="No run folder was given"):
        write_report([])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    with pytest.raises(RunFolderError, match="is a folder"):
        write_report([tmp_path], tmp_path)


@pytest.mark.real("chromium", "playwright")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_shows_it_without_errors(report: Path, width: int) -> None:
    chromium = shutil.which("chromium")
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": width, "height": 900})
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(report.as_uri())
        for name in ("h1", ".headline", "#policies table", "figure svg", "article.repair"):
            assert view.locator(name).first.is_visible(), name
        assert view.locator("article.pair .side").nth(1).is_visible()
        box = view.locator("figure svg").first.bounding_box()
        assert box is not None and box["width"] > 250 and box["height"] > 100
        overflow = view.evaluate("document.documentElement.scrollWidth - innerWidth")
        sides = [view.locator("article.pair .side").nth(i).bounding_box() for i in (0, 1)]
        browser.close()
    assert complaints == [] and requests == [report.as_uri()]
    assert overflow <= 0
    assert sides[0] and sides[1] and (sides[0]["x"] < sides[1]["x"]) == (width == 1280)
