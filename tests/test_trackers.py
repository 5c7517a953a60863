"""What TensorBoard, MLflow and Weights & Biases have of a run that died and went on."""

import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import yaml
from test_cli import refused

from opd_agents import starting, trackers, trainer
from opd_agents.config import load_config
from opd_agents.errors import ConfigError

SECRET = "0123456789" * 4
STEPS = [1, 2, 3, 4]


@pytest.fixture
def dies_and_goes_on(tmp_path: Path, dies_after: Any) -> Callable[..., Path]:
    """Trains four steps: it dies in the last, and goes on from the checkpoint of the second."""

    def run(**settings: Any) -> Path:
        raw = tiny.sft(tmp_path / "run")
        raw["trainer"] |= {"steps": 4, "checkpoint_every": 2, **settings}
        with dies_after(3):
            trainer.train(load_config(raw))
        return trainer.train(load_config(raw), resume=True)

    return run


def assert_no_secret(*folders: Path) -> None:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert files and not [file for file in files if SECRET.encode() in file.read_bytes()]


def assert_tensorboard_has_every_step_once(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for row, told in zip(tiny.metrics(run), board.Scalars("loss"), strict=True):
        assert (told.step, told.value) == (row["step"], pytest.approx(row["loss"]))


class Remembers:
    """In place of a tracker of accelerate's: what it was made with and told."""

    made: ClassVar[list["Remembers"]] = []
    tracker = SimpleNamespace(id="w1", info=SimpleNamespace(run_id="m1"))

    def __init__(self, *given: Any, **named: Any) -> None:
        self.named, self.told, self.made_of, self.finished = named, [], None, False
        self.made.append(self)

    def start(self) -> None:
        if os.environ.get("FAILS"):
            raise OSError("No key.")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.made_of = values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def remembers(monkeypatch: pytest.MonkeyPatch) -> type[Remembers]:
    from accelerate import tracking

    for name in ("WandBTracker", "MLflowTracker"):
        monkeypatch.setattr(tracking, name, Remembers)
    monkeypatch.setattr(starting, "check_trackers", lambda names: None)
    monkeypatch.setattr(Remembers, "made", [])
    return Remembers


def test_a_run_goes_on_in_the_runs_of_its_trackers(
    dies_and_goes_on: Callable[..., Path], remembers: type[Remembers], tmp_path: Path
) -> None:
    run = dies_and_goes_on(tensorboard=True, trackers=["wandb", "mlflow"])
    assert_tensorboard_has_every_step_once(run)
    wandb, mlflow, wandb_again, mlflow_again = remembers.made
    assert json.loads((run / trackers.IDS).read_text()) == {"wandb": "w1", "mlflow": "m1"}
    assert "id" not in wandb.named and mlflow.named["run_id"] is None
    assert (wandb_again.named["id"], mlflow_again.named["run_id"]) == ("w1", "m1")
    for first, again in ((wandb, wandb_again), (mlflow, mlflow_again)):
        assert [step for step, _ in first.told] == STEPS[:3] and [step for step, _ in again.told] == STEPS[3:]
        assert first.finished and again.finished
        assert (first.made_of or {})["trainer.steps"] == 4 and again.made_of is None
    assert wandb.told[0][1]["loss/ce"] == mlflow.told[0][1]["loss.ce"] == tiny.metrics(run)[0]["loss/ce"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert trainer.train(load_config(config, "trainer.trackers=[]"), resume=True) == run  # others may be told


def test_a_tracker_that_does_not_begin_is_told(
    remembers: type[Remembers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "1")
    raw = tiny.sft(tmp_path / "run")
    raw["trainer"] |= {"steps": 1, "trackers": ["wandb"]}
    with pytest.raises(ConfigError, match=r"trainer\.trackers: wandb does not begin: No key\. .*WANDB_MODE"):
        trainer.train(load_config(raw))
    assert not list((tmp_path / "run/trajectories").iterdir())


@pytest.mark.slow  # seconds of imports
@pytest.mark.real("mlflow")
def test_mlflow_has_one_run_and_every_step_once(
    dies_and_goes_on: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    run = dies_and_goes_on(trackers=["mlflow"])
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'opd-agents'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((run / trackers.IDS).read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == ("tiny", "FINISHED")
    assert (found.data.params["trainer.steps"], found.data.params["seed"]) == ("4", "0")
    rows = tiny.metrics(run)
    for name in ("loss", "loss/ce"):
        told = client.get_metric_history(found.info.run_id, name.replace("/", "."))
        assert [one.step for one in told] == STEPS
        assert [one.value for one in told] == [row[name] for row in rows]
    assert_no_secret(tmp_path / "store", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert trainer.train(load_config(config, "trainer.trackers=[]"), resume=True) == run  # others may be told


def leveldb(content: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: parts with a checksum, length and kind, none across blocks."""
    place, record = header, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow  # it starts a program of its own, twice
@pytest.mark.real("wandb")
def test_wandb_has_one_run_and_every_step_once(
    dies_and_goes_on: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    from wandb.proto.wandb_internal_pb2 import Record

    run = dies_and_goes_on(trackers=["wandb"])
    known = json.loads((run / trackers.IDS).read_text())["wandb"]
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{known}.wandb"] * 2
    steps = []
    for file in files:
        for data in leveldb(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                steps.append((int(items["_step"]), float(items["loss"])))
    assert steps == [(row["step"], pytest.approx(row["loss"])) for row in tiny.metrics(run)]
    assert_no_secret(run)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "mlflow" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    overrides = ("trainer.trackers=[mlflow]", f"output={tmp_path}/run")
    message = refused("train", "quickstart_opd", "student.model=nowhere", *overrides)
    assert 'trainer.trackers: mlflow is not installed: pip install "opd-agents[mlflow]"' in message
    assert not (tmp_path / "run").exists()
    assert "`trainer.trackers.0`" in refused("train", "quickstart_opd", "trainer.trackers=[tensorflow]")
