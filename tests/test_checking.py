"""`opd-agents check`: planted faults are each found and named, and a sound run passes."""

import dataclasses
import json
import shutil
import socket
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import yaml
from api_server import ApiServer
from torch import Tensor
from typer.testing import CliRunner

from opd_agents import experience, student
from opd_agents.batch import Packed
from opd_agents.checking import StageCheck, check
from opd_agents.cli import app
from opd_agents.config import RunConfig, load_config
from opd_agents.errors import AlignmentError, ConfigError
from opd_agents.policies.models import load_tokenizer
from opd_agents.runs import latest_checkpoint
from opd_agents.teachers import Capability, SampledLogprobs
from opd_agents.teachers.local import LocalTeacher
from opd_agents.trainer import train

HERE = "test_checking"
ON_POLICY = {"kind": "policy", "references": {"teacher": {}}, "clip_low": None, "clip_high": None}


def ids_before(packed: Packed) -> Tensor:
    """The id that stands before each action token."""
    return torch.stack([packed.rows[r][p - 1] for r, p in zip(packed.row, packed.position, strict=True)])


class Sampled(LocalTeacher):
    """Tells log-probs of the action tokens, as a server does."""

    can: ClassVar = frozenset({Capability.SAMPLED_LOGPROBS, Capability.ACT})
    sharpness = 1.0

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> SampledLogprobs:
        signal = super().score(packed, max_tokens, keep)
        logprobs = torch.log_softmax(signal.head(signal.hidden).float() * self.sharpness, -1)
        return SampledLogprobs(self.told(logprobs.gather(1, packed.target[:, None]).squeeze(1)))

    def told(self, logprobs: Tensor) -> Tensor:
        return logprobs


class Shifted(Sampled):
    def told(self, logprobs: Tensor) -> Tensor:
        return logprobs.roll(-1)


class Truncated(Sampled):
    def told(self, logprobs: Tensor) -> Tensor:
        return logprobs[:-1]


class LeftOut(Sampled):
    def told(self, logprobs: Tensor) -> Tensor:
        return torch.zeros_like(logprobs)


class Nucleus(Sampled):
    """Of a server that cut unlikely tokens off before it normalised."""

    def told(self, logprobs: Tensor) -> Tensor:
        return logprobs.masked_fill(logprobs < -1.0, float("-inf"))


class Greedy(Sampled):
    sharpness = 1e4


class Unnormalised(Sampled):
    def told(self, logprobs: Tensor) -> Tensor:
        return logprobs + 20.0


class Deaf(Sampled):
    """Sees the token before, and none of the history."""

    def score(self, packed: Packed, max_tokens: int, keep: Tensor | None = None) -> SampledLogprobs:
        before = ids_before(packed)
        with torch.no_grad():
            logits = self.model(before[:, None]).logits[:, 0]
        return SampledLogprobs(torch.log_softmax(logits, -1).gather(1, packed.target[:, None]).squeeze(1))


def run(tmp_path: Path, teacher: Path, /, *overrides: str, **changes: Any) -> RunConfig:
    plain: dict[str, Any] = {"correction": None, "loss": {"components": {"distill": ON_POLICY}}}
    return tiny.mix(tmp_path / "run", teacher, *overrides, **(plain | changes))


