"""The command line: thin commands over the library, one boundary for errors.

Exit codes: 0 done, 1 failed, 2 the user's mistake. Heavy modules are imported inside the commands, so that
``--help``, ``envs`` and ``methods`` answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.resources
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from opd_agents import cli_files, cli_sandbox
from opd_agents.errors import ConfigError, OpdError, UserError
from opd_agents.terminal import (
    check_table,
    details,
    envs_table,
    err,
    methods_table,
    out,
    print_result,
    show_episode,
    show_method,
    show_outcome,
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


def _shipped(kind: str) -> str:
    """The names of the YAML files in ``configs/<kind>``."""
    entries = importlib.resources.files(f"opd_agents.configs.{kind}").iterdir()
    return ", ".join(
        sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))
    )


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="Make the environment with it: tasks=FILE; repeatable."
    ),
]


BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="Of api:MODEL; default: OPENAI_BASE_URL, else OpenAI's.")
]
KeyName = Annotated[
    str | None,
    typer.Option("--key-env", metavar="NAME", help="The variable with its key; default: OPENAI_API_KEY."),
]


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
            metavar="CONFIG", help=f"A YAML file, or a shipped experiment: {_shipped('experiments')}."
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
    as_json: Json = False,
) -> None:
    """Look before training: do student, teacher and sampler see the same tokens, and does it fit?

    Example: `opd-agents check quickstart`
    """
    from opd_agents.config import load_config

    loaded = load_config(config, *overrides or ())
    from opd_agents import checking

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        stages = checking.check(loaded, episodes=episodes)
    print_result(rows := [stage.row() for stage in stages], check_table(rows), as_json)
    if not all(stage.passed for stage in stages):
        raise typer.Exit(1)


@app.command()
def evaluate(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE|FILE.yaml|ENV_ID",
            help=f"An environment, a file, or a suite: {_shipped('suites')}.",
        ),
    ],
    policy: Annotated[
        list[str], typer.Option(help="A checkpoint or run folder, api:MODEL, expert or random; repeatable.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Only N tasks, one sample each.")] = None,
    split: Annotated[str, typer.Option(help="Split that the tasks come from.")] = "test",
    option: Options = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Write trajectories and results here.")] = None,
    base_url: BaseUrl = None,
    key_env: KeyName = None,
    as_json: Json = False,
) -> None:
    """Evaluate policies on the held-out tasks of a suite.

    Example: `opd-agents evaluate orderdesk --policy expert --policy runs/quickstart --limit 20`
    """
    from opd_agents import evaluation

    # Libraries may print while policies load and play: with --json standard output holds the document alone.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = evaluation.evaluate(
            suite, policies=policy, limit=limit, out=folder, split=split, options=_options(option),
            endpoint=_endpoint(base_url, key_env),
        )  # fmt: skip
    print_result(result, evaluation.table(result), as_json)


@app.command()
def rollout(
    env_id: Annotated[
        str, typer.Argument(metavar="ENV_ID", help="An environment; `opd-agents envs` lists them.")
    ],
    policy: Annotated[str, typer.Option(help="A checkpoint or run folder, api:MODEL, expert or random.")],
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the tasks and of sampling.")] = 0,
    split: Annotated[str, typer.Option(help="Split that the tasks come from.")] = "train",
    option: Options = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show each episode turn by turn.")] = False,
    file: Annotated[Path | None, typer.Option("--out", help="Write the trajectories as JSON lines.")] = None,
    base_url: BaseUrl = None,
    key_env: KeyName = None,
) -> None:
    """Let a policy act in an environment.

    Example: `opd-agents rollout opd_agents/OrderDesk-v0 --policy expert --watch`
    """
    from opd_agents.evaluation import play
    from opd_agents.runs import trajectory_row, write_whole
    from opd_agents.types import Trajectory, to_json

    show = show_episode if watch else show_outcome
    settings: dict[str, Any] = {
        "episodes": episodes,
        "seed": seed,
        "split": split,
        "options": _options(option),
        "endpoint": _endpoint(base_url, key_env),
    }
    if file is None:
        play(env_id, policy, watch=show, **settings)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")  # in the order in which they end; what an interrupt leaves
    with part.open("w", encoding="utf-8") as kept:

        def keep(trajectory: Trajectory) -> None:
            kept.write(to_json(trajectory_row(trajectory)) + "\n")
            kept.flush()
            show(trajectory)

        played = play(env_id, policy, watch=keep, **settings)
    write_whole(file, "".join(to_json(trajectory_row(t)) + "\n" for t in played))
    part.unlink()


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
        check_agent_env(env_id, **_options(options))
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


app.add_typer(cli_files.app)
app.add_typer(cli_sandbox.app, name="sandbox")


def _options(given: Sequence[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` strings as the arguments of an environment; paths count from the working folder."""
    from opd_agents.config import absolute_inputs, parse_overrides

    return absolute_inputs(parse_overrides(given or ()), Path.cwd())


def _endpoint(base_url: str | None, key_env: str | None) -> Any:
    """Of ``api:MODEL``. A server of one's own, such as vLLM's, asks for no key unless one is named."""
    from pydantic import ValidationError

    from opd_agents.config import Endpoint

    key = key_env or ("OPENAI_API_KEY" if base_url is None or "OPENAI_API_KEY" in os.environ else None)
    try:
        return Endpoint(base_url=base_url, key=key)
    except ValidationError as error:
        raise ConfigError(f"--base-url or --key-env: {error.errors()[0]['msg']}") from None


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
