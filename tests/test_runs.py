"""Run folders: what is refused, and that nothing finished is lost to a crash or a full disk."""

import contextlib
import errno
import itertools
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_agents.errors import CheckpointError, RunFolderError
from opd_agents.runs import RunFolder, latest_checkpoint, save_trajectories

CONFIG = {"name": "x", "trainer": {"steps": 5, "flops": None}, "output": "a"}


def opened(path: Path) -> RunFolder:
    return RunFolder(path, CONFIG, resume=False)


def write(text: str) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        (folder / "model").write_text(text)
        (folder / "nested").mkdir()
        (folder / "nested" / "more").write_text(text)

    return into


def names(folder: RunFolder) -> list[str]:
    """Everything in checkpoints/, leftovers included."""
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


# ---- which folders are taken ----


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "run").log({"step": 1})
    with pytest.raises(RunFolderError, match="--resume"):
        opened(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_a_run_that_was_refused_when_it_began_is_none(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    RunFolder(tmp_path / "run", CONFIG | {"seed": 7}, resume=False)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["seed"] == 7


def test_a_foreign_folder_or_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="not empty"):
            RunFolder(tmp_path, CONFIG, resume=resume)
        with pytest.raises(RunFolderError, match="is a file"):
            RunFolder(tmp_path / "thesis.tex", CONFIG, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_what_does_not_exist_starts_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        RunFolder(tmp_path / name, CONFIG, resume=True)
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text()) == CONFIG


def test_resuming_with_another_config_names_the_keys(tmp_path: Path) -> None:
    opened(tmp_path / "run").log({"step": 1})
    changed = {"name": "x", "trainer": {"steps": 6, "flops": None}, "output": "a", "seed": 1}
    with pytest.raises(RunFolderError, match=r"seed: None -> 1, trainer\.steps: 5 -> 6"):
        RunFolder(tmp_path / "run", changed, resume=True)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == CONFIG
    RunFolder(tmp_path / "run", CONFIG | {"output": "b"}, resume=True)  # a run may be moved


def test_a_kill_while_the_folder_is_made_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in ("replace", "mkdir"):
        run = tmp_path / call
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{call}", dies)
            with pytest.raises(KeyboardInterrupt):
                opened(run)
        RunFolder(run, CONFIG, resume=True)
        assert (run / "trajectories").is_dir()


def test_stages_keep_their_order(tmp_path: Path) -> None:
    stages = {"warm": {"steps": 1}, "cool": {"steps": 2}}
    run = RunFolder(tmp_path, {"name": "x", "stages": stages}, resume=False)
    assert list(yaml.safe_load((run.path / "config.yaml").read_text())["stages"]) == ["warm", "cool"]
    for name in stages:
        opened(tmp_path / name).save_checkpoint(3, write(name), keep_last=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "cool/checkpoints/step-3"


# ---- metrics and trajectories ----


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    opened(tmp_path).log({"step": 1, "loss": float("nan"), "x": float("inf"), "y": 0.5, "z": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "x": None, "y": 0.5, "z": None}
    assert text.endswith("\n")


def test_truncating_forgets_later_steps_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step})
        save_trajectories(tmp_path, f"step-{step:06d}", [{"n": step}])
    save_trajectories(tmp_path, "eval-student", [{"n": 0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.truncate(9)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    run.truncate(2)
    run.log({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    left = sorted(path.name for path in (tmp_path / "trajectories").iterdir())
    assert left == ["eval-student.jsonl", "step-000001.jsonl", "step-000002.jsonl"]


def test_truncating_a_run_without_metrics(tmp_path: Path) -> None:
    opened(tmp_path).truncate(0)
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- checkpoints ----


def test_the_last_checkpoints_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for step in (8, 9, 10, 11):
        run.save_checkpoint(step, write(str(step)), keep_last=2)
    assert [path.name for path in run.checkpoints()] == ["step-10", "step-11"]
    assert names(run) == ["step-10", "step-11"]
    assert latest_checkpoint(tmp_path).name == "step-11"


def dies(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), OSError(errno.ENOSPC, "full")])
def test_a_failure_while_writing_leaves_the_older_checkpoints(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("of it")
        raise error

    run = opened(tmp_path)
    run.save_checkpoint(1, write("1"), keep_last=1)
    with pytest.raises(type(error)) as caught:
        run.save_checkpoint(2, fail, keep_last=1)
    assert caught.value is error
    assert names(run) == ["step-1"]


CALLS = ("os.fsync", "os.mkdir", "os.replace", "os.unlink", "shutil.rmtree")


def kill_at(patch: pytest.MonkeyPatch, call: str, n: int) -> list[str]:
    """The n-th ``call`` does not happen, and nothing after it; returns the calls as they are made."""
    made: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        module, function = name.split(".")
        original = getattr(sys.modules[module], function)

        def checked(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if made.count(call) >= n:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return checked

    for name in CALLS:
        patch.setattr(name, wrapped(name))
    return made


@pytest.mark.parametrize("call", CALLS)
def test_wherever_a_kill_falls_checkpoints_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for n in itertools.count(1):
        run = opened(tmp_path / str(n))
        run.save_checkpoint(1, write("1"), keep_last=1)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            made = kill_at(patch, call, n)
            run.save_checkpoint(2, write("2"), keep_last=1)
        assert run.checkpoints()
        for checkpoint in run.checkpoints():
            text = checkpoint.name.removeprefix("step-")
            assert (checkpoint / "model").read_text() == (checkpoint / "nested/more").read_text() == text
        resumed = RunFolder(run.path, CONFIG, resume=True)
        resumed.truncate(1)
        resumed.save_checkpoint(2, write("2"), keep_last=1)
        assert names(resumed) == ["step-2"]
        if made.count(call) < n:  # it was not killed any more
            assert n > 2
            break


def test_a_checkpoint_that_exists_is_not_taken_away(tmp_path: Path) -> None:
    run = opened(tmp_path)
    first = run.save_checkpoint(1, write("1"), keep_last=1)
    assert run.save_checkpoint(1, write("2"), keep_last=1) == first
    assert (first / "model").read_text() == "1"


def test_all_files_and_folders_are_on_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        events.append(f"rename {new.name}")
        replace(old, new)

    run = opened(tmp_path)
    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", renamed)
    run.save_checkpoint(1, write("1"), keep_last=1)
    assert sorted(events[:4]) == [".partial-step-1", "model", "more", "nested"]
    assert events[4:] == ["rename step-1", "checkpoints"]


def test_where_no_checkpoint_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        latest_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither"):
        latest_checkpoint(tmp_path)
    (tmp_path / "config.json").touch()
    assert latest_checkpoint(tmp_path) == tmp_path


# ---- a full disk ----


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KiB: libraries really fail to write, as on a full disk. Around single calls
    only, since it also holds for the file that the test runner's output may go to."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_what_libraries_say_of_a_failed_write_is_an_os_error(tmp_path: Path, library: str) -> None:
    import torch
    from safetensors.torch import save_file

    def save(folder: Path) -> None:
        tensors = {"a": torch.zeros(10_000)}
        if library == "safetensors":
            save_file(tensors, folder / "model.safetensors")
        with (folder / "optimizer.pt").open("wb") as file:
            torch.save(tensors, file)

    run = opened(tmp_path)
    run.save_checkpoint(1, write("1"), keep_last=1)
    with small_files(), pytest.raises(OSError, match="File too large") as caught:
        run.save_checkpoint(2, save, keep_last=1)
    assert caught.value.errno == errno.EFBIG
    assert names(run) == ["step-1"]


def test_a_full_disk_as_safetensors_tells_it(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as caught:
        opened(tmp_path).save_checkpoint(1, save, keep_last=1)
    assert caught.value.errno == errno.ENOSPC
