"""A program for test_resume: trains a config in child processes that are killed, until one finishes.

``killing.py CONFIG.yaml KILL ...``, where each KILL is ``time:STEP:SECONDS`` (that long after the metrics
hold STEP steps), or ``before:CALL:TEXT`` or ``after:CALL:TEXT`` (at a call of, for example, ``os.replace``
with TEXT in its arguments). torch is imported once; each child is a fork that trains or resumes, and dies by
SIGKILL.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_agents import trainer
from opd_agents.config import RunConfig, load_config


def run(config: RunConfig, kill: str | None) -> int:
    """Train or resume in a child; its wait status."""
    child = os.fork()
    if child == 0:
        if kill and not kill.startswith("time:"):
            die_at(*kill.split(":"))
        trainer.train(config, resume=True)
        os._exit(0)
    if kill and kill.startswith("time:"):
        _, step, seconds = kill.split(":")
        wait_for_step(config.folder / "metrics.jsonl", int(step), child)
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def wait_for_step(metrics: Path, step: int, child: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if step == 0 or (metrics.is_file() and len(metrics.read_bytes().splitlines()) >= step):
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError(f"no step {step} after a minute")


def die_at(when: str, call: str, text: str) -> None:
    """Replace ``module.function`` by one that kills this process at a call with ``text`` in its arguments."""
    module, name = call.split(".")
    original: Callable[..., Any] = getattr(sys.modules[module], name)

    def deadly(*arguments: Any, **options: Any) -> Any:
        if when == "after":
            original(*arguments, **options)
        if text in " ".join(map(str, arguments)):
            os.kill(os.getpid(), signal.SIGKILL)
        return None if when == "after" else original(*arguments, **options)

    setattr(sys.modules[module], name, deadly)


if __name__ == "__main__":
    loaded = load_config(sys.argv[1])
    for kill in sys.argv[2:]:
        print("killed" if run(loaded, kill) == signal.SIGKILL else "not killed", flush=True)
    print("finished" if run(loaded, None) == 0 else "failed", flush=True)
