"""Rollouts with the key-value cache kept across turns, against re-prefilling the history at every turn.

    python benchmarks/rollout.py [--batch 1 --batch 32 --batch 128] [--repeats 5] [--threads 1] [--json]

Both arms are `TransformersSampler` on the same episodes, with a model of the quickstart student's shape and
random weights. First both play every case in float64, where rounding decides no draw, and must give the same
tokens; what they feed is counted. Then they are timed in float32, alternating.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, median_low
from typing import Annotated, Any, ClassVar

import rich.box
import torch
import typer
from rich.console import Console
from rich.table import Table

from opd_agents import envs
from opd_agents.chat import Chat, build_word_tokenizer
from opd_agents.config import load_config
from opd_agents.policies import ExpertPolicy
from opd_agents.policies.models import build_model
from opd_agents.policies.sampler import TransformersSampler
from opd_agents.rollout import Episode, Limits, rollout
from opd_agents.types import Actor, Task, Trajectory

TURNS = (4, 8, 16)
ACTION_TOKENS, NO_END = 16, frozenset({-1})  # no token ends an action, so all have the same length
ARMS = {"kept": True, "re-prefilled": False}  # what `reuse` is


class Recited(envs.AgentEnv):
    """Says what an OrderDesk said to its expert, whatever is answered, for exactly ``turns`` turns."""

    fork_mode: ClassVar = "none"

    def __init__(self, turns: int, prompts: Sequence[str], observations: Sequence[str]) -> None:
        super().__init__([])
        self.split_sizes, self.max_turns = {"train": 1_000_000}, turns
        self.prompts, self.observations = prompts, observations

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return super().step("-")  # what random tokens look like, a text or a broken call, must not matter

    def begin(self, task: Task) -> str:
        return self.prompts[int(task.id) % len(self.prompts)]

    def on_text(self, text: str) -> str:
        return self.observations[(7 * int(self.task.id) + self.turn) % len(self.observations)]

    def success(self) -> bool:
        return False

    def digest_text(self) -> str:
        return str(self.turn)


class Bench:
    """The model, its chat, and what the environment recites: real texts, each kind all of its median length
    in tokens, so that the number of turns alone decides how many tokens there are."""

    def __init__(self) -> None:
        desk = _episodes("opd_agents/OrderDesk-v0", 64, level="hard")
        expert = rollout(desk, ExpertPolicy(), make=envs.make, chat=None, limits=Limits(), temperature=1.0)
        prompts = [t.messages[-1].content for t in expert]
        observations = [turn.observation for t in expert for turn in t.turns[:-1]]
        actions = [turn.action for t in expert for turn in t.turns]
        tokenizer = build_word_tokenizer([*prompts, *observations, *actions])

        def of_one_length(texts: Sequence[str]) -> list[str]:
            typical = median_low(lengths := [len(tokenizer.encode(text)) for text in texts])
            return [text for text, length in zip(texts, lengths, strict=True) if length == typical]

        self.prompts, self.observations = of_one_length(prompts), of_one_length(observations)
        self.chat = Chat(tokenizer, system="", kwargs={"include_tools": False})
        build = load_config("quickstart").model_dump()["student"]["build"]
        fields = build["config"] | {"max_position_embeddings": 4096}
        self.model = build_model(build["model_type"], fields, tokenizer, seed=0)

    def play(self, batch: int, turns: int, reuse: bool) -> list[Trajectory]:
        sampler = TransformersSampler(self.model, NO_END, actor=Actor.STUDENT, temperature=1.0, reuse=reuse)
        return rollout(
            _episodes("recited", batch), sampler, chat=self.chat, limits=Limits(ACTION_TOKENS),
            temperature=1.0, make=lambda env_id: Recited(turns, self.prompts, self.observations),
        )  # fmt: skip

    def check(self, batch: int, turns: int) -> dict[str, dict[str, float]]:
        """Tokens per episode of each arm; asserts that both give the same, and that one feeds each once."""
        counts, ids, fed = {}, {}, list[int]()  # fed: by each forward pass
        hook = self.model.double().base_model.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for arm, reuse in ARMS.items():
            fed.clear()
            played = self.play(batch, turns, reuse)
            ids[arm] = [[turn.action_ids for turn in t.turns] for t in played]
            decoded = turns * (ACTION_TOKENS - 1)  # an action's last token is fed with what follows it
            counts[arm] = {"prefilled": sum(fed) / batch - decoded, "fed": sum(fed) / batch}
        hook.remove()
        self.model.float()
        assert ids["kept"] == ids["re-prefilled"], "the arms gave different tokens"
        assert all(len(t) == turns and {len(action) for action in t} == {ACTION_TOKENS} for t in ids["kept"])
        history = sum(len(turn.context_ids) + ACTION_TOKENS for turn in played[0].turns)
        assert counts["kept"]["fed"] == history - 1  # nothing follows the last token
        return counts

    def seconds(self, batch: int, turns: int, repeats: int) -> dict[str, list[float]]:
        """Of each repeat of each arm, alternating; the arm that begins alternates too."""
        taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for repeat in range(repeats + 1):
            for arm, reuse in list(ARMS.items())[:: -1 if repeat % 2 else 1]:
                started = time.perf_counter()
                self.play(batch, turns, reuse)
                taken[arm].append(time.perf_counter() - started)
        return {arm: values[1:] for arm, values in taken.items()}  # the first was for warming up


def _episodes(env_id: str, n: int, **options: Any) -> list[Episode]:
    tasks = [Task(str(i), "train") for i in range(n)]
    return [Episode(task.id, env_id, i, task, (0, 0, i), options) for i, task in enumerate(tasks)]


def measure(batches: Sequence[int], turns: Sequence[int], repeats: int) -> dict[str, Any]:
    """All cases; asserts that the tokens fed grow linearly with the turns if the cache is kept."""
    load, bench, rows = os.getloadavg()[0], Bench(), []
    for batch in batches:
        counted = {n: bench.check(batch, n) for n in turns}
        slopes = {}  # on log-log scales: at most 1 where linear in the turns, for the prompt is fed once
        for arm in ARMS:
            growth = counted[turns[-1]][arm]["fed"] / counted[turns[0]][arm]["fed"]
            slopes[arm] = math.log(growth, turns[-1] / turns[0])
        assert slopes["kept"] <= 1 < 1.3 < slopes["re-prefilled"], slopes
        for n in turns:
            taken = bench.seconds(batch, n, repeats)
            speed_ups = [b / a for a, b in zip(taken["kept"], taken["re-prefilled"], strict=True)]
            for arm in ARMS:
                rate = _spread([batch / seconds for seconds in taken[arm]])
                row = {"batch": batch, "turns": n, "arm": arm, "episodes_per_second": rate, **counted[n][arm]}
                row |= {"tokens_per_second": rate["median"] * n * ACTION_TOKENS, "slope": slopes[arm]}
                rows.append(row | ({"speed_up": _spread(speed_ups)} if ARMS[arm] else {}))
    return {
        "parameters": bench.model.num_parameters(), "action tokens": ACTION_TOKENS, "repeats": repeats,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "load before": round(load, 2), "load after": round(os.getloadavg()[0], 2), "rows": rows,
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    view = Table(box=rich.box.MARKDOWN)
    columns = ("episodes/s", "tokens/s", "speed-up", "prefilled", "fed", "slope")
    for column in ("batch", "turns", "cache", *columns):
        view.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    text = "{median:.2f} ({min:.2f} to {max:.2f})"
    for row in result["rows"]:
        speed_up = text.format(**row["speed_up"]) if "speed_up" in row else ""
        rates = text.format(**row["episodes_per_second"]), f"{row['tokens_per_second']:.0f}"
        counts = f"{row['prefilled']:.0f}", f"{row['fed']:.0f}", f"{row['slope']:.2f}"
        view.add_row(str(row["batch"]), str(row["turns"]), row["arm"], *rates, speed_up, *counts)
    facts = ", ".join(f"{key} {value}" for key, value in result.items() if key != "rows")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(f"Median (min to max). Prefilled and fed: tokens an episode. One run: {facts}.", view)
    return "\n".join(line.strip() for line in captured.get().strip().splitlines()) + "\n"


def main(
    batch: Annotated[list[int], typer.Option(min=1, help="Episodes in lock-step; repeatable.")] = [32],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Timed rollouts of each arm.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Where rollout.json and rollout.md go.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Episodes and tokens per second of rollouts with and without the cache kept, at 4, 8 and 16 turns."""
    torch.set_num_threads(threads)
    result = measure(batch, TURNS, repeats)
    data, text = json.dumps(result, indent=1) + "\n", page(result)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rollout.json").write_text(data, encoding="utf-8")
    (out / "rollout.md").write_text(text, encoding="utf-8")
    print(data if as_json else text, end="")


if __name__ == "__main__":
    typer.run(main)
