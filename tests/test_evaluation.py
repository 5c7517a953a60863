import json
import shutil

import pytest
import torch
from rolling import DESK
from tiny import timeless
from toy_envs import Counter

from opd_agents import envs
from opd_agents.config import load_config
from opd_agents.errors import CheckpointError, ConfigError, UnknownName, UserError
from opd_agents.evaluation import contestants, evaluate, load_suite, play
from opd_agents.evaluation.contestants import load_contestant
from opd_agents.evaluation.rates import wilson
from opd_agents.evaluation.suites import SUITES
from opd_agents.policies.models import save_checkpoint
from opd_agents.starting import check_inputs


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
    assert expert["spent"].keys() == {"seconds"} and student["spent"]["flops"] > 0
    assert [row["difference"] for row in result["comparisons"]] == [chance["success"] - 1, -1.0]
    assert result["how"]["policies"][run]["checkpoint"] == str(checkpoint)
    tasks = [json.loads(line)["trajectory"]["task"] for line in lines]
    assert tasks == [{"id": str(i), "split": "test"} for i in range(4)]  # four tasks, one sample each


def test_evaluation_is_reproducible_and_seeded(suite, checkpoint):
    policies = [str(checkpoint), "random"]
    once = timeless(evaluate(suite(), policies, limit=3))
    assert timeless(evaluate(suite(), policies, limit=3)) == once
    assert timeless(evaluate(suite(), policies, limit=3, seed=1))["policies"] != once["policies"]
    assert timeless(evaluate(suite(), policies, limit=3, concurrency=2))["policies"][1] == once["policies"][1]


def test_failed_episodes_are_counted(suite):
    path = suite("environments: [{id: tests/Failing-v0, tasks: 6}]")
    (row,) = evaluate(path, ["random"])["policies"]
    assert (row["episodes"], row["errors"]) == (6, 2)


def test_an_expert_that_is_not_there_is_refused_and_does_not_count_as_failing(suite):
    both = suite("environments: [{id: opd_agents/OrderDesk-v0, tasks: 2}, {id: tests/Counting-v0, tasks: 2}]")
    with pytest.raises(ConfigError, match="No scripted expert in tests/Counting-v0, so"):
        evaluate(both, ["random", "expert"])
    with pytest.raises(ConfigError, match="No scripted expert"):
        play("tests/Counting-v0", "expert")
    assert evaluate(both, ["random"])["policies"][0]["episodes"] == 4


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


def test_a_suite_says_which_tasks_and_how_often(suite):
    text = """
samples: 3
environments:
  - {id: opd_agents/OrderDesk-v0, tasks: [5, "0"], options: {level: easy}}
  - {id: tests/Counting-v0, tasks: 1, split: train}
"""
    loaded = load_suite(suite(text))
    once, thrice = (loaded.episodes("test", None, 0, samples) for samples in (1, 3))
    told = [(e.env_id, e.task.id, e.task.split) for e in once]
    assert told == [(DESK, "5", "test"), ("tests/Counting-v0", "0", "train"), (DESK, "0", "test")]
    assert thrice[::3] == once  # the first samples are those of one each
    assert len({(e.seed, e.stream) for e in thrice}) == len({e.uid for e in thrice}) == 9
    (row,) = evaluate(suite(text), ["random"])["policies"]
    assert (row["tasks"], row["episodes"], list(row["pass_at"])) == (3, 9, ["1", "2", "3"])
    (row,) = evaluate(suite(text), ["random"], limit=2)["policies"]
    assert (row["tasks"], row["episodes"]) == (2, 2)
    (row,) = evaluate(suite(text), ["random"], limit=2, samples=2)["policies"]
    assert (row["tasks"], row["episodes"]) == (2, 4)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("{id: tests/Counting-v0, tasks: [9999999]}", "there is no task 9999999"),
        ("{id: tests/Counting-v0, tasks: [1, 1]}", "stands twice"),
        ("{id: tests/Counting-v0, tasks: []}", "environments.0.tasks"),
        ("{id: tests/Counting-v0, split: trian}", "'train'"),
    ],
)
def test_tasks_that_are_not_there_are_refused(suite, environment, message):
    with pytest.raises(UserError, match=message):
        evaluate(suite(f"environments: [{environment}]"), ["random"])


