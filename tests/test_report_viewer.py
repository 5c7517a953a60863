"""The trajectory viewer: its data from synthetic folders, and the page in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import episode, line, page, rate, turn, write_lines

from opd_agents.chat import build_word_tokenizer
from opd_agents.errors import RunFolderError
from opd_agents.report import trajectories, write_report
from opd_agents.report.differences import difference
from opd_agents.report.escaping import script_json, visible
from opd_agents.report.pieces import _decoded, cut
from opd_agents.types import Credit, Outcome, Span, SpanKind, Task, Trajectory, to_dict

HOSTILE = {
    "script": "<script>window.ran = 1</script>",
    "handler": "<img src=x onerror='window.ran = 2'><svg onload=window.ran=3>",
    "end of the data": '</script><!--<script>window.ran = 4</script>"]});window.ran = 5//',
    "bidirectional": "pay \u202e001 \u2066to\u2069 \u200fme",
    "control": "a\x00b\x1b[31mc\x85d\u2028e\u2029f",
    "unseen": "a\u200bb\ufeffc\U000e0041d\u00ad",
    "half a pair": "x\ud83dy",
    "template": "{{ 7 * 7 }} {% raw %} {# c #} $& ${window.ran = 6}",
}
UNSEEN = re.compile(
    "[\x00\x1b\x85\u2028\u2029\u202a-\u202e\u2066-\u2069\u200b\u200f\ufeff\u00ad\U000e0041\ud800-\udfff]"
)


def tokenised(texts: list[str], uid: str, tokenizer: Any, **more: Any) -> Trajectory:
    """An episode in which the student wrote ``texts``, in the tokens of ``tokenizer``."""
    turns = []
    for text in texts:
        ids = tuple(tokenizer.encode(text.replace("\ud83d", ""), add_special_tokens=False))
        turns.append(
            turn("act", {"what": text}, f"seen: {text}", text=text, action_ids=(*ids, tokenizer.eos_token_id),
                 logprobs=(*(-0.25 for _ in ids), -2.0), tool_error=f"refused: {text}",
                 spans=(Span(SpanKind.CALL, 0, len(ids)), Span(SpanKind.SPECIAL, len(ids), len(ids) + 1)))
        )  # fmt: skip
    given = {"outcome": Outcome.FAILURE, "reward": 0.0} | more
    return Trajectory(uid, "opd_agents/OrderDesk-v0", {}, 0, Task("7", "train"), tuple(turns), **given)


def with_credit(trajectory: Trajectory) -> dict[str, Any]:
    """Each token twice as far from the teacher as the one before, the first two not learned from."""
    credits = []
    for one in trajectory.turns:
        kl = tuple(0.001 * 2**i for i in range(len(one.action_ids)))
        advantage = tuple(-0.5 + 0.1 * i for i in range(len(kl)))
        credits.append(Credit(kl_sum=sum(kl), kl_mean=sum(kl) / len(kl), advantage={"a.b": 0.5}, token_kl=kl,
                              token_advantage=advantage, unlearned=((0, 2),)))  # fmt: skip
    return {"trajectory": to_dict(trajectory), "credit": to_dict(credits), "feedback": [], "repair": None}


def write_hostile(path: Path) -> Path:
    """A run whose model, tools and judge wrote nothing but what is hostile, with its tokenizer."""
    texts = list(HOSTILE.values())
    tokenizer = build_word_tokenizer([text.replace("\ud83d", "") for text in texts])
    write_lines(path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    checkpoint = path / "checkpoints" / "step-1"
    tokenizer.save_pretrained(checkpoint)
    repair = {
        "turn": 1,
        "accepted": True,
        "control": False,
        "evidence": {"repair": [3, 4], "own": [0, 4], "better": 0.9},
    }
    repair |= {"student_action": texts[2], "teacher_action": texts[0], "audit": None, "then": None}
    first = with_credit(tokenised(texts, texts[0], tokenizer, error=texts[1], hint=texts[2]))
    first["feedback"] = [{"trajectory": texts[0], "turn": 0, "reason": texts[1], "replacement": texts[2]}]
    rows = [first | {"repair": repair}, with_credit(tokenised(texts[:3], "plain", tokenizer))]
    rows += [line(np.random.default_rng(0), episode("3", True, "wins"))]
    write_lines(path / "trajectories" / "step-000001.jsonl", rows)
    return path


def write_steps(path: Path) -> Path:
    """A small run without a tokenizer: three steps of three episodes, one of them with a repair."""
    rng, repair = np.random.default_rng(0), {"turn": 3, "accepted": True, "control": False, "audit": None}
    repair |= {"evidence": {"repair": [3, 4], "better": 0.9}, "student_action": "a", "teacher_action": "b"}
    write_lines(path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    for step in (3, 17, 31):
        failed = line(rng, episode(str(step), False, f"e{step}"), repair)
        rows = [line(rng, episode("5", True, "plain")), failed, line(rng, episode(str(step), True, "b"))]
        write_lines(path / "trajectories" / f"step-{step:06d}.jsonl", rows)
    return path


def data_of(report: Path) -> dict[str, Any]:
    """The viewer's data in a page."""
    html = report.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="trajectory-data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([write_hostile(tmp_path_factory.mktemp("runs") / "hostile")])


