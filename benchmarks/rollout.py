"""Episodes per second of rollouts, against re-prefilling the history at every turn, and against TRL.

    python benchmarks/rollout.py [--batch 1 --batch 32 --batch 128] [--repeats 5] [--threads 1] [--json]

Three arms on the same tasks with the same model of the quickstart student's shape: `TransformersSampler` with
its key-value cache kept across turns; without; and TRL's `GRPOTrainer(environment_factory=...)` with the
generation of transformers, up to its scored batch. The model's weights are set so that it always writes the
same action (scripted.py): first all arms must give the same tokens, and what they feed is counted. Then they
are timed, alternating.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from figures import as_text, markdown, spread, write
from scripted import Queue, TrlQueue, action_length, episodes, recited, rows, scripted_model

from opd_agents.chat import Chat
from opd_agents.config import load_config
from opd_agents.episode import Limits
from opd_agents.policies.reader import common_length
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.rollout import rollout
from opd_agents.types import Actor, Trajectory

TURNS = (4, 8, 16)
ARMS = ("kept", "re-prefilled", "TRL")


class Bench:
    """The model, its chat and the texts of the queue."""

    def __init__(self) -> None:
        self.texts = recited()
        self.chat = Chat(self.texts.tokenizer)
        build = load_config("quickstart").model_dump()["student"]["build"]
        fields = build["config"] | {"max_position_embeddings": 8192}
        self.model = scripted_model(self.texts.tokenizer, **fields)
        self.action_tokens = action_length(self.texts.tokenizer)
        self._trainers: dict[tuple[int, int], Any] = {}

    def play(self, batch: int, turns: int, arm: str) -> list[list[int]]:
        """One rollout of ``batch`` episodes; all ids of each after the prompt."""
        if arm == "TRL":
            return self._play_trl(batch, turns)
        sampler = TransformersSampler(
            self.model, self.chat.end_ids, actor=Actor.STUDENT, temperature=1.0, reuse=arm == "kept"
        )
        played = rollout(
            episodes("queue", batch), sampler, chat=self.chat, limits=Limits(max_context_tokens=8192),
            temperature=1.0, make=lambda env_id: Queue(self.texts, turns),
        )  # fmt: skip
        return [_after_prompt(trajectory) for trajectory in played]

    def _play_trl(self, batch: int, turns: int) -> list[list[int]]:
        trainer = self._trainers.setdefault((batch, turns), self._trainer(batch, turns))
        scored = trainer._generate_and_score_completions(rows(self.texts, batch))
        pairs = zip(scored["completion_ids"], scored["completion_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in pairs]

    def _trainer(self, batch: int, turns: int) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, num_generations=batch,
            max_completion_length=8192, max_tool_calling_iterations=turns - 1, temperature=1.0, top_k=0,
            beta=0.0, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        return GRPOTrainer(
            model=self.model, args=settings, train_dataset=Dataset.from_list(rows(self.texts, batch)),
            processing_class=self.texts.tokenizer, environment_factory=lambda: TrlQueue(self.texts),
        )  # fmt: skip

    def check(self, batch: int, turns: int) -> dict[str, dict[str, float]]:
        """Tokens per episode of each arm; asserts that all give the same, and that one feeds each once."""
        counts, ids, fed = {}, {}, list[int]()  # fed: by each forward pass
        hook = self.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for arm in ARMS:
            fed.clear()
            ids[arm] = self.play(batch, turns, arm)
            decoded = turns * (self.action_tokens - 1)  # an action's last token is fed with what follows it
            counts[arm] = {"prefilled": sum(fed) / batch - decoded, "fed": sum(fed) / batch}
        hook.remove()
        assert ids["kept"] == ids["re-prefilled"], "the cache changes tokens"
        assert ids["kept"] == ids["TRL"], "TRL gave other tokens"
        prompts = self._prompts(batch)
        shared = common_length(prompts) if batch > 1 else 0  # system prompt and tools, fed once
        history = len(prompts[0]) + len(ids["kept"][0]) - 1  # nothing follows the last token
        assert counts["kept"]["fed"] * batch == shared + batch * (history - shared)
        return counts

    def _prompts(self, batch: int) -> list[list[int]]:
        return [
            self.texts.tokenizer.apply_chat_template(
                row["prompt"], tools=[TrlQueue(self.texts).next_order], add_generation_prompt=True,
                return_dict=False,
            )
            for row in rows(self.texts, batch)
        ]  # fmt: skip

    def seconds(self, batch: int, turns: int, repeats: int) -> dict[str, list[float]]:
        """Of each repeat of each arm, alternating; the arm that begins changes too."""
        taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for repeat in range(repeats + 1):
            for arm in ARMS[:: -1 if repeat % 2 else 1]:
                started = time.perf_counter()
                self.play(batch, turns, arm)
                taken[arm].append(time.perf_counter() - started)
        return {arm: values[1:] for arm, values in taken.items()}  # the first was for warming up


def _after_prompt(trajectory: Trajectory) -> list[int]:
    ids = [i for turn in trajectory.turns for i in (*turn.context_ids, *turn.action_ids)]
    return ids[len(trajectory.turns[0].context_ids) :]


def measure(batches: Sequence[int], turns: Sequence[int], repeats: int) -> dict[str, Any]:
    """All cases; asserts that the tokens fed grow linearly with the turns if the cache is kept."""
    load, bench, table = os.getloadavg()[0], Bench(), []
    for batch in batches:
        counted = {n: bench.check(batch, n) for n in turns}
        # on log-log scales: at most 1 where linear in the turns, for the prompt is fed once
        slopes: dict[str, float] = {}
        for arm in ARMS:
            growth = counted[turns[-1]][arm]["fed"] / counted[turns[0]][arm]["fed"]
            slopes[arm] = math.log(growth, turns[-1] / turns[0])
        assert slopes["kept"] <= 1 < slopes["re-prefilled"], slopes
        for n in turns:
            taken = bench.seconds(batch, n, repeats)
            for arm in ARMS:
                ratios = [b / a for a, b in zip(taken["kept"], taken[arm], strict=True)]
                rate = spread([batch / seconds for seconds in taken[arm]])
                row = {"batch": batch, "turns": n, "arm": arm, "episodes_per_second": rate, **counted[n][arm]}
                row |= {"tokens_per_second": rate["median"] * n * bench.action_tokens, "slope": slopes[arm]}
                table.append(row | ({} if arm == "kept" else {"kept_is_faster": spread(ratios)}))
    return {
        "parameters": bench.model.num_parameters(), "action tokens": bench.action_tokens, "repeats": repeats,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "load before": round(load, 2), "load after": round(os.getloadavg()[0], 2), "rows": table,
    }  # fmt: skip


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    table = [
        {
            "batch": str(row["batch"]), "turns": str(row["turns"]), "arm": row["arm"],
            "episodes/s": as_text(row["episodes_per_second"]), "tokens/s": f"{row['tokens_per_second']:.0f}",
            "kept is faster": as_text(row["kept_is_faster"]) if "kept_is_faster" in row else "",
            "prefilled": f"{row['prefilled']:.0f}", "fed": f"{row['fed']:.0f}",
            "slope": f"{row['slope']:.2f}",
        }
        for row in result["rows"]
    ]  # fmt: skip
    return markdown("Median (min to max). Prefilled and fed: tokens an episode.", result, table)


def main(
    batch: Annotated[list[int], typer.Option(min=1, help="Episodes in lock-step; repeatable.")] = [32],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Timed rollouts of each arm.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Where rollout.json and rollout.md go.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Episodes and tokens per second with and without the cache kept, and of TRL, at 4, 8 and 16 turns."""
    torch.set_num_threads(threads)
    result = measure(batch, TURNS, repeats)
    write(out, "rollout", result, page(result), as_json)


if __name__ == "__main__":
    typer.run(main)