def test_training_cannot_reach_test_tasks_through_a_suite(suite):
    loaded = load_suite(suite("environments: [{id: tests/Counting-v0, split: test}]"))
    with pytest.raises(ConfigError, match="`test`, which is for `opd-agents evaluate` alone"):
        loaded.episodes("validation", None, 0)
    assert loaded.episodes("test", 1, 0)


def test_every_shipped_suite_can_be_read():
    names = [e.name.removesuffix(".yaml") for e in SUITES.iterdir() if e.name.endswith(".yaml")]
    suites = {name: load_suite(name) for name in names}
    assert set(suites) >= {
        *("orderdesk", "lockchain", "codefix", "humaneval_multiturn", "shop", "miniwob", "babyai", "smoke"),
        *("bfcl_multiturn", "bfcl_single", "scienceworld", "textworld", "reasoning_gym"),
    }
    known = set(envs.list_envs())
    for name, one in suites.items():
        assert one.title and {e.id for e in one.environments} <= known, name
        assert len(one.labels()) == len(one.environments), name


def test_the_expert_solves_the_smoke_suite_and_it_takes_seconds():
    result = evaluate("smoke", ["expert"])
    (row,) = result["policies"]
    assert (row["success"], row["errors"], row["tasks"]) == (1.0, 0, 20)
    assert row["spent"]["seconds"] < 20 and len(row["by"]["environment"]) == 5


def test_a_folder_of_seeds_stands_for_its_runs(suite, checkpoint, tmp_path):
    for seed in (0, 2):
        shutil.copytree(checkpoint.parent.parent, tmp_path / "x" / f"seed-{seed}")
    result = evaluate(suite(), ["expert", str(tmp_path / "x")], limit=2, gates=["success >= baseline - 1"])
    assert [row["policy"] for row in result["policies"]] == [
        "expert", f"{tmp_path}/x/seed-0", f"{tmp_path}/x/seed-2"
    ]  # fmt: skip
    (row,) = result["seeds"]
    assert (row["seeds"], row["success"]["mean"]) == ([0, 2], 0.0)
    assert [gate["passed"] for gate in result["gates"]] == [True] and len(result["comparisons"]) == 2


def test_who_played_is_told_without_a_password(checkpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:secret@models.example/v1")
    assert contestants.identity("api:m", contestants.DEFAULT) == {
        "kind": "api", "model": "m", "base_url": "https://models.example/v1"
    }  # fmt: skip
    one, other = (
        contestants.identity(str(p), contestants.DEFAULT) for p in (checkpoint, checkpoint.parent.parent)
    )
    assert one == other and one["weights"]


class Served:
    """Answers as a vLLM server of ``model`` does, the most probable tokens."""

    place = "sampler"

    def __init__(self, model):
        self.model = model

    def complete(self, bodies, keys):
        return [self._choice(body) for body in bodies]

    @torch.inference_mode()
    def _choice(self, body):
        ids = list(body["prompt"])
        for _ in range(body["max_tokens"]):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in body["stop_token_ids"]:
                break
        new = ids[len(body["prompt"]) :]
        return {"token_ids": new, "logprobs": {"token_logprobs": [-1.0] * len(new)}, "finish_reason": "stop"}


def test_models_act_on_vllm_as_they_do_here(suite, checkpoint, student, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(contestants, "_completes", lambda *given: asked.append(given) or Served(student))
    for sampler in ("transformers", "vllm"):
        evaluate(suite(), [str(checkpoint)], limit=2, sampler=sampler, out=tmp_path / sampler)
    here, there = (
        [json.loads(line)["trajectory"] for line in next(folder.glob("*.greedy.jsonl")).open()]
        for folder in (tmp_path / "transformers", tmp_path / "vllm")
    )
    assert [t["action_ids"] for one in here for t in one["turns"]] == [
        t["action_ids"] for one in there for t in one["turns"]
    ]  # fmt: skip
    [(path, _, vllm)] = asked
    assert path == str(checkpoint) and (vllm.urls, vllm.max_tokens) == ((), 60)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "vlm"}, "transformers or vllm"),
        ({"servers": ["http://127.0.0.1:1"]}, "add --sampler vllm"),
        ({"sampler": "vllm", "servers": ["here"]}, "no address"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_samplers_that_cannot_be_are_refused(suite, checkpoint, given, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(suite(), [str(checkpoint)], **given)