# ---- the data


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_stays_text(kind: str) -> None:
    text = HOSTILE[kind]
    shown, written = visible(text), script_json({"x": [text.replace("\ud83d", "")]})
    assert not UNSEEN.search(shown) and len(shown) == len(text)
    assert not re.search("[<>&\u2028\u2029]", written)
    assert json.loads(written) == {"x": [text.replace("\ud83d", "")]}


def test_a_hostile_page_holds_two_scripts_and_nothing_unseen(hostile: Path) -> None:
    html = hostile.read_text(encoding="utf-8")
    found = page(hostile)
    assert found.count("script") == 2 and found.count("img") == 0 and not UNSEEN.search(html)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    nonce = next(a["nonce"] for tag, a in found.tags if tag == "script" and "nonce" in a)
    assert policy is not None and f"script-src 'nonce-{nonce}';" in policy and "default-src 'none'" in policy


def test_tokens_are_those_that_were_sampled(hostile: Path) -> None:
    data = data_of(hostile)
    first, second = data["sample"]["0"], data["sample"]["1"]
    told = second["turns"][0]
    assert told["text"] == HOSTILE["script"] + "<|im_end|>" and sum(told["sizes"]) == len(told["text"])
    n = len(told["sizes"])
    assert told["kl"] == [round(2.0**i) for i in range(n)] and told["surprise"] == [250] * (n - 1) + [2000]
    assert told["advantage"][:3] == [-500, -400, -300] and told["unlearned"] == [[0, 2]]
    assert second["columns"] == ["KL", "advantage a.b"] and told["credit"][1] == "+0.50"
    assert first["repairs"][0]["proof"] == [["after the repair", 3, 4], ["after its own action", 0, 4]]
    assert data["rows"][0][8:] == [1, "", "", 2]
    lost = list(HOSTILE).index("half a pair")  # is in no vocabulary: its text, without tokens
    assert (
        "sizes" not in first["turns"][lost] and first["turns"][lost]["text"] == "x\N{REPLACEMENT CHARACTER}y"
    )


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    assert _decoded([b"a\xf0\x9f", b"\x98\x80", b"\xff"]) == ["a", "\U0001f600", "\N{REPLACEMENT CHARACTER}"]
    assert cut(["a", "\U0001f600", "bcd"], 100) == ("a\U0001f600bcd", [1, 2, 3], 0)
    assert cut(["ab", "cd", "efg"], 3) == ("abcd", [2, 2], 3)


