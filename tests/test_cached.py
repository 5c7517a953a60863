"""A teacher asked once: the run is that with the teacher itself; what is stale or incomplete is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_stored import DISTILLED

from opd_agents.batch import pack
from opd_agents.config import load_config
from opd_agents.config.loading import RunConfig
from opd_agents.errors import AlignmentError, CheckpointError, ConfigError
from opd_agents.runs import RunFolder
from opd_agents.starting import load_session
from opd_agents.teachers.cache import Cache
from opd_agents.teachers.cached import CachedTeacher
from opd_agents.trainer import train

REVERSE = {"kind": "distill", "divergence": "reverse_kl", "signal": "teacher_top_k", "k": 4, "tail": "bucket"}


def cached(folder: Path) -> dict[str, Any]:
    return {"kind": "cached", "cache": str(folder / "cache")}


@pytest.fixture
def make(
    tmp_path: Path,
    tiny_student: Path,
    tiny_teacher: Path,
    tiny_episodes: Path,
) -> Callable[..., RunConfig]:
    """A run on the stored episodes with a cached teacher."""

    def made(*overrides: str, run: str = "run", **changes: Any) -> RunConfig:
        raw = {
            "name": "cached", "output": str(tmp_path / run), "imports": ["tiny"],
            "student": {"model": str(tiny_student)},
            "teacher": cached(tmp_path) | {"of": {"model": str(tiny_teacher)}},
            "rollout": {"source": {"trajectories": str(tiny_episodes)}, "episodes_per_step": 6},
            "loss": DISTILLED,
            "trainer": {"steps": 3, "learning_rate": 0.001, "tensorboard": False},
        }  # fmt: skip
        return load_config(raw | changes, *overrides)

    return made


def assert_same_losses(one: Path, other: Path, *, steps: int | None = None) -> None:
    first, second = ([row["loss"] for row in tiny.metrics(run)[:steps]] for run in (one, other))
    assert first == pytest.approx(second, rel=1e-5) and len(first) == (steps or len(first))
    assert max(map(abs, first)) > 1e-3


@pytest.mark.parametrize("component", [DISTILLED["components"]["distill"], REVERSE])
def test_a_run_is_that_with_the_teacher_itself(
    component: dict[str, Any], make: Callable[..., RunConfig], tiny_teacher: Path
) -> None:
    loss = {"components": {"distill": component}}
    cached = train(make(loss=loss))
    live = train(make(loss=loss, run="live", teacher={"model": str(tiny_teacher)}))
    assert_same_losses(cached, live)


def test_lightning_starts_as_its_parent_and_asks_the_teacher_once(
    make: Callable[..., RunConfig], tiny_teacher: Path
) -> None:
    """Every episode is met four times and scored once."""
    lightning = train(make("trainer.steps=8", method="lightning_opd", loss={}))
    live = {"model": str(tiny_teacher)}
    parent = train(
        make(
            "trainer.steps=8",
            "rollout.group_size=1",
            run="live",
            method="thinking_machines",
            loss={},
            teacher=live,
        )
    )
    assert_same_losses(lightning, parent, steps=1)
    spent, paid = (tiny.metrics(run)[-1]["total/teacher_tokens"] for run in (lightning, parent))
    assert paid == 4 * spent > 0
    rows = tiny.metrics(lightning)
    assert rows[0]["total/teacher_tokens"] == spent
    assert rows[-1]["loss"] != rows[0]["loss"]


def test_a_second_run_asks_nobody(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    first = train(make())
    second = train(make(run="second", teacher=cached(tmp_path)))
    assert_same_losses(first, second)
    assert tiny.metrics(second)[-1]["total/teacher_tokens"] == 0


def test_an_interrupted_pass_goes_on(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_agents.teachers.cached.SHARD_EPISODES", 4)
    whole = train(make())
    shards = sorted((tmp_path / "cache").glob("shard-*"))
    assert len(shards) == 3
    shards[1].unlink()
    with pytest.raises(ConfigError, match=r"incomplete: it lacks 4 of 12 episodes\. Name with `of`"):
        train(make(run="other", teacher=cached(tmp_path)))
    again = train(make(run="again"))
    assert_same_losses(whole, again)
    spent = [tiny.metrics(run)[-1]["total/teacher_tokens"] for run in (whole, again)]
    assert 0 < spent[1] < spent[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["chat.system=Answer."], "is stale: its tokens are of another chat"),
        (["teacher.of.dtype=bfloat16"], "is stale: its log-probs are of other weights than `of` has"),
    ],
)
def test_a_stale_cache_is_refused(overrides: list[str], message: str, make: Callable[..., RunConfig]) -> None:
    train(make())
    with pytest.raises((ConfigError, ValueError), match=message):
        train(make(*overrides, run="other"))


def test_another_teacher_than_the_caches_is_refused(
    make: Callable[..., RunConfig],
    tmp_path: Path,
    tiny_student: Path,
) -> None:
    train(make())
    other = cached(tmp_path) | {"of": {"model": str(tiny_student)}}
    with pytest.raises(ConfigError, match="is stale: its log-probs are of other weights"):
        train(make(run="other", teacher=other))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chat", "0" * 64, "is stale: its tokens are of another chat"),
        ("temperature", 0.7, "is at temperature 0.7, rollout.temperature is 1"),
        ("format", 0, "a cache of format 0"),
    ],
)
def test_a_cache_of_other_tokens_is_refused(
    field: str, value: Any, message: str, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    train(make())
    index = tmp_path / "cache" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {field: value}))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        train(make(run="other"))


def test_a_cache_of_fewer_candidates_is_refused(make: Callable[..., RunConfig]) -> None:
    train(make(loss={"components": {"distill": REVERSE}}))
    train(make(run="fewer", loss={"components": {"distill": REVERSE | {"k": 2}}}))
    with pytest.raises(ConfigError, match="holds the teacher's top 4, and the loss needs its top 5"):
        train(make(run="more", loss={"components": {"distill": REVERSE | {"k": 5}}}))


def test_a_broken_shard_is_named(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(make())
    (shard,) = (tmp_path / "cache").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read.*Remove this file"):
        train(make(run="other"))


def test_truncated_log_probs_are_refused(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(make())
    (shard,) = (tmp_path / "cache").glob("shard-*")
    tensors = load_file(shard)
    save_file(tensors | {"logprobs": tensors["logprobs"][:-1].clone()}, shard)
    with pytest.raises(CheckpointError, match="its rows have"):
        train(make(run="other"))


def test_tokens_that_are_not_there_are_not_made_up(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Whatever is changed of an episode, an id or which ids are actions, is another row."""
    config = make()
    train(config)
    session = load_session(config, RunFolder(tmp_path / "other", {}, resume=False))
    assert session.recordings is not None
    teacher, episode = CachedTeacher(Cache(tmp_path / "cache"), 0), next(iter(session.recordings))
    assert bool(teacher.score(pack([episode]), 4096).logprobs.lt(0).all())
    first = episode.turns[0]
    begun = first.context_ids + first.action_ids[:1]
    for changes in (
        {"context_ids": (first.context_ids[0] + 1, *first.context_ids[1:])},
        {"context_ids": begun, "action_ids": first.action_ids[1:], "logprobs": None, "spans": ()},
    ):
        turn = dataclasses.replace(first, **changes)
        packed = pack([dataclasses.replace(episode, turns=(turn, *episode.turns[1:]))])
        with pytest.raises(AlignmentError, match="does not hold these episodes"):
            teacher.score(packed, 4096)
        nothing = torch.zeros(len(packed.target), dtype=torch.bool)
        assert not bool(teacher.score(packed, 4096, nothing).logprobs.any())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"environments": [{"id": "tiny/Parity-v0"}], "rollout": {}},
            "holds what was said of episodes that do not",
        ),
        ({"teacher": {"kind": "cached", "cache": "c", "of": {"model": None}}}, "teacher.of.model missing"),
        (
            {
                "teacher": {
                    "kind": "cached",
                    "cache": "c",
                    "of": {"model": "m", "conditioning": {"sources": ["expert"]}},
                }
            },
            "of.conditioning",
        ),
    ],
)
def test_configs_that_cannot_be_cached(
    changes: dict[str, Any], message: str, make: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_no_cache_and_nobody_to_ask(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="To make a cache, name with `of` the teacher"):
        train(make(teacher={"kind": "cached", "cache": str(tmp_path / "none")}))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_needs_more_than_log_probs_is_refused(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"its full distributions, .*`hidden_states`, but it has"):
        train(make(loss={"components": {"distill": tiny.DISTILL}}))
