import json
import math

import pytest
from rolling import DESK, trajectory, turn
from toy_envs import Counter

from opd_agents import envs
from opd_agents.config import load_config
from opd_agents.errors import CheckpointError, ConfigError, UnknownName, UserError
from opd_agents.evaluation import evaluate, load_suite, play, summarise
from opd_agents.evaluation.evaluate import load_contestant
from opd_agents.evaluation.metrics import wilson
from opd_agents.policies.models import save_checkpoint
from opd_agents.session import check_inputs
from opd_agents.types import Outcome

Z = 1.959963984540054


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (10, 10), (171, 200), (1, 1)])
def test_the_wilson_interval_is_the_formulas(wins, n):
    p, spread = wins / n, Z * math.sqrt(wins / n * (1 - wins / n) / n + Z * Z / (4 * n * n))
    centre, scale = p + Z * Z / (2 * n), 1 + Z * Z / n
    assert wilson(wins, n) == pytest.approx([(centre - spread) / scale, (centre + spread) / scale], abs=1e-6)


def test_figures_are_means_per_sampled_episode():
    good, bad = turn([1], [2, 3]), turn([1], [2], parse_error="no JSON")
    sampled = [
        trajectory([good, bad], outcome=Outcome.SUCCESS),
        trajectory([bad, bad, good], outcome=Outcome.FAILURE),
        trajectory([], outcome=Outcome.ERROR, error="broken"),
        trajectory([good], outcome=Outcome.UNFINISHED),
    ]
    row = summarise(sampled, [trajectory([good], outcome=Outcome.SUCCESS)] * 3 + sampled[1:2])
    assert row == {
        "episodes": 4, "success": 0.25, "interval": wilson(1, 4), "success_greedy": 0.75,
        "interval_greedy": wilson(3, 4), "turns": 1.5, "invalid_calls": 0.75, "errors": 1,
        "tokens_per_episode": (3 + 4 + 0 + 2) / 4,
    }  # fmt: skip


class Failing(Counter):
    """Breaks in every third task."""

    def begin(self, task):
        if int(task.id) % 3 == 0:
            raise RuntimeError("the server is down")
        return super().begin(task)


envs.register("tests/Failing-v0", f"{__name__}:Failing")
envs.register("tests/Counting-v0", "toy_envs:Counter")
SUITE = """
environments: [{id: opd_agents/OrderDesk-v0, tasks: 6, options: {level: easy}}]
limits: {max_tokens_per_turn: 8, max_context_tokens: 60}
"""


@pytest.fixture
def suite(tmp_path):
    def write(text=SUITE):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, student, desk_chat):
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "step-3"
    path.mkdir(parents=True)
    save_checkpoint(
        path, student, desk_chat.tokenizer, {"kwargs": desk_chat.kwargs, "system": desk_chat.system}
    )
    return path


def test_evaluate_gives_a_row_for_each_policy(suite, checkpoint, tmp_path):
    run = str(checkpoint.parent.parent)
    policies = ["expert", "random", run]
    result = evaluate(suite(), policies, limit=4, out=tmp_path / "out")
    assert (result["suite"], result["split"]) == ("mine", "test")
    assert [row["policy"] for row in result["policies"]] == policies
    expert, chance, student = result["policies"]
    for row in result["policies"]:
        assert row["episodes"] == 4 and row["errors"] == 0
        assert {"success", "interval", "success_greedy", "turns", "invalid_calls"} <= set(row)
        assert row["interval"][0] <= row["success"] <= row["interval"][1]
    assert (expert["success"], expert["success_greedy"], expert["interval"]) == (1.0, 1.0, wilson(4, 4))
    assert chance["success"] < 1 and student["success"] == 0 and student["tokens_per_episode"] > 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    lines = (tmp_path / "out" / "eval-expert.jsonl").read_text().splitlines()
    tasks = [json.loads(line)["trajectory"]["task"] for line in lines]
    assert tasks == [{"id": str(i), "split": "test"} for i in range(4)]  # four tasks, one sample each


def test_evaluation_is_reproducible_and_seeded(suite, checkpoint):
    once = evaluate(suite(), [str(checkpoint), "random"], limit=3)
    assert evaluate(suite(), [str(checkpoint), "random"], limit=3) == once
    assert evaluate(suite(), [str(checkpoint), "random"], limit=3, seed=1) != once


def test_failed_episodes_are_counted(suite):
    path = suite("environments: [{id: tests/Failing-v0, tasks: 6}]")
    (row,) = evaluate(path, ["random"])["policies"]
    assert (row["episodes"], row["errors"]) == (6, 2)