def failed(stages: list[StageCheck]) -> dict[str, str]:
    return {f.about: f.says for stage in stages for f in stage.findings if f.passed is False}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("Shifted", "log-probs of tokens before it: they are shifted"),
        ("Truncated", "log-probs for"),
        ("LeftOut", "every log-prob is exactly 0"),
        ("Nucleus", "no finite log-prob"),
        ("Greedy", "at a temperature near 0"),
        ("Unnormalised", "values above 0, which no log-prob has"),
        ("Deaf", "does not see the student's history"),
    ],
)
def test_a_teacher_that_scores_something_else_is_found_and_named(
    kind: str, says: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    config = run(tmp_path, tiny_teacher, teacher={"kind": f"{HERE}:{kind}", "model": str(tiny_teacher)})
    found = failed(check(config))
    assert list(found) == ["teacher"] and says in found["teacher"]
    with pytest.raises(AlignmentError, match="teacher"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_sound_teachers_pass(tmp_path: Path, tiny_teacher: Path) -> None:
    served = {"kind": f"{HERE}:Sampled", "model": str(tiny_teacher)}
    for config in (run(tmp_path, tiny_teacher, teacher=served), tiny.mix(tmp_path / "run", tiny_teacher)):
        [stage] = check(config)
        assert stage.passed and failed([stage]) == {}
        assert {"inputs", "history", "teacher", "sampler", "memory"} <= {f.about for f in stage.findings}
        assert stage.memory["student"] > 0 and 0 < stage.seconds["step"] < stage.seconds["run"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["tokenizer", "template"])
def test_a_teacher_of_another_tokenizer_or_template(fault: str, tmp_path: Path, tiny_teacher: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(latest_checkpoint(tiny_teacher), other)
    tokenizer = load_tokenizer(str(other))
    if fault == "tokenizer":
        tokenizer.add_tokens(["something"])
    else:
        tokenizer.chat_template = "{{ '!' }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(other)
    found = failed(check(run(tmp_path, tiny_teacher, teacher={"model": str(other)})))
    words = {"tokenizer": "another vocabulary", "template": "another chat template"}
    assert words[fault] in found["inputs"]


def test_a_shifted_mask(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(trajectories: Any) -> Packed:
        packed = original(trajectories)
        target = ids_before(packed)
        return dataclasses.replace(packed, position=packed.position - 1, target=target)

    original = experience.pack
    monkeypatch.setattr(experience, "pack", shifted)
    found = failed(check(run(tmp_path, tiny_teacher)))
    assert "the weights or the tokens differ" in found["step"]


def test_a_sampler_at_another_temperature(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hotter(*arguments: Any, temperature: float, **settings: Any) -> Any:
        return original(*arguments, temperature=1.3 * temperature, **settings)

    original = student.TransformersSampler
    monkeypatch.setattr(student, "TransformersSampler", hotter)
    found = failed(check(run(tmp_path, tiny_teacher)))
    assert "the temperature" in found["step"]


def test_a_loss_without_a_gradient(tmp_path: Path, tiny_teacher: Path) -> None:
    nothing = {"components": {"imitate": {"kind": "ce", "select": {"outcome": "error"}}}}
    found = failed(check(run(tmp_path, tiny_teacher, loss=nothing, teacher=None)))
    assert "the gradient is zero" in found["loss"]


def test_a_run_that_ends_by_its_validation_passes(tmp_path: Path, tiny_teacher: Path) -> None:
    ends = {"steps": 4, "until": [{"metric": "eval/success", "above": 0.99}]}
    evaluation = {"suite": tiny.SUITE, "limit": 3, "every": 2}
    config = run(tmp_path, tiny_teacher, trainer=ends, evaluation=evaluation)
    (found,) = check(config, rollouts=0)
    assert found.passed, found.findings
    assert not list(tmp_path.glob("run*"))


def test_train_can_be_told_not_to_look(tmp_path: Path, tiny_teacher: Path) -> None:
    config = run(
        tmp_path, tiny_teacher, "trainer.steps=1",
        teacher={"kind": f"{HERE}:Shifted", "model": str(tiny_teacher)},
    )  # fmt: skip
    assert len(tiny.metrics(train(config, probes=False))) == 1


def test_what_probes_spend_is_not_the_training_s(tmp_path: Path, tiny_teacher: Path) -> None:
    rows = [
        tiny.metrics(train(run(tmp_path / str(probes), tiny_teacher, "trainer.steps=1"), probes=probes))
        for probes in (True, False)
    ]
    assert tiny.timeless(rows[0]) == tiny.timeless(rows[1])


@pytest.mark.parametrize(("teacher", "code"), [("Sampled", 0), ("Deaf", 1)])
def test_the_command(teacher: str, code: int, tmp_path: Path, tiny_teacher: Path) -> None:
    file, kind = tmp_path / "run.yaml", f"{HERE}:{teacher}"
    config = run(tmp_path, tiny_teacher, teacher={"kind": kind, "model": str(tiny_teacher)})
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = CliRunner().invoke(app, ["check", str(file), "--json"])
    [stage] = json.loads(done.stdout)
    assert done.exit_code == code and stage["passed"] == (code == 0)
    shown = CliRunner().invoke(app, ["check", str(file)])
    assert shown.exit_code == code and ("FAILED" in shown.stdout) == (code == 1) and "history" in shown.stdout


def test_every_stage_is_looked_at(tmp_path: Path) -> None:
    config = load_config("quickstart", f"output={tmp_path / 'run'}")
    stages = check(config, episodes=8)
    assert [stage.name for stage in stages] == ["cold_start", "opd"] and all(s.passed for s in stages)


def taught_by_api(tmp_path: Path, url: str, key: str | None = "PLANTED_KEY") -> RunConfig:
    teacher = {"kind": "api", "model": "m", "endpoint": {"base_url": url, "key": key}}
    shown = {"episodes_per_step": 8, "source": "teacher", **tiny.LIMITS}
    return load_config(tiny.sft(tmp_path / "run", teacher=teacher, rollout=shown))


def test_an_endpoint_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_KEY", "sk-planted")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/v1"  # nobody listens
    found = failed(check(taught_by_api(tmp_path, closed)))
    for words in (closed, "cannot be reached", "PLANTED_KEY", "`endpoint.base_url`", "OPENAI_BASE_URL"):
        assert words in found["teacher"]
    assert list(found) == ["teacher"] and "sk-planted" not in found["teacher"]
    with pytest.raises(ConfigError, match="cannot be reached"):
        train(taught_by_api(tmp_path, closed))
    monkeypatch.delenv("PLANTED_KEY")
    assert "PLANTED_KEY is not set" in failed(check(taught_by_api(tmp_path, closed)))["inputs"]


def test_an_endpoint_that_refuses_the_key_and_one_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_KEY", "sk-planted")
    with ApiServer(lambda body: "yes, sir", key="sk-other") as server:
        found = failed(check(taught_by_api(tmp_path, server.url)))
        assert list(found) == [
            "teacher"
        ] and "refuses the key in the environment variable PLANTED_KEY" in str(found)
        assert "sk-planted" not in str(found) and not server.bodies  # nothing was paid for
        monkeypatch.setenv("PLANTED_KEY", "sk-other")
        [stage] = check(taught_by_api(tmp_path, server.url))
        assert stage.passed and f"{server.url} answers" in [finding.says for finding in stage.findings]


def test_a_stale_cache(tmp_path: Path, tiny_student: Path, tiny_teacher: Path, tiny_episodes: Path) -> None:
    def cached(of: Path, **changes: Any) -> RunConfig:
        teacher = {"kind": "cached", "cache": str(tmp_path / "cache"), "of": {"model": str(of)}}
        stored = {"source": {"trajectories": str(tiny_episodes)}, "episodes_per_step": 6}
        raw = tiny.sft(
            tmp_path / "run", student={"model": str(tiny_student)}, teacher=teacher, rollout=stored,
            method="lightning_opd", environments=[],
        )  # fmt: skip
        del raw["chat"]
        return load_config(raw | changes)

    assert failed(check(cached(tiny_teacher))) == {}
    found = failed(check(cached(tiny_student)))
    assert list(found) == ["cache"] and "is stale: its log-probs are of other weights" in found["cache"]
    assert str(tmp_path / "cache") in found["cache"] and "remove this one" in found["cache"]
