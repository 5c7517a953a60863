"""One training step at size: tokens per second and model FLOPs utilisation, part by part.

    python benchmarks/gpu.py [--episodes 16 --tokens 4096 --micro-batch-tokens 16384] [--tiny]

A student and a teacher of Qwen3-0.6B's shape with random weights in bfloat16, on the GPU where there is one:
the teacher scores every episode, the student too, then one update with a full-vocabulary reverse KL and a
policy component, float32 masters and gradient checkpointing. The episodes are random ids, a quarter of them
actions. Utilisation is model FLOPs over the peak of the device's data sheet: nothing that is computed twice
counts twice, and a head counts for the tokens that are projected. Each part is timed whole, synchronised at
its ends. `--tiny` shrinks the model, to try the program on a CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from figures import as_text, markdown, spread
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd_agents.batch import Packed, pack
from opd_agents.composition import Composed
from opd_agents.config import Distill, Policy, RewardPart
from opd_agents.experience import Assigned, Experience
from opd_agents.frozen import frozen_terms
from opd_agents.loss import micro_losses, plan
from opd_agents.optimizers import ModelOptimizer
from opd_agents.policies.models import forward_flops, head, hidden_states, local_device
from opd_agents.policies.recomputation import prepare_recomputation, recomputed
from opd_agents.teachers import HiddenStates, TeacherSignal
from opd_agents.types import Actor, Outcome, StopReason, Task, Trajectory, Turn

SHAPE = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}  # fmt: skip
TINY = SHAPE | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
COMPONENTS = {
    "distill": Distill(kind="distill", ratio_clip=2.0),
    "policy": Policy(kind="policy", rewards={"verifier": RewardPart()}),
}
TURNS = 8
# Dense bfloat16 TFLOP/s of the data sheets, by a part of the device's name.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}


class Bench:
    """A student, a teacher, and episodes of ``tokens`` tokens each."""

    def __init__(self, shape: Mapping[str, Any], episodes: int, tokens: int, micro_batch_tokens: int) -> None:
        self.micro_batch_tokens = micro_batch_tokens
        self.student, self.teacher = _model(shape, 0), _model(shape, 1).requires_grad_(False)
        prepare_recomputation(self.student)
        self.optimizer = ModelOptimizer(self.student, "adamw", 0.0)
        self.trajectories = [_trajectory(shape["vocab_size"], tokens, seed) for seed in range(episodes)]
        self.packed: Packed = pack(self.trajectories)

    def step(self) -> dict[str, float]:
        """Seconds of each part of one step; asserts that it has changed something by finite amounts."""
        signal, teacher = _timed(self._signal)
        signals: dict[str, TeacherSignal] = {"teacher": signal}
        frozen, student = _timed(
            lambda: frozen_terms(self.student, self.packed, signals, 1.0, self.micro_batch_tokens)
        )
        kl = frozen.references["teacher"].kl
        assert kl is not None and bool(kl.isfinite().all())
        every = torch.ones(len(self.packed.target), dtype=torch.bool)
        experience = Experience(tuple(self.trajectories), self.packed, signals, {}, frozen, every)
        norm, update = _timed(lambda: self._update(experience))
        assert 0 < norm < float("inf")
        return {"teacher scores": teacher, "student scores": student, "update": update}

    @torch.no_grad()
    def _signal(self) -> HiddenStates:
        size = (len(self.packed.target), self.teacher.config.hidden_size)
        hidden = torch.empty(size, dtype=self.teacher.dtype, device=self.teacher.device)
        for micro in self.packed.micro_batches(self.micro_batch_tokens):
            hidden[micro.tokens] = hidden_states(self.teacher, micro.ids)[micro.row, micro.column]
        return HiddenStates(hidden, head(self.teacher))

    def _update(self, experience: Experience) -> float:
        """The norm of the gradient."""
        packed, every = self.packed, experience.owned
        advantage = torch.linspace(-1, 1, len(self.trajectories))[packed.episode]
        tokens, ones = dict.fromkeys(COMPONENTS, every), dict.fromkeys(COMPONENTS, every.float())
        assigned = Assigned(
            dict.fromkeys(COMPONENTS, 1.0), tokens, ones, {"policy": Composed(advantage, {}, {})}, []
        )
        planned = plan(experience, COMPONENTS, assigned, every, float, 1.0, experience.frozen.logprob)
        for micro in packed.micro_batches(self.micro_batch_tokens, planned.keep):
            with recomputed(self.student):
                parts = micro_losses(self.student, packed, micro, planned, experience.signals, 1.0)
            torch.stack(list(parts.values())).sum().backward()
            self.optimizer.collect()
        norm = self.optimizer.clip(1.0)
        self.optimizer.step(1e-6)
        return norm

    def flops(self) -> dict[str, int]:
        """Model FLOPs of each part. Comparing with the teacher needs its logits of the actions as well."""
        tokens, weights = self.packed.n_tokens, self.student.get_output_embeddings().weight.numel()
        layers = forward_flops(self.student, tokens, len(self.packed.rows[0]) / 2) - 2 * tokens * weights
        logits = 2 * len(self.packed.target) * weights
        scored = layers + logits
        return {"teacher scores": layers, "student scores": scored + logits, "update": 3 * scored + logits}


def _model(shape: Mapping[str, Any], seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model("qwen3", **shape)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().to(local_device())


def _trajectory(vocabulary: int, tokens: int, seed: int) -> Trajectory:
    ids = torch.randint(vocabulary, (TURNS, tokens // TURNS), generator=torch.Generator().manual_seed(seed))
    split = 3 * ids.shape[1] // 4
    turns = tuple(
        Turn(
            context_ids=tuple(row[:split]), action_ids=tuple(row[split:]), logprobs=None, actor=Actor.STUDENT,
            policy_version=0, text="", action="", observation="", reward=0.0, terminated=False,
            truncated=False, stop_reason=StopReason.END, state_digest="",
        )
        for row in ids.tolist()
    )  # fmt: skip
    return Trajectory(str(seed), "random", {}, seed, Task(str(seed), "train"), turns, Outcome.SUCCESS, 1.0)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    _synchronise()
    started = time.perf_counter()
    result = function()
    _synchronise()
    return result, time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    shape: Mapping[str, Any], episodes: int, tokens: int, micro_batch_tokens: int, repeats: int, peak: float
) -> dict[str, Any]:
    """Every part over ``repeats`` steps after one for warming up; ``peak`` in TFLOP/s, 0 where unknown."""
    bench, cuda = Bench(shape, episodes, tokens, micro_batch_tokens), torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    peak = peak or next((value for name, value in PEAKS.items() if name in device), 0.0)
    steps = [bench.step() for _ in range(repeats + 1)][1:]
    flops, rows = bench.flops(), []
    for part in [*flops, "whole step"]:
        taken = [sum(step.values()) if part == "whole step" else step[part] for step in steps]
        work = sum(flops.values()) if part == "whole step" else flops[part]
        rate = work / median(taken) / 1e12
        rows.append({
            "part": part, "seconds": spread(taken),
            "tokens_per_second": bench.packed.n_tokens / median(taken), "tflop": work / 1e12,
            "tflop_per_second": rate, "utilisation": rate / peak if peak else None,
        })  # fmt: skip
    return {
        "device": device, "peak TFLOP/s": peak or None,
        "memory GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "parameters": bench.student.num_parameters(), "episodes": episodes, "tokens an episode": tokens,
        "action tokens": len(bench.packed.target), "micro-batch tokens": micro_batch_tokens,
        "repeats": repeats, "torch": torch.__version__, "transformers": transformers.__version__,
        "rows": rows,
    }  # fmt: skip


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    table = [
        {
            "part": row["part"], "seconds": as_text(row["seconds"], digits=3),
            "tokens/s": f"{row['tokens_per_second']:.0f}", "model TFLOP": f"{row['tflop']:.4g}",
            "TFLOP/s": f"{row['tflop_per_second']:.4g}",
            "utilisation": "unknown" if row["utilisation"] is None else f"{row['utilisation']:.1%}",
        }
        for row in result["rows"]
    ]  # fmt: skip
    return markdown("Median (min to max).", result, table)


def main(
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of a step.")] = 16,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of an episode.")] = 4096,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="Of a forward pass.")] = 16384,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 5,
    peak: Annotated[float, typer.Option(help="bfloat16 TFLOP/s of the device, if it is not known.")] = 0.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model: to try the program.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="A Markdown file to write.")] = None,
) -> None:
    """Tokens per second and model FLOPs utilisation of one training step of a 0.6B model."""
    result = measure(TINY if tiny else SHAPE, episodes, tokens, micro_batch_tokens, repeats, peak)
    text = page(result)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    print(json.dumps(result, indent=1) if as_json else text, end="")


if __name__ == "__main__":
    typer.run(main)