def test_without_a_tokenizer_there_are_texts_and_the_page_says_so(tmp_path: Path) -> None:
    report = write_report([write_steps(tmp_path / "run")])
    assert "No tokenizer of theirs was found in the folder" in page(report).text
    turns = [t for body in data_of(report)["sample"].values() for t in body["turns"]]
    assert turns and not any("sizes" in one for one in turns)


def test_an_environment_with_different_options_is_two(tmp_path: Path) -> None:
    rng, tasks = np.random.default_rng(0), ("click-button", "click-tab")
    played = [dataclasses.replace(episode("0", True, name), env_kwargs={"task": name}) for name in tasks]
    write_lines(tmp_path / "run" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    rows = [line(rng, one) for one in played]
    write_lines(tmp_path / "run" / "trajectories" / "step-000003.jsonl", rows)
    data = data_of(write_report([tmp_path / "run"]))
    env_id = played[0].env_id
    assert data["environments"] == [f"{env_id} task={name}" for name in tasks]
    assert [row[1] for row in data["rows"]] == [0, 1]


def test_differences_are_of_words() -> None:
    old, new = (json.dumps({"name": "get", "arguments": {"id": one}}, separators=(",", ":")) for one in "ab")
    assert difference(old, new) == [
        ("=", '{"name": "get", "arguments": {"id": "'), ("-", "a"), ("+", "b"), ("=", '"}}')
    ]  # fmt: skip
    assert difference("a", "a") == [("=", "a")]
    assert difference("x " * 2000, "y") == [("-", "x " * 2000), ("+", "y")]


def test_what_is_beyond_a_sample_stands_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_steps(tmp_path / "run")
    monkeypatch.setattr(trajectories, "SAMPLE_BYTES", 12_000)
    report = write_report([run])
    side = run / "report.trajectories.js"
    data = data_of(report)
    arguments = side.read_text().removeprefix("opdTrajectories(").removesuffix(");\n")
    own_id, bodies = json.loads(f"[{arguments}]")
    assert (own_id, data["side"], len(bodies)) == (data["id"], side.name, len(data["rows"]))
    assert 0 < len(data["sample"]) < len(bodies) == 9
    assert all(json.loads(bodies[int(place)]) == body for place, body in data["sample"].items())
    assert side.name in page(report).text
    monkeypatch.undo()
    write_report([run])
    assert not side.exists()  # all fit


def test_too_many_are_thinned_out_evenly_but_for_repairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, run = np.random.default_rng(0), write_steps(tmp_path / "run")
    for step in (40, 41):
        write_lines(
            run / "trajectories" / f"step-{step:06d}.jsonl",
            [line(rng, episode(str(i), True, str(i))) for i in range(20)],
        )
    monkeypatch.setattr(trajectories, "MOST", 10)
    report = write_report([run])
    rows = data_of(report)["rows"]
    assert sum(row[-1] > 0 for row in rows) == 3
    counts = [sum(row[0] == source for row in rows) for source in (3, 4)]
    assert sorted(counts) == [4, 5]
    assert re.search(r"1[0-3] trajectories of 49, taken evenly", page(report).text)


def test_alarms_mark_the_steps_that_raised_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"step": s, "groups/total": 8, "groups/nonzero": 8 if s < 6 else 0}
        | {"rollout/success": 0.2, "rollout/pass_at_8": 0.2}
        for s in range(1, 13)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    for step in (2, 8, 10, 12):
        write_lines(
            tmp_path / "trajectories" / f"step-{step:06d}.jsonl", [line(rng, episode("1", False, "a"))]
        )
    data = data_of(write_report([tmp_path]))
    assert data["signs"] == ["equal_rewards"]
    assert {source[2]: source[3] for source in data["sources"]} == {2: [], 8: [0], 10: [0], 12: []}


