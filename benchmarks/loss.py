"""The distillation loss and its gradient, from hidden states, against TRL, Liger and plain PyTorch.

    python benchmarks/loss.py [--vocab 32000] [--action-share 0.25] [--beta 1] [--hidden 256] [--json]

Every contender takes the hidden states of 1,024 positions and the two output projections to the mean
generalised JSD over the action tokens (beta 0: forward KL, 1: reverse KL), forward and backward. Each case
starts a process of each contender, which take turns; losses and gradients must agree before any is measured.
A peer that is not installed is left out, with a line on standard error. Linux, for the memory of a process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
import typer
from figures import as_text, markdown, spread, write
from torch import Tensor

from opd_agents.objectives.fused import fused_divergence

TOLERANCE = 1e-4  # of the loss, relative; of a gradient's entries, relative to the largest
PAGE = 1 / 256  # MiB: the least that can be told


class Case(NamedTuple):
    vocab: int
    action_share: float
    beta: float
    hidden: int
    positions: int
    threads: int


class Inputs(NamedTuple):
    student: Tensor
    """Hidden states [positions, hidden]; like the weight, to be differentiated."""
    student_weight: Tensor
    """[vocab, hidden]"""
    teacher: Tensor
    teacher_weight: Tensor
    action: Tensor
    """bool [positions]"""


Loss: TypeAlias = Callable[[Inputs], Tensor]
Calls: TypeAlias = Generator[dict[str, float], None, None]


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(case.positions, case.hidden, generator=generator) for _ in range(2)]
    # logits with a standard deviation of about 2
    weights = [
        torch.randn(case.vocab, case.hidden, generator=generator).mul_(2 * case.hidden**-0.5)
        for _ in range(2)
    ]
    action = torch.zeros(case.positions, dtype=torch.bool)
    chosen = torch.randperm(case.positions, generator=generator)
    action[chosen[: round(case.action_share * case.positions)]] = True
    return Inputs(hidden[0].requires_grad_(), weights[0].requires_grad_(), hidden[1], weights[1], action)


def trl_gkd(beta: float) -> Loss:
    """What `GKDTrainer.compute_loss` does with the logits of all positions."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(of: Inputs) -> Tensor:
        logits = of.student @ of.student_weight.T
        with torch.no_grad():
            teacher_logits = of.teacher @ of.teacher_weight.T
        labels = torch.where(of.action, 0, -100)
        value: Tensor = GKDTrainer.generalized_jsd_loss(
            logits[None], teacher_logits[None], labels[None], beta=beta
        )
        return value

    return loss


def trl_chunked(beta: float) -> Loss:
    """The loss of TRL's `DistillationTrainer`."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(of: Inputs) -> Tensor:
        value: Tensor = _chunked_divergence_loss(
            of.student[None], of.teacher[None], of.student_weight, of.teacher_weight, of.action[None], beta
        )[0]
        return value

    return loss


def liger(beta: float) -> Loss:
    """As it comes: compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

    def loss(of: Inputs) -> Tensor:
        labels = torch.where(of.action, 0, -100)
        value: Tensor = fused(of.student, of.student_weight, of.teacher, of.teacher_weight, labels)
        return value

    return loss


def naive(beta: float) -> Loss:
    """The definition, on the action tokens' logits."""

    def loss(of: Inputs) -> Tensor:
        log_q = torch.log_softmax(of.student[of.action] @ of.student_weight.T, -1)
        with torch.no_grad():
            log_p = torch.log_softmax(of.teacher[of.action] @ of.teacher_weight.T, -1)
        if beta == 0:
            return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        if beta == 1:
            return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        to_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
        to_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        return beta * to_teacher + (1 - beta) * to_student

    return loss


def opd_agents(beta: float) -> Loss:
    kind: Any = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")

    def loss(of: Inputs) -> Tensor:
        count = int(of.action.sum())
        return fused_divergence(
            of.student[of.action], of.student_weight, of.teacher[of.action], of.teacher_weight,
            weights=torch.full((count,), 1 / count), kind=kind, beta=beta,
        ).loss  # fmt: skip

    return loss


CONTENDERS: Mapping[str, Callable[[float], Loss]] = {
    "trl_gkd": trl_gkd, "trl_chunked": trl_chunked, "liger": liger, "naive": naive, "opd_agents": opd_agents,
}  # fmt: skip
PACKAGES = {"trl_gkd": "trl", "trl_chunked": "trl", "liger": "liger_kernel"}


def installed() -> list[str]:
    """The contenders that can run; a line on standard error for each that cannot."""
    missing = {
        name: package for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None
    }
    for name, package in missing.items():
        print(f"{name} is left out: {package} is not installed", file=sys.stderr)
    return [name for name in CONTENDERS if name not in missing]


