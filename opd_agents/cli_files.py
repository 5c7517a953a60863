"""The commands that carry models and conversations out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from opd_agents.terminal import out, print_written

app = typer.Typer()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint.")],
    to: Annotated[Path, typer.Option(help="The new folder.")],
    best: Annotated[bool, typer.Option("--best", help="Of the best evaluation, not the newest.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights; default: as they are.")
    ] = None,
) -> None:
    """Write a trained model as a plain Hugging Face folder, LoRA merged into its base.

    Example: `opd-agents export runs/quickstart --to models/student`
    """
    from opd_agents.export import export as write

    out.print(f"Model: {to}, of {write(run, to, best=best, dtype=dtype)}", soft_wrap=True)


Skip = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and say why.")]


@app.command("import-messages")
def import_messages(
    traces: Annotated[
        Path, typer.Argument(metavar="TRACES", help="Chat messages: JSONL, or a saved dataset.")
    ],
    model: Annotated[str, typer.Option(help="The checkpoint whose tokens and chat template count.")],
    file: Annotated[Path, typer.Option("--out", help="The file of trajectories to write.")],
    split: Annotated[str | None, typer.Option(help="Split of the data, where it has several.")] = None,
    skip_bad: Skip = False,
) -> None:
    """Turn recorded conversations into trajectories.

    Example: `opd-agents import-messages traces.jsonl --model models/student --out trajectories.jsonl`
    """
    from opd_agents import traces as program

    print_written(program.import_messages(traces, file, model, split=split, skip_bad=skip_bad), file)


@app.command("export-messages")
def export_messages(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|FILE", help="A run folder, or a file of trajectories.")
    ],
    file: Annotated[Path, typer.Option("--out", help="The JSONL file to write.")],
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that wrote them; default: the run's.")
    ] = None,
    form: Annotated[
        Literal["messages", "completions", "preferences", "prompts"],
        typer.Option("--format", help="OpenAI's messages, or rows for TRL: for SFT, DPO, GRPO."),
    ] = "messages",
    only_success: Annotated[bool, typer.Option("--only-success", help="Successful episodes only.")] = False,
    skip_bad: Skip = False,
) -> None:
    """Turn trajectories into chat messages, to train on here or elsewhere.

    Example: `opd-agents export-messages runs/quickstart --format preferences --out preferences.jsonl`
    """
    from opd_agents import traces as program

    written = program.export_messages(
        source, file, model, form=form, only_success=only_success, skip_bad=skip_bad
    )
    print_written(written, file)
