"""Two processes on the CPU train what one does: losses, gradients, checkpoints, resumed either way."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from api_server import ApiServer, Expert, Oracle
from safetensors.torch import load_file

from opd_agents.batch import pack
from opd_agents.config import RunConfig
from opd_agents.distributed import ALONE, World, join_world
from opd_agents.errors import ConfigError
from opd_agents.runs import checkpoints_in, latest_checkpoint
from opd_agents.sharding import shard
from opd_agents.trainer import train

HERE = Path(__file__).parent
STEPS = 3
ASKING = ("ovd", "sage_opd", "gad")  # methods that ask a model behind an API

pytestmark = pytest.mark.timeout(300)  # processes that import torch, on cores that others use too


def launch(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Two processes that torchrun starts and ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command.append(str(HERE / "ranks.py"))
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPD_DEBUG": "0"}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )


def config(output: Path, teacher: Path, /, *overrides: str, **changes: Any) -> RunConfig:
    """Every part of the trainer takes part, and every step leaves a checkpoint."""
    fixed = (
        f"trainer.steps={STEPS}", "trainer.optimizer=adamw", "trainer.learning_rate=0.0005",
        "trainer.checkpoint_every=1", "trainer.keep_last=3", *overrides,
    )  # fmt: skip
    evaluation = {"suite": tiny.SUITE, "limit": 5, "every": 2}
    return tiny.mix(output, teacher, *fixed, **({"evaluation": evaluation} | changes))


def one_episode(output: Path, teacher: Path, *overrides: str) -> RunConfig:
    """Less than there are ranks, at every place where work is dealt out."""
    parts = ("rollout.episodes_per_step=1", "rollout.group_size=1", *overrides)
    loss = {"components": {"distill": tiny.DISTILL}}
    return config(output, teacher, *parts, loss=loss, correction=None, evaluation=None)


def redrawn(output: Path, teacher: Path, *overrides: str) -> RunConfig:
    """Three groups on two ranks: those of equal rewards are drawn anew, and all get a demonstration; tasks
    are drawn by their pass rates."""
    parts = ("rollout.episodes_per_step=6", "rollout.group_size=2", "rollout.redraws=2", *overrides)
    shown = {"kind": "ce", "select": {"source": "demonstration"}}
    loss = {"components": {"verifier": tiny.POLICY, "shown": shown}}
    more = ("rollout.demonstrations={actor: teacher}", "rollout.curriculum={band: [0.2, 0.8]}")
    return config(output, teacher, *parts, *more, loss=loss, correction=None, evaluation=None)


def beyond(output: Path, teacher: Path, *overrides: str) -> RunConfig:
    """What looks beyond one token: pairs of episodes against a reference, the ratio of an episode, the
    return of later tokens, whitened; in three groups on two ranks. A limit that moves."""
    pairs = {
        "kind": "preference", "form": "dpo", "beta": 0.1, "reference": "start",
        "chosen": {"outcome": "success"}, "rejected": {"outcome": ["failure", "unfinished"]},
    }  # fmt: skip
    returns = {"reference": "start", "discount": 0.9, "length_normalise": True}
    components = {
        "pairs": pairs,
        "sequence": tiny.POLICY | {"ratio": "sequence"},
        "returns": {"kind": "policy", "whiten": True, "references": {"start": returns}},
    }
    limit = "rollout.max_action_tokens={kind: linear, start: 6, end: 16}"
    parts = ("rollout.episodes_per_step=9", "rollout.group_size=3", limit, *overrides)
    return config(
        output, teacher, *parts, loss={"components": components}, references={"start": {"kind": "self"}},
        student={"model": str(latest_checkpoint(teacher))}, teacher=None, correction=None, evaluation=None,
    )  # fmt: skip


def asked(output: Path, teacher: Path, url: str, method: str) -> RunConfig:
    """A method that asks the model at ``url`` to judge, to act, or both."""
    model = {"kind": "api", "model": "m", "endpoint": {"base_url": url, "key": None}}
    given: dict[str, Any] = {"teacher": model}
    if method == "sage_opd":  # its teacher has distributions
        given = {"references": {"judge": model}, "judge": {"by": "judge"}}
    return config(
        output, teacher, "trainer.steps=2", method=method, loss={}, correction=None, evaluation=None, **given
    )


def written(config: RunConfig) -> str:
    file = config.folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return str(file)


def begun(run: Path, output: Path) -> Path:
    """A copy of a run, as it was before its last step."""
    shutil.copytree(run, output)
    (output / "summary.json").unlink()
    shutil.rmtree(checkpoints_in(output)[-1])
    return output


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    expert = Expert("tiny/Parity-v0", {})
    with ApiServer(expert, Oracle(expert)) as server:
        yield server


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, server: ApiServer) -> Path:
    """Every kind of run by one process and by two: ``full-1``, ``full-2`` and so on; ``resumed-2`` was begun
    by one process and ended by two. Starting processes takes longest, so they are started once, and end as
    the last config makes them."""
    root, model = tmp_path_factory.mktemp("runs"), str(latest_checkpoint(tiny_teacher))
    adapted = {"student": {"model": model, "lora": {"rank": 4, "alpha": 8.0}}}
    short = "trainer.steps=2"
    average = {
        "kind": "self",
        "weights": "ema",
        "rate": 0.3,
        "conditioning": {"sources": ["peer", "feedback"]},
    }

    def configs(ranks: int) -> list[RunConfig]:
        muon = ("trainer.optimizer=muon", "trainer.gradient_checkpointing=true", short)
        return [
            config(root / f"full-{ranks}", tiny_teacher),
            config(root / f"lora-{ranks}", tiny_teacher, short, **adapted),
            config(root / f"average-{ranks}", tiny_teacher, short, student={"model": model}, teacher=average),
            one_episode(root / f"one_episode-{ranks}", tiny_teacher, short),
            one_episode(root / f"muon-{ranks}", tiny_teacher, *muon),
            redrawn(root / f"redrawn-{ranks}", tiny_teacher, short),
            beyond(root / f"beyond-{ranks}", tiny_teacher, short),
            *(asked(root / f"{name}-{ranks}", tiny_teacher, server.url, name) for name in ASKING),
        ]

    for alone in configs(1):
        train(alone)
    asked_by_one = server.told.copy()
    begun(root / "full-1", root / "resumed-2")
    resumed = written(config(root / "resumed-2", tiny_teacher)) + "+"
    itself = config(
        root / "itself-2", tiny_teacher, short, **adapted, teacher={"kind": "self"}, evaluation=None
    )
    mistaken = config(root / "mistaken", tiny_teacher, student={"model": str(root / "nothing")})
    failing = config(
        root / "failing", tiny_teacher, imports=["tiny", "failing"],
        environments=[{"id": "failing/OnOneRank-v0"}], evaluation=None,
    )  # fmt: skip
    result = launch(*map(written, configs(2)), resumed, *map(written, (itself, mistaken, failing)))
    told = [dict(counts) for counts in (asked_by_one, server.told - asked_by_one)]
    (root / "told.json").write_text(json.dumps(told))
    (root / "output.txt").write_text(result.stdout)
    (root / "errors.txt").write_text(result.stderr)
    assert result.stdout.count("has checked all") == 2, result.stderr
    (root / "ended.json").write_text(json.dumps([result.returncode, time.time()]))
    return root


def assert_equal(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """All that two runs leave, but for figures of time; FLOPs depend a little on which rows are batched, and
    a quotient of small differences on how they are rounded."""
    for mine, theirs in zip(tiny.metrics(one), tiny.metrics(two), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in tiny.timeless(mine).items():
            loose = 0.02 if "flops" in key else 100 * tolerance if "snr" in key else tolerance
            wanted = pytest.approx(value, rel=loose, abs=tolerance)
            assert theirs[key] == wanted, key
    for checkpoint in ("checkpoints/step-2", f"checkpoints/step-{len(tiny.metrics(one))}", "best"):
        first, second = one / checkpoint, two / checkpoint
        if not first.exists():
            continue
        assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
        weights = "adapter_model" if (first / "adapter_config.json").exists() else "model"
        for name in (f"{weights}.safetensors", "teachers/weights.safetensors"):
            if (first / name).exists():
                files = [load_file(folder / name) for folder in (first, second)]
                torch.testing.assert_close(files[1], files[0], rtol=tolerance, atol=tolerance)
        if checkpoint != "best":
            for state in {"optimizer.pt", "discriminator.pt"} & {file.name for file in first.iterdir()}:
                close(*(torch.load(folder / state) for folder in (first, second)), tolerance)
    for file in (one / "trajectories").iterdir():
        close(rows(file), rows(two / "trajectories" / file.name), tolerance)


def close(one: Any, two: Any, tolerance: float) -> None:
    """Equal in form, and in numbers to ``tolerance``."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            close(one[key], two[key], tolerance)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for mine, theirs in zip(one, two, strict=True):
            close(mine, theirs, tolerance)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    else:
        assert two == (pytest.approx(one, rel=tolerance, abs=tolerance) if type(one) is float else one)


