"""The command line: thin commands over the library, one boundary for errors.

Exit codes: 0 done, 1 failed, 2 the user's mistake. Heavy modules are imported inside the commands, so that
``--help``, ``envs`` and ``methods`` answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from opd_agents import cli_files, cli_sandbox
from opd_agents.cli_evaluate import evaluate
from opd_agents.cli_options import Json, Options, environment_options, shipped
from opd_agents.cli_rollout import rollout
from opd_agents.cli_scaling import scaling
from opd_agents.errors import ConfigError, OpdError, UserError
from opd_agents.terminal import (
    check_table,
    details,
    envs_table,
    err,
    methods_table,
    out,
    print_result,
    show_method,
    show_run,
)


class Commands(TyperGroup):
    """The error boundary: a message on standard error and an exit code; ``OPD_DEBUG=1`` shows tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OpdError, OSError, KeyboardInterrupt) as error:
            if os.environ.get("OPD_DEBUG") == "1" or isinstance(error, BrokenPipeError):
                raise
            label = "" if isinstance(error, KeyboardInterrupt) else "[bold red]error:[/] "
            err.print(label + escape(_message(error)), soft_wrap=True, highlight=False)
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from error


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full ({error}). Free some space, then go on; `train` does with --resume."
    return str(error) or "Interrupted."


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def plugins(
    modules: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="FILE.py|MODULE", help="Load your environments first; repeatable."),
    ] = None,
) -> None:
    """On-policy distillation of multi-turn, tool-using language-model agents.

    Example: `opd-agents --import my_desk.py evaluate me/MyDesk-v0 --policy expert`
    """
    if modules:
        from opd_agents.envs import import_plugins

        import_plugins(modules)


@app.command()
def quickstart(
    compare: Annotated[bool, typer.Option("--compare", help="Add the other arms at equal FLOPs.")] = False,
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of training and evaluation.")] = 0,
) -> None:
    """Distil a small agent on the CPU in minutes and write a report.

    Example: `opd-agents quickstart --compare`
    """
    from opd_agents import quickstart as program

    out.print(f"Report: {program.run(output, seed, compare)}", soft_wrap=True)


@app.command()
def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help=f"A YAML file, or a shipped experiment: {shipped('experiments')}."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Several runs, a folder each: 0-4 or 0,3,7.")] = None,
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Look first whether all see the same tokens.")
    ] = True,
) -> None:
    """Run a distillation experiment.

    Example: `opd-agents train orderdesk_opd trainer.steps=5 output=runs/try`
    """
    from opd_agents.config import load_config
    from opd_agents.distributed import join_world
    from opd_agents.report import write_report

    world = join_world()
    with world.errors_told_once():
        loaded = load_config(config, *overrides or ())
        chosen = _seeds(seeds) if seeds is not None else None
    from opd_agents import trainer  # late: a mistake in the config is told before torch is loaded

    runs = (
        trainer.train_seeds(loaded, chosen, resume=resume, probes=probes)
        if chosen
        else [trainer.train(loaded, resume=resume, probes=probes)]
    )
    if not world.is_main:
        return
    for run in runs:
        show_run(run)
    out.print(f"Report: {write_report(runs, loaded.folder / 'report.html')}", soft_wrap=True)


@app.command()
def check(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="As of `train`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of the step that is tried.")] = 8,
    rollouts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of student and teacher, for the four questions; 0: do not ask. Default: 64, but 0 where an"
            " API is paid for them.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look before training: do student, teacher and sampler see the same tokens, does it fit, and is it worth
    the compute?

    Example: `opd-agents check quickstart`
    """
    from opd_agents.config import load_config

    loaded = load_config(config, *overrides or ())
    from opd_agents import checking

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        stages = checking.check(loaded, episodes=episodes, rollouts=rollouts)
    print_result(rows := [stage.row() for stage in stages], check_table(rows), as_json)
    if not all(stage.passed for stage in stages):
        raise typer.Exit(1)


app.command()(evaluate)
app.command()(rollout)


@app.command()
def envs(
    env_id: Annotated[
        str | None, typer.Argument(metavar="[ID|install]", help="Only this one; or `install` a benchmark.")
    ] = None,
    benchmark: Annotated[str | None, typer.Argument(metavar="[BENCHMARK]", help="For install: bfcl.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Try whether ID keeps the contract.")] = False,
    options: Options = None,
    as_json: Json = False,
) -> None:
    """List the environments.

    Example: `opd-agents envs opd_agents/OrderDesk-v0 --json`
    """
    from opd_agents.envs import describe, list_envs

    if env_id == "install" or benchmark is not None:
        from opd_agents.envs.adapters.install import install

        if env_id != "install" or benchmark is None:
            raise UserError("To install a benchmark: opd-agents envs install bfcl")
        install(benchmark)
        return
    if check:
        from opd_agents.testing import check_agent_env

        if env_id is None:
            raise UserError("--check tries one environment: name it, such as opd_agents/OrderDesk-v0.")
        check_agent_env(env_id, **environment_options(options))
        out.print(f"{env_id} keeps the contract.", highlight=False)
        return
    rows = [describe(name) for name in ([env_id] if env_id else list_envs())]
    print_result(rows, details(rows[0]) if env_id else envs_table(rows), as_json, 0 if env_id else 116)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this one and its preset.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, presets of the one trainer.

    Example: `opd-agents methods gkd`
    """
    from opd_agents.config import list_methods, method_text

    text = method_text(name) if name else ""
    rows = [row for row in list_methods() if name in (None, row["name"])]
    if name and not as_json:
        show_method(rows[0], text)
    else:
        print_result(rows, methods_table(rows), as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    file: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; default: report.html in the run.")
    ] = None,
) -> None:
    """Write the report of one or more runs: one static HTML file.

    Example: `opd-agents report runs/a runs/b --out comparison.html`
    """
    from opd_agents.report import write_report

    out.print(f"Report: {write_report(runs, file)}", soft_wrap=True)


app.command()(scaling)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that is being trained.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and exit.")] = False,
) -> None:
    """Follow a run in the terminal while another process trains it; Ctrl-C leaves it running.

    Example: `opd-agents watch runs/quickstart`
    """
    from opd_agents import watching

    watching.watch(run, out, once=once)


app.add_typer(cli_files.app)
app.add_typer(cli_sandbox.app, name="sandbox")


def _seeds(text: str) -> list[int]:
    """``0-4`` and ``0,3,7``, or both mixed."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(
                f"Cannot read --seeds {text!r}: write a range such as 0-4, or a list such as 0,3,7."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        seeds.extend(range(first, last + 1))
    if not seeds:
        raise ConfigError(f"--seeds {text!r} is an empty range: write the smaller number first, such as 0-4.")
    return list(dict.fromkeys(seeds))


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
