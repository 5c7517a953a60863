"""benchmarks/exposure_bias.py: its chain against the environment, its teacher, its student, its rule."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_agents import envs
from opd_agents.batch import pack
from opd_agents.chat import Chat
from opd_agents.envs.lockchain import KEY_OF, KEYS, LockChain
from opd_agents.episode import Episode, Limits
from opd_agents.policies.models import build_model, load_chat, load_tokenizer
from opd_agents.rollout import rollout
from opd_agents.types import Task, Trajectory

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import exposure_bias
import exposure_bias_results as results
from exposure_bias_chain import SIGNS, Rates, constant, expected_cost, read_chains, slope
from exposure_bias_teacher import KeyTeacher
from sweep import load_sweep


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("words")
    exposure_bias.write_words(folder)
    settings = {"system": "", "kwargs": {"include_tools": False}}
    return load_chat(str(folder), load_tokenizer(str(folder)), settings)


def teacher(chat: Chat, **options: Any) -> KeyTeacher:
    return KeyTeacher(None, chat, dtype="float32", temperature=1.0, **options)


def played(chat: Chat, policy: Any) -> list[Trajectory]:
    options = {"horizon": 8, "recovery": 2, "spare": 0}
    episodes = [
        Episode(
            uid=str(task), env_id="opd_agents/LockChain-v0", seed=task, task=Task(str(task), "train"),
            stream=(0, 0, task), env_kwargs=options,
        )
        for task in range(6)
    ]  # fmt: skip
    return rollout(episodes, policy, make=envs.launch, chat=chat, limits=Limits(), temperature=1.0)


def keyed(rates: Rates, task: int, random: np.random.Generator, **options: Any) -> int:
    """The cost of one episode of a policy with these rates."""
    env = LockChain(horizon=8, spare=0, **options)
    told, _ = env.reset(seed=0, options={"split": "test", "task_id": str(task)})
    sign, opened = "", 0.0
    while not env.over:
        shown = told.split()[-1] in SIGNS  # else an error message, which tells no sign
        sign = told.split()[-1] if shown else sign
        right = KEY_OF[sign]
        wrong = next(key for key in KEYS if key != right)
        edges = np.cumsum([share[int(not shown), SIGNS.index(sign)] for share in rates])
        key = [right, wrong, None][int(np.searchsorted(edges, random.random(), "right"))]
        call = json.dumps({"name": "turn_key", "arguments": {"key": key}}) if key else "hm"
        told, reward, *_ = env.step(call)
        opened += reward
    return round(8 * (1 - opened))


@pytest.mark.parametrize("options", [{"recovery": 1}, {"recovery": 2}, {"irreversible": True}])
def test_the_chain_is_the_environment(options: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    right = random.uniform([[0.5], [0.0]], [[1.0], [0.3]], (2, len(SIGNS)))
    rates = Rates(right, 0.7 * (1 - right))
    costs = [keyed(rates, task, random, **options) for _ in range(2) for task in range(100)]
    off = np.mean(costs) - expected_cost(rates, read_chains(8, **options))
    assert abs(off) < 4 * np.std(costs) / len(costs) ** 0.5
    assert np.std(costs) > 1


@pytest.mark.parametrize("recovery", [1, 2, 4])
def test_a_wrong_first_key_costs_its_turn_and_the_way_back(recovery: int) -> None:
    knows, guesses = constant(0.0, 1.0), constant(0.0, 1 / 8)
    chains = read_chains(16, recovery)
    assert expected_cost(knows, chains) == 0
    assert expected_cost(knows, chains, wrong_first=True) == pytest.approx(recovery + 1)
    assert expected_cost(guesses, chains, wrong_first=True) > recovery + 2
    assert expected_cost(knows, read_chains(16, irreversible=True), wrong_first=True) == pytest.approx(16)


def test_closed_forms_are_those_of_the_prediction() -> None:
    def of(off_track: float, **options: Any) -> float:
        rates = constant(0.001, off_track)
        costs = [expected_cost(rates, read_chains(horizon, **options)) for horizon in (8, 16, 32, 64, 128)]
        return round(slope(costs), 2)

    assert [of(1 / 8, recovery=1), of(0.999, irreversible=True)] == [1.29, 1.95]


def test_the_teacher_reads_the_sign_from_the_conversation(chat: Chat) -> None:
    scorer = teacher(chat, delta=0.02, acts_at_random=True)
    trajectories = played(chat, scorer)
    packed = pack(trajectories)
    signal = scorer.score(packed, 1000)
    probability = signal.head(signal.hidden).exp()
    assert torch.allclose(probability.sum(-1), torch.ones(len(probability)), atol=1e-5)
    keys = torch.tensor([chat.token_id(key) for key in KEYS])
    of_keys = probability[torch.isin(packed.target, keys)][:, keys]
    told = [m.content for t in trajectories for m in t.messages if m.role == "user"]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    shown = [
        text.split()[-1]
        for trajectory, first in zip(trajectories, told, strict=True)
        for text in (first, *(turn.observation for turn in trajectory.turns[:-1]))
    ]
    expected = torch.full((len(turns), 8), 0.02 / 7)
    expected[torch.arange(len(turns)), [KEYS.index(KEY_OF[sign]) for sign in shown]] = 0.98
    assert torch.allclose(of_keys, expected, atol=1e-5)
    assert any("jam" in turn.observation for turn in turns)
    assert scorer.score(pack([]), 1000).hidden.shape == (0, probability.shape[1])  # a step without repairs
    others = probability[~torch.isin(packed.target, keys)]
    said = packed.target[~torch.isin(packed.target, keys)]
    assert float(others[torch.arange(len(said)), said].min()) > 0.99999  # the form of a call is certain


def test_the_teacher_acts(chat: Chat) -> None:
    assert all(episode.reward == 1 for episode in played(chat, teacher(chat, delta=0.5).greedy))
    rewards = [e.reward for e in played(chat, teacher(chat, delta=0.0, acts_at_random=True))]
    assert 0 <= np.mean(rewards) < 0.3
    assert 0.3 < np.mean([e.reward for e in played(chat, teacher(chat, delta=0.05))]) < 1


def test_runs_load_and_the_student_sees_one_sign(chat: Chat) -> None:
    sweep, cells = load_sweep(exposure_bias.HERE / "exposure_bias.yaml")
    runs = {run for trained in exposure_bias.ARMS.values() for run in trained.values()}
    assert runs == set(sweep.runs) and len(cells) == 5 * len(runs)
    students = [cell.config.student.model for cell in cells if cell.label != "cold_start"]
    assert all(Path(str(student)).is_absolute() for student in students)  # a resumed run has the same config
    build = next(cell for cell in cells if cell.label == "cold_start").config.student.build
    assert build is not None
    model = build_model(build.model_type, build.config, chat.tokenizer, 0)
    call = chat.encode_action(exposure_bias._call("a"))
    key = call.index(chat.token_id("a"))

    def before_key(*signs: str) -> torch.Tensor:
        ids = [id for sign in signs for id in (*chat._encode(f"<|im_start|>tool\nlock {sign}<|im_end|>"),)]
        ids += chat._encode("<|im_start|>assistant\n") + call[:key]
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1]

    assert torch.allclose(before_key("ant", "bear"), before_key("crow", "deer", "bear"), atol=1e-5)
    assert not torch.allclose(before_key("ant", "bear"), before_key("ant", "deer"), atol=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "near", "end"),
    [
        (1.8, 2.2, 2.0, "reproduced"), (1.6, 2.0, 2.0, "undecided"), (1.2, 1.7, 2.0, "contradicted"),
        (2.3, 2.4, 2.0, "contradicted"), (0.6, 0.7, None, "reproduced"), (0.4, 0.7, None, "undecided"),
        (0.1, 0.4, None, "contradicted"),
    ],
)  # fmt: skip
def test_how_a_claim_ends(low: float, high: float, near: float | None, end: str) -> None:
    assert results.verdict(low, high, near) == end


def test_intervals_are_over_seeds_and_differences_paired() -> None:
    figures = {"slope": 0.0, "excess_slope": 0.0, "off_closed_form": 0.0}
    points = [
        {"arm": arm, "setting": setting, "seed": seed} | figures | {"slope": base + seed}
        for arm, base in zip(results.COLOURS, (2.0, 2.0, 1.5, 1.0, 1.0), strict=True)
        for setting in ("recovery 1", "recovery 4", "irreversible")
        for seed in range(5)
    ]
    found = results.judge(points)
    assert found["3"]["interval"] == pytest.approx([1.0, 1.0]) and found["3"]["end"] == "reproduced"
    half = 2.776 * np.std(range(5), ddof=1) / 5**0.5
    assert found["1"]["interval"] == pytest.approx([4 - half, 4 + half], abs=1e-3)


def test_the_committed_figures_belong_together() -> None:
    kept = json.loads((exposure_bias.HERE / "results" / "exposure_bias.json").read_text())
    found = results.judge(kept["points"])
    assert {n: one["end"] for n, one in found.items()} == {n: one["end"] for n, one in kept["claims"].items()}
    for arm, told in kept["slopes"].items():
        slopes = results.of_seeds(kept["points"], arm, "recovery 4", "slope")
        assert told["seeds"] == len(slopes) and told["interval"] == pytest.approx(results.interval(slopes))