def rows(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["full", "lora", "average", "one_episode", "redrawn", "beyond", *ASKING])
def test_two_processes_train_as_one(runs: Path, kind: str) -> None:
    assert_equal(runs / f"{kind}-1", runs / f"{kind}-2")
    if kind == "full":
        metrics = tiny.metrics(runs / "full-2")
        assert sum(row["correction/proposed"] for row in metrics) > 0
        assert sum(row["groups/nonzero"] for row in metrics) > 0
        assert [row for row in metrics if row.get("grad_share/verifier")]
    if kind == "beyond":
        norms = [row for row in tiny.metrics(runs / "beyond-2") if "grad_norm/pairs" in row]
        assert norms and all(row["grad_norm/pairs"] > 0 and row["grad_norm/sequence"] > 0 for row in norms)
    if kind == "redrawn":
        assert sum(row["groups/redrawn"] for row in tiny.metrics(runs / "redrawn-2")) > 0


def test_two_processes_ask_for_what_one_asks_for(runs: Path) -> None:
    """Judges and teachers behind an API: the same requests, none by both."""
    one, two = json.loads((runs / "told.json").read_text())
    assert one == two and len(one) > 20
    for kind, counted in (("ovd", "judge/asked"), ("sage_opd", "judge/skip"), ("gad", "api/requests")):
        assert all(row[counted] > 0 for row in tiny.metrics(runs / f"{kind}-2")), kind
    assert sum(row["demonstrations/rejected"] for row in tiny.metrics(runs / "ovd-2")) > 0
    first, *_, last = tiny.metrics(runs / "gad-2")
    assert first["discriminator/grad_norm"] > 0 and last["advantage/gad.likeness"] > 0


