"""``opd-agents evaluate``: policies on a suite, side by side."""

from __future__ import annotations

import contextlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from opd_agents.cli_options import (
    BaseUrl,
    Json,
    KeyName,
    Options,
    endpoint,
    environment_options,
    shipped,
)
from opd_agents.terminal import err, print_result


class SamplerKind(StrEnum):
    """Where models act."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def evaluate(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE|FILE.yaml|ENV_ID",
            help=f"An environment, a file, or a suite: {shipped('suites')}.",
        ),
    ],
    policy: Annotated[
        list[str],
        typer.Option(
            help="A checkpoint or run folder, api:MODEL, expert or random; repeatable, the first one is the"
            " baseline."
        ),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Only N tasks, one sample each.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Sampled episodes a task, for pass@k; default: the suite's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the sampled episodes; default: the suite's.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Episodes that are played at once.")] = None,
    sampler: Annotated[
        SamplerKind, typer.Option(help="Models act in this process, or on vLLM: here, or on a --server.")
    ] = SamplerKind.TRANSFORMERS,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A vLLM server of the policy's weights; repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split that the tasks come from.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of sampling and of the environments' noise.")] = 0,
    option: Options = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="Exit with 1 unless: 'success >= baseline - 0.02'; repeatable."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Write episodes and results here; the same command goes on from them."),
    ] = None,
    base_url: BaseUrl = None,
    key_env: KeyName = None,
    as_json: Json = False,
) -> None:
    """Evaluate policies on the held-out tasks of a suite, and compare them.

    Example: `opd-agents evaluate orderdesk --policy expert --policy runs/quickstart --limit 20`
    """
    from opd_agents import evaluation

    # Libraries may print while policies load and play: with --json standard output holds the document alone.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = evaluation.evaluate(
            suite, policies=policy, limit=limit, out=folder, split=split, options=environment_options(option),
            endpoint=endpoint(base_url, key_env), seed=seed, samples=samples, temperature=temperature,
            concurrency=concurrency, sampler=sampler, servers=server or (), gates=gate or (),
        )  # fmt: skip
    print_result(result, evaluation.tables(result), as_json)
    failed = [row for row in result["gates"] if not row["passed"]]
    for row in failed:
        found = "not defined" if row["value"] is None else f"{row['value']:.4g}"
        bound = "" if row["bound"] is None else f" (bound {row['bound']:.4g})"
        err.print(
            f"gate failed: {row['gate']}: {row['policy']} has {found}{bound}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if failed:
        raise typer.Exit(1)
