"""Exposure bias on LockChain: what a mistake costs over longer episodes, by whose states were taught.

    python benchmarks/exposure_bias.py [--out benchmarks/results]

Trains the runs of `exposure_bias.yaml` that are not finished (a second call goes on where the first was
stopped), reads every policy's keys off its weights, computes its expected cost at all horizons, holds some of
them against rollouts, and writes exposure_bias.json and .svg; the tables are printed. What was expected, and
when it counts as found, stands in the YAML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import exposure_bias_results as results
import numpy as np
import torch
import typer
from exposure_bias_chain import (
    HORIZONS,
    SIGNS,
    Chains,
    Rates,
    constant,
    expected_cost,
    read_chains,
    slope,
)
from sweep import Cell, load_sweep

from opd_agents import envs
from opd_agents.chat import build_word_tokenizer
from opd_agents.envs.actions import format_calls
from opd_agents.envs.lockchain import KEY_OF, KEYS, LOCK_SIGNS, LockChain
from opd_agents.evaluation.contestants import load_contestant
from opd_agents.evaluation.suites import Suite, SuiteEnvironment, SuiteLimits
from opd_agents.policies.models import build_model, load_chat, load_model, load_tokenizer, save_checkpoint
from opd_agents.rollout import rollout
from opd_agents.runs import latest_checkpoint, write_whole
from opd_agents.trainer import train
from opd_agents.types import Message, ToolCall

HERE = Path(__file__).parent
CHECKED = 128  # the horizon of the rollouts that check the computation
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "recovery 1": {"recovery": 1},
    "recovery 2": {"recovery": 2},
    "recovery 4": {"recovery": 4},
    "irreversible": {"irreversible": True},
}
ARMS: Mapping[str, Mapping[str, str]] = {  # the run of each arm that was trained for a setting
    "cold_start": dict.fromkeys(SETTINGS, "cold_start"),
    "behaviour_cloning": dict.fromkeys(SETTINGS, "cloning"),
    "noise_injected": {"recovery 1": "noise_1", "recovery 2": "noise_2", "recovery 4": "noise_4"},
    "opd": {
        "recovery 1": "opd_1",
        "recovery 2": "opd_2",
        "recovery 4": "opd_4",
        "irreversible": "opd_irreversible",
    },
    "opd_reverse_kl": {"recovery 4": "opd_reverse_kl_4"},
    "verified_correction": {"recovery 4": "verified_4"},
}
GUESSES = ("cold_start", "behaviour_cloning", "verified_correction")  # arms that are taught on the track only


def write_words(folder: Path) -> None:
    """The tokenizer of all students: every sign and every part of a call is a token. With a model that nobody
    uses, as every checkpoint has one."""
    shown = [f"{'lock' if sign in LOCK_SIGNS else 'jam'} {sign}" for sign in SIGNS]
    calls = [f"<tool_call>{_call(key)}</tool_call>" for key in KEYS]
    tokenizer = build_word_tokenizer([*shown, "open", "broken", "Use turn_key.", *calls])
    fields = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    save_checkpoint(folder, build_model("llama", fields, tokenizer, 0), tokenizer, {})


def _call(key: str) -> str:
    return format_calls([ToolCall("turn_key", {"key": key})])


def train_missing(cells: Sequence[Cell]) -> None:
    for cell in cells:
        if not (cell.folder / "summary.json").is_file():
            train(cell.config, resume=True)


@torch.no_grad()
def read_rates(folder: Path) -> Rates:
    """Of the newest checkpoint, behind a first turn. All tokens of a call count; for error messages the mean
    of the two that turns without a key mostly get."""
    path = str(latest_checkpoint(folder))
    tokenizer, model = load_tokenizer(path), load_model(path, "float32")
    chat = load_chat(path, tokenizer)
    calls = [chat.encode_action(_call(key)) for key in KEYS]
    past = chat.prompt_ids([Message("user", f"lock {SIGNS[0]}")], [], "") + calls[0]
    said = [f"{'lock' if sign in LOCK_SIGNS else 'jam'} {sign}" for sign in SIGNS]
    after = [chat.suffix_ids([Message("tool", text)], ended=True) for text in (*said, *_messages())]
    longest = max(map(len, after))
    rows = [past + shown + call + (0,) * (longest - len(shown)) for shown in after for call in calls]
    ids = torch.tensor(rows)
    logprobs = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    starts = [len(past) + len(shown) - 1 for shown in after for _ in calls]
    length = len(calls[0])
    of_calls = [row[start : start + length, 0].sum() for row, start in zip(logprobs, starts, strict=True)]
    keys = torch.stack(of_calls).exp().view(len(after), len(KEYS))  # by what was said before
    shown = torch.stack([keys[: len(SIGNS)], keys[len(SIGNS) :].mean(0).expand(len(SIGNS), -1)])
    right = shown[:, torch.arange(len(SIGNS)), [KEYS.index(KEY_OF[sign]) for sign in SIGNS]]
    return Rates(right.numpy(), (shown.sum(-1) - right).numpy())


def _messages() -> list[str]:
    """What the environment answers to a call that cannot be read, and to one of no key."""
    env = LockChain()
    env.reset(seed=0)
    return [env.step(action)[0] for action in ("<tool_call>{", _call(""))]


@cache
def _chains(setting: str, horizon: int) -> Chains:
    return read_chains(horizon, **SETTINGS[setting])


def figures(rates: Rates, setting: str, guesses: bool) -> dict[str, Any]:
    """Costs at all horizons and their slopes. The closed form is that of a policy with the same error at
    every lock, which in a jam guesses, or errs as it does at locks."""

    def costs(policy: Rates, wrong_first: bool = False) -> list[float]:
        return [expected_cost(policy, _chains(setting, horizon), wrong_first) for horizon in HORIZONS]

    cost = costs(rates)
    excess = [forced - plain for forced, plain in zip(costs(rates, True), cost, strict=True)]
    ideal = constant(rates.error, 1 / len(KEYS) if guesses else 1 - rates.error)
    closed_form = slope(costs(ideal))
    return {
        "error": rates.error,
        "wrong_key": rates.wrong_key,
        "recovers": rates.recovers,
        "cost": cost,
        "excess": excess,
        "slope": slope(cost),  # the error is the same at all horizons
        "excess_slope": slope(excess),
        "closed_form": closed_form,
        "off_closed_form": slope(cost) - closed_form,
    }


def measure(runs: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A point for each arm, setting and seed."""
    points = []
    for arm, trained in ARMS.items():
        for setting, run in trained.items():
            for seed in seeds:
                folder = runs / run / f"seed-{seed}"
                point = {"arm": arm, "setting": setting, "seed": seed, "labels": labels(folder)}
                points.append(point | figures(read_rates(folder), setting, arm in GUESSES))
    return points


