"""``opd-agents rollout``: a policy acts, or a repaired episode is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from opd_agents.cli_options import BaseUrl, KeyName, Options, endpoint, environment_options
from opd_agents.errors import UserError
from opd_agents.terminal import err, show_episode, show_outcome


def rollout(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="ENV_ID|RUN|CONFIG",
            help="An environment; with --explain a run folder, or a config as of `train`.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="With --explain: settings that replace the config's."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Who acts: a checkpoint or run folder, api:MODEL, expert or random.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the tasks and of sampling.")] = 0,
    split: Annotated[str, typer.Option(help="Split that the tasks come from.")] = "train",
    option: Options = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show each episode turn by turn.")] = False,
    file: Annotated[Path | None, typer.Option("--out", help="Write the trajectories as JSON lines.")] = None,
    base_url: BaseUrl = None,
    key_env: KeyName = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show an episode with its error, repair, proof and credit.")
    ] = False,
    step: Annotated[
        int | None, typer.Option(min=1, help="With --explain RUN: of this step; default: the newest.")
    ] = None,
) -> None:
    """Let a policy act in an environment; or explain how an episode was repaired.

    Example: `opd-agents rollout opd_agents/OrderDesk-v0 --policy expert --watch`

    Example: `opd-agents rollout runs/orderdesk-opd --explain`
    """
    if explain:
        if policy is not None or option or watch or file is not None:
            raise UserError("--explain goes with a run folder, or a config and KEY=VALUE, and nothing else.")
        _explain(subject, overrides or [], step)
        return
    if policy is None or overrides or step is not None:
        raise UserError(
            "Say who acts, with --policy. KEY=VALUE and --step are of --explain; an environment is made with"
            " --option."
        )
    settings: dict[str, Any] = {
        "episodes": episodes,
        "seed": seed,
        "split": split,
        "options": environment_options(option),
        "endpoint": endpoint(base_url, key_env),
    }
    _play(subject, policy, watch, file, settings)


def _play(env_id: str, policy: str, watch: bool, file: Path | None, settings: dict[str, Any]) -> None:
    from opd_agents.evaluation import play
    from opd_agents.runs import trajectory_row, write_whole
    from opd_agents.types import Trajectory, to_json

    show = show_episode if watch else show_outcome
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


def _explain(subject: str, overrides: list[str], step: int | None) -> None:
    """Of a run folder, or of steps that are played for a config."""
    from opd_agents.config import load_config

    if Path(subject).is_dir():
        if overrides:
            raise UserError(f"{subject} is a run folder, whose config is settled: leave out {overrides[0]}.")
        from opd_agents.explained import show_explained
        from opd_agents.explaining import explain_run

        show_explained(explain_run(Path(subject), step))
        return
    if step is not None:
        raise UserError("--step is of a run folder; of a config the first steps are played.")
    config = load_config(subject, *overrides)
    from opd_agents.explained import show_explained
    from opd_agents.explaining import explain_config

    show_explained(explain_config(config, lambda text: err.print(escape(text), highlight=False)))