def test_a_limit_keeps_the_first_tasks_of_the_whole_suite(suite):
    text = "environments: [{id: tests/Counting-v0, tasks: 1}, {id: opd_agents/OrderDesk-v0, tasks: 9}]"
    loaded = load_suite(suite(text))
    everything = loaded.episodes("test", None, 0)
    assert len(everything) == 10 and len({e.uid for e in everything}) == 10
    assert len({(e.seed, e.stream) for e in everything}) == 10
    for limit in (1, 2, 4, 10, 99):
        assert loaded.episodes("test", limit, 0) == everything[:limit]
    assert {e.env_id for e in everything[:2]} == {"tests/Counting-v0", DESK}


def test_a_run_whose_budget_of_thought_fills_the_suites_actions_is_refused(suite):
    text = "environments: [{id: opd_agents/OrderDesk-v0, tasks: 1}]\nlimits: {max_tokens_per_turn: 300}"
    config = {
        "name": "x", "method": "sft", "student": {"model": "m"},
        "environments": [{"id": "tests/Counting-v0"}],
        "chat": {"thinking_budget": 300}, "rollout": {"max_tokens_per_turn": 400},
        "evaluation": {"suite": suite(text)},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"budget 300 leaves no room for an action, as .* plays with 300"):
        check_inputs(load_config(config))


def test_a_split_with_fewer_tasks_gives_all_that_it_has(suite):
    assert len(load_suite("tests/Counting-v0").episodes("test", None, 0)) == Counter.split_sizes["test"] < 100


def test_unknown_names_are_told_with_the_nearest(suite, tmp_path):
    with pytest.raises(UnknownName, match="'orderdesk'"):
        load_suite("orderdesc")
    with pytest.raises(UnknownName, match="opd_agents/OrderDesk-v0"):
        load_suite("opd_agents/OrderDest-v0")
    with pytest.raises(UnknownName, match="opd_agents/OrderDesk-v0"):
        evaluate(suite("environments: [{id: opd_agents/OrderDest-v0}]"), ["expert"])
    with pytest.raises(UserError, match="takes no argument 'lvl'"):
        evaluate(suite(SUITE.replace("level", "lvl")), ["expert"])
    with pytest.raises(UnknownName, match="'train'"):
        evaluate(suite(), ["expert"], split="trian")
    with pytest.raises(UnknownName, match="'expert'"):
        evaluate(suite(), ["exprt"])
    with pytest.raises(UnknownName, match="OrderDesk"):
        play("opd_agents/OrderDesc-v0", "expert")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("environments: []", "environments"),
        ("environmets: [{id: x}]", "environ"),
        (SUITE + "temperature: 0", "temperature"),
        ("environments: [{id: x, tasks: many}]", r"environments.0.tasks"),
        ("- 1", "expected a mapping"),
        ("a: [", "no valid YAML"),
    ],
)
def test_a_suite_file_that_cannot_be_used(suite, text, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(suite(text))


def test_a_missing_suite_file(tmp_path):
    with pytest.raises(ConfigError, match="No suite file"):
        load_suite(str(tmp_path / "none.yaml"))


def test_a_checkpoint_that_is_missing_or_does_not_fit(tmp_path, checkpoint, desk_chat, tiny_llama):
    with pytest.raises(UnknownName, match="Unknown policy"):
        load_contestant(str(tmp_path / "none"), 1.0)
    with pytest.raises(CheckpointError, match="neither a model"):
        load_contestant(str(tmp_path), 1.0)
    small = tmp_path / "small"
    model = tiny_llama()
    model.resize_token_embeddings(100)
    save_checkpoint(small, model, desk_chat.tokenizer, {})
    with pytest.raises(CheckpointError, match="160 tokens and the model only 100"):
        load_contestant(str(small), 1.0)


def test_a_checkpoint_plays_with_the_chat_it_was_saved_with(checkpoint, desk_chat):
    contestant = load_contestant(str(checkpoint.parent.parent), 1.0)
    assert contestant.chat.fingerprint == desk_chat.fingerprint
    assert [p.reader.temperature for p in (contestant.sampled, contestant.greedy)] == [1.0, 0.0]


def test_playing_shows_each_episode(checkpoint):
    seen = []
    played = play(DESK, "expert", episodes=3, watch=seen.append)
    assert [t.task.id for t in played] == ["0", "1", "2"] and all(t.success for t in played)
    assert sorted(t.uid for t in seen) == ["0", "1", "2"]