def labels(folder: Path) -> int:
    """Turns that the teacher labelled: of whole episodes, or the accepted repairs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if "correction/accepted" in rows[-1]:
        return int(sum(row["correction/accepted"] for row in rows))
    return round(sum(row["rollout/episodes"] * row["rollout/turns"] for row in rows))


def check(runs: Path, arm: str, setting: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Sampled episodes on the test tasks beside the computed cost, per seed: means, and the standard error of
    the episodes' mean over all seeds."""
    options = {"horizon": CHECKED, "spare": 0, **SETTINGS[setting]}
    environment = SuiteEnvironment(id="opd_agents/LockChain-v0", tasks=100, options=options)
    limits = SuiteLimits(max_tokens_per_turn=8, max_context_tokens=4096)
    suite = Suite(name="exposure_bias", environments=[environment], limits=limits)
    played, computed = [], []
    for seed in seeds:
        folder = runs / ARMS[arm][setting] / f"seed-{seed}"
        one = load_contestant(str(folder), 1.0)
        episodes = rollout(
            suite.episodes("test", None, seed), one.sampled, make=envs.launch, chat=one.chat,
            limits=suite.rollout_limits(), temperature=1.0,
        )  # fmt: skip
        played.append([CHECKED * (1 - episode.reward) for episode in episodes])
        computed.append(expected_cost(read_rates(folder), _chains(setting, CHECKED)))
    return {
        "arm": arm, "setting": setting, "horizon": CHECKED, "episodes": sum(map(len, played)),
        "computed": float(np.mean(computed)), "played": float(np.mean(played)),
        "standard_error": float(np.std(played, ddof=1) / np.size(played) ** 0.5),
        "played_of_seeds": [float(np.mean(costs)) for costs in played], "computed_of_seeds": computed,
    }  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="The folder of the figures.")] = HERE / "results",
) -> None:
    """Train, compute, check, write."""
    words = Path("runs/exposure_bias/words")
    if not (words / "config.json").is_file():
        write_words(words)
    sweep, cells = load_sweep(HERE / "exposure_bias.yaml")
    train_missing(cells)
    points = measure(sweep.folder, sweep.seeds)
    arms = {arm: results.of_seeds(points, arm, "recovery 4", "slope") for arm in ARMS}
    claims = results.judge(points)
    checked = [check(sweep.folder, arm, "recovery 4", sweep.seeds) for arm in ("behaviour_cloning", "opd")]
    result = {
        "slopes": {
            arm: {"slope": float(np.mean(values)), "interval": results.interval(values), "seeds": len(values)}
            for arm, values in arms.items()
        },
        "horizons": HORIZONS,
        "claims": claims,
        "rollouts": checked,
        "points": points,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "exposure_bias.json", json.dumps(result, indent=1) + "\n")
    write_whole(out / "exposure_bias.svg", results.plot(points))
    tables = results.table(points), results.ends(claims), results.checks(checked)
    print("\n\n".join("\n".join(lines) for lines in tables))


if __name__ == "__main__":
    typer.run(main)