def test_an_evaluation_is_reported(tmp_path: Path) -> None:
    rng, names = np.random.default_rng(0), ("expert", "runs/a")
    policies = [{"policy": name, **rate(0.5, 20), "spent": {"seconds": 3.0, "flops": 2e12}} for name in names]
    compared = {
        "policy": "runs/a",
        "baseline": "expert",
        "difference": -0.25,
        "interval": [-0.5, 0.0],
        "mcnemar": {"p": 0.125},
    }
    result = {"suite": "desk", "split": "test", "policies": policies, "comparisons": [compared]}
    (tmp_path / "how.json").write_text(
        json.dumps({"how": {}, "policies": {name: {"kind": "scripted"} for name in names}})
    )
    for file in ("eval-expert", "eval-expert.greedy", "eval-runs-a"):
        rows = [{"spent": {}, **line(rng, episode(str(i), True, str(i)))} for i in range(2)]
        write_lines(tmp_path / f"{file}.jsonl", rows)
    unfinished = page(write_report([tmp_path]))
    assert "The evaluation has not finished" in unfinished.text
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    found = page(report := write_report([tmp_path]))
    for words in ("runs/a", "−25.0 points (−50.0 to +0.0)", "0.12", "2.00 TFLOP", "desk"):  # noqa: RUF001
        assert words in found.text, words
    assert "Learning curves" not in found.text and "Alarms" not in found.text
    parts = {source[1] for source in data_of(report)["sources"]}
    assert parts == {"expert (evaluated)", "expert, greedy (evaluated)", "runs-a (evaluated)"}
    (tmp_path / "evaluation.json").write_text('{"policies": [3], "suite": "x", "split": "y"}')
    with pytest.raises(RunFolderError, match="no list of policies"):
        write_report([tmp_path])