def resident(key: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def calls(name: str, case: Case, gradients: Path) -> Calls:
    """What one contender needs for each call after the first, which puts its loss and gradients (that of the
    weight times a random vector) into the file ``gradients``. The memory is what it holds at most beyond its
    inputs and what libraries keep."""
    inputs, loss_of = make_inputs(case), CONTENDERS[name](case.beta)

    def call() -> Tensor:
        inputs.student.grad = inputs.student_weight.grad = None
        loss = loss_of(inputs)
        loss.backward()
        return loss.detach()

    loss, vector = call(), torch.randn(case.hidden, generator=torch.Generator().manual_seed(1))
    assert inputs.student.grad is not None and inputs.student_weight.grad is not None
    torch.save((loss, inputs.student.grad, inputs.student_weight.grad @ vector), gradients)
    inputs.student.grad = inputs.student_weight.grad = None
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed, but kept for the calls to come, would not count
    before = resident("VmRSS")
    yield {}
    while True:
        call()  # after the others' turns a process finds its memory cold
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        yield {"seconds": seconds, "peak_mb": max(resident("VmHWM") - before, PAGE)}


def process(name: str, case: Case, gradients: Path) -> Calls:
    """:func:`calls` in a process of its own, one for each line that it is sent."""
    command = [sys.executable, __file__, "--worker", json.dumps([name, case, str(gradients)])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None and running.stdout is not None
        while True:
            print("next", file=running.stdin, flush=True)
            answer = running.stdout.readline()
            if not answer:
                raise RuntimeError(f"{name} ended at {case}")
            yield json.loads(answer)


def worker(name: str, case: Case, gradients: Path) -> None:
    torch.set_num_threads(case.threads)
    answers, standard_output = calls(name, case, gradients), os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    with os.fdopen(standard_output, "w") as out:
        for _ in sys.stdin:
            print(json.dumps(next(answers)), file=out, flush=True)


def assert_equal(files: Mapping[str, Path]) -> None:
    """All losses and gradients are those of the plain definition."""
    expected = torch.load(files["naive"])
    for name, file in files.items():
        for what, mine, right in zip(("loss", "hidden", "weight"), torch.load(file), expected, strict=True):
            gap = float((mine - right).abs().max() / right.abs().max())
            assert gap < TOLERANCE, f"{name}: {what} is off by {gap:.1e}"


def measure(
    case: Case, names: Sequence[str], repeats: int, start: Callable[[str, Case, Path], Calls] = process
) -> list[dict[str, Any]]:
    """A row for each contender; their calls alternate."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {name: stack.enter_context(closing(start(name, case, folder / name))) for name in names}
        for one in running.values():
            next(one)
        assert_equal({name: folder / name for name in names})
        rounds = [{name: next(one) for name, one in running.items()} for _ in range(repeats)]
    return [row(case, name, rounds) for name in names]


def row(case: Case, name: str, rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    seconds = [one[name]["seconds"] for one in rounds]
    peaks = [one[name]["peak_mb"] for one in rounds]
    ours = [one["opd_agents"] for one in rounds]
    return {
        "name": name,
        **case._asdict(),
        "seconds": median(seconds),
        "peak_mb": median(peaks),
        "seconds_spread": spread(seconds),
        "peak_mb_spread": spread(peaks),
        "seconds_over_ours": spread([a / b["seconds"] for a, b in zip(seconds, ours, strict=True)]),
        "peak_over_ours": spread([a / b["peak_mb"] for a, b in zip(peaks, ours, strict=True)]),
    }


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    table = [
        {
            "V, H, share, beta": "{vocab} {hidden} {action_share:.0%} {beta:g}".format(**row),
            "arm": row["name"],
            "seconds": as_text(row["seconds_spread"]),
            "times ours": as_text(row["seconds_over_ours"], digits=1),
            "peak, MiB": as_text(row["peak_mb_spread"], digits=0),
            "peaks ours": f"{row['peak_over_ours']['median']:.1f}",
        }
        for row in result["results"]
    ]
    about = "V entries, H wide, the share of action tokens; median (min to max) over calls with backward."
    return markdown(about, result, table)


def main(
    vocab: Annotated[list[int], typer.Option(min=2, help="Entries; repeatable, as the next.")] = [  # noqa: B006
        32_000,
        152_000,
    ],
    action_share: Annotated[list[float], typer.Option(min=0, max=1, help="Of the positions.")] = [  # noqa: B006
        0.1,
        0.25,
        1.0,
    ],
    beta: Annotated[list[float], typer.Option(min=0, max=1, help="0 forward KL, 1 reverse KL.")] = [  # noqa: B006
        0.0,
        0.5,
        1.0,
    ],
    hidden: Annotated[list[int], typer.Option(min=1, help="Width of the hidden states.")] = [256],  # noqa: B006
    positions: Annotated[int, typer.Option(min=1, help="Rows of hidden states.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each contender.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Where loss.json and loss.md go.")] = Path("benchmarks/results"),
    call: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Seconds and peak memory of the distillation loss with its gradient, and of its peers'."""
    if call is not None:
        name, case, gradients = json.loads(call)
        worker(name, Case(*case), Path(gradients))
        return
    cases = [Case(*at, positions, threads) for at in product(vocab, action_share, beta, hidden)]
    names, load = installed(), os.getloadavg()[0]
    result = {
        "positions": positions, "repeats": repeats, "torch": torch.__version__, "threads": threads,
        "cores": os.cpu_count(), "load before": round(load, 2),
        "results": [row for case in cases for row in measure(case, names, repeats)],
        "load after": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    write(out, "loss", result, page(result), as_json)


if __name__ == "__main__":
    typer.run(main)