def test_muon_trains_in_parts(runs: Path) -> None:
    assert_equal(runs / "muon-1", runs / "muon-2", tolerance=2e-3)  # it iterates in bfloat16


def test_the_student_without_its_adapter_teaches_in_two_processes(runs: Path) -> None:
    """Its head is the student's own, which must be there while the student is divided."""
    first, *rest = tiny.metrics(runs / "itself-2")
    assert first["distill/kl"] == pytest.approx(0, abs=1e-6)  # a fresh adapter changes nothing
    assert rest[-1]["distill/kl"] > 0  # the verifier has moved it since


def test_two_processes_end_what_one_began(runs: Path) -> None:
    assert_equal(runs / "full-1", runs / "resumed-2")


def test_one_process_ends_what_two_began(runs: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    run = begun(runs / "full-2", tmp_path / "run")
    train(config(run, tiny_teacher), resume=True)
    assert_equal(runs / "full-1", run)


def test_the_parts_hold_in_both_processes(runs: Path) -> None:
    """Among them: sums of gradients however the model was divided, and refusing what was not."""
    assert len(checked_all(runs)) == 2


def checked_all(runs: Path) -> list[float]:
    """When each rank was through with all but the failure."""
    lines = re.findall(r"rank . has checked all at ([\d.]+)", (runs / "output.txt").read_text())
    return [float(line) for line in lines]


# ---- when something fails ----


def test_a_failure_in_one_process_ends_all_with_its_message(runs: Path) -> None:
    began = max(checked_all(runs))
    code, ended = json.loads((runs / "ended.json").read_text())
    errors = (runs / "errors.txt").read_text()
    assert code != 0
    assert ended - began < 60  # a collective would wait for hours
    assert errors.count("only rank 1 sees this") == 1, errors


def test_a_mistake_in_the_config_leaves_no_run(runs: Path) -> None:
    """Which of the ranks tells it, they have checked."""
    assert checked_all(runs)
    assert not (runs / "mistaken").exists()


# ---- in this process ----


def test_alone_nothing_changes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_world.__wrapped__() is ALONE
    values = torch.rand(3)
    assert ALONE.sum(values) is values
    assert ALONE.shared("abc", list) == ["a", "b", "c"]
    with pytest.raises(KeyError), ALONE.errors_told_once():
        raise KeyError


def test_weights_of_two_dtypes_are_refused(tiny_llama: Any) -> None:
    model = tiny_llama().bfloat16()
    model.model.norm.float()  # as some experts' routers are kept
    with pytest.raises(ConfigError, match=r"bfloat16 and torch\.float32.*student\.lora"):
        shard(model, World(0, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_every_row_has_one_owner_and_ranks_have_equal_loads(sampled: Any, size: int) -> None:
    packed = pack(sampled)
    owned = [World(rank, size).owned(packed) for rank in range(size)]
    assert torch.stack(owned).sum(0).tolist() == [1] * len(packed.target)
    rows = [set(packed.row[mine].tolist()) for mine in owned]
    assert sum(map(len, rows)) == len(packed.rows)
    loads = [sum(len(packed.rows[row]) for row in mine) for mine in rows]
    assert max(loads) - min(loads) <= max(map(len, packed.rows))