def test_the_report_says_why_a_run_ended(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    (tmp_path / "summary.json").write_text(json.dumps({"ended": "trainer.until, rollout/success >= 0.9"}))
    assert "trainer.until, rollout/success >= 0.9" in page(write_report([tmp_path])).text


# ---- the page


@contextmanager
def opened(
    report: Path, *, width: int = 1280, address: str = "", scheme: str = "light"
) -> Iterator[tuple[Any, list[str]]]:
    """A page in Chromium, and what it complained of or asked for beside itself."""
    from playwright.sync_api import sync_playwright

    told: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.set_default_timeout(10_000)
        view.on("console", lambda message: told.append(message.text))
        view.on("pageerror", lambda error: told.append(str(error)))
        view.on("request", lambda request: told.append(request.url))
        view.goto(report.as_uri() + address)
        told.remove(report.as_uri())
        yield view, told
        browser.close()


def title(view: Any) -> str:
    """The link of the trajectory that is shown."""
    return view.locator("#trajectory a").first.inner_text()


@pytest.mark.real("chromium", "playwright")
def test_browser_goes_through_hostile_trajectories_by_keys(hostile: Path) -> None:
    with opened(hostile) as (view, told):
        view.locator("#list").focus()
        view.keyboard.press("x")  # everything is unfolded, so that all text is in the page
        for name, text in HOSTILE.items():
            assert name == "half a pair" or visible(text) in view.locator("#trajectory").inner_text(), name
        view.keyboard.press("e")
        assert (
            view.evaluate("document.activeElement.id") == "turn-2"
        )  # the located one, not the first refused
        assert view.locator("li.earliest .diff del").first.is_visible()
        assert "3 of 4 rollouts succeed" in view.locator("li.earliest .correction").inner_text()
        view.keyboard.press("n")
        assert view.evaluate("document.activeElement.id") == "turn-3"
        view.keyboard.press("ArrowRight")
        assert "Turn 3, token 1 of" in view.locator("#token").inner_text()
        assert "not learned from" in view.locator("#token").inner_text()
        colours = [view.locator("#colour").input_value()]
        for _ in range(4):
            view.keyboard.press("c")
            colours.append(view.locator("#colour").input_value())
        assert colours == ["kl", "advantage", "surprise", "none", "kl"]
        view.keyboard.press("j")
        assert title(view) == "step-000001/plain" and "#trajectory=step-000001%2Fplain" in view.url
        view.keyboard.press("k")
        assert title(view).startswith("step-000001/<script>")
        assert view.evaluate("window.ran") is None
    assert told == []


@pytest.mark.real("chromium", "playwright")
def test_browser_filters_and_follows_links_on_a_phone(hostile: Path) -> None:
    with opened(hostile, width=390, address="#trajectory=step-000001%2Fplain", scheme="dark") as (view, told):
        assert title(view) == "step-000001/plain"
        assert view.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        shades = view.locator("#turn-1 .t").evaluate_all("all => all.map(t => t.style.background)")
        assert len({*shades}) > 5 and view.locator("#turn-1 .t.masked").count() == 2
        view.get_by_label("Outcome").select_option("success")
        assert view.locator("#count").inner_text() == "1 of 3 shown"
        assert view.get_by_role("option").filter(has_text="test 3").get_attribute("aria-setsize") == "1"
        view.get_by_label("Find").fill("nothing like it")
        assert view.locator("#count").inner_text() == "0 of 3 shown"
        view.evaluate("location.hash = '#trajectory=step-000001%2Fwins'")
        view.wait_for_function("document.querySelector('#trajectory a')?.textContent.endsWith('wins')")
        assert view.locator("#count").inner_text() == "3 of 3 shown"  # what a link leads to is in the list
    assert told == []


@pytest.mark.real("chromium", "playwright")
def test_browser_is_smooth_with_ten_thousand_and_loads_the_side_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_steps(tmp_path / "run")
    monkeypatch.setattr(trajectories, "SAMPLE_BYTES", 12_000)
    report = write_report([run])
    data, side = data_of(report), run / "report.trajectories.js"
    lost = next(i for i in range(9) if str(i) not in data["sample"])
    data["rows"] += [[*data["rows"][0][:2], f"more{i}", *data["rows"][0][3:]] for i in range(10_000)]
    data["signs"], data["sources"][1][3], data["environments"] = ["flawed_prefix"], [0], ["a/A-v0", "b/B-v0"]
    data["rows"][lost][1] = 1
    html = report.read_text().split('id="trajectory-data">')
    report.write_text(
        f'{html[0]}id="trajectory-data">{script_json(data)}{html[1][html[1].index("</script>") :]}'
    )
    with opened(report) as (view, told):
        assert view.locator("#count").inner_text() == "10,009 of 10,009 shown"
        assert view.evaluate("document.querySelectorAll('.row').length") < 50
        change = "filters.outcome.value = '0'; filters.dispatchEvent(new Event('input'))"
        assert (
            view.evaluate(
                f"(() => {{ const from = performance.now(); {change}; return performance.now() - from }})()"
            )
            < 500
        )
        for label, chosen, n in (("Alarm", "flawed_prefix", 2), ("Environment", "b/B-v0", 1)):
            view.get_by_label("Outcome").select_option("any" if n == 1 else "success")
            view.get_by_label(label).select_option(chosen)
            assert view.locator("#count").inner_text().startswith(f"{n} of"), label
            view.get_by_label(label).select_option("any")
        view.get_by_label("Outcome").select_option("success")
        view.locator("#list").focus()
        view.keyboard.press("End")
        assert view.locator("#list [aria-selected=true]").get_attribute("aria-posinset") == "10006"
        source, _, uid = data["rows"][lost][:3]
        key = f"{data['sources'][source][0]}/{uid}"
        view.evaluate(f"location.hash = '#trajectory=' + encodeURIComponent({json.dumps(key)})")
        view.wait_for_function("document.querySelector('#turn-1') && !document.querySelector('[aria-busy]')")
        assert title(view) == key
        assert told == [side.as_uri()]
        side.unlink()
        view.reload()
        view.wait_for_function(
            "document.getElementById('trajectory').textContent.includes('not beside this page')"
        )
