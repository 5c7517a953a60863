"""``opd-agents scaling``: success against compute, over runs of several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opd_agents.cli_options import Json
from opd_agents.errors import ConfigError
from opd_agents.terminal import out, print_result


def scaling(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of `train --seeds`, or run folders that differ in their seed; the first is what the"
            " others are compared with.",
        ),
    ],
    level: Annotated[
        list[float] | None,
        typer.Option(help="A success rate, such as 0.8, to which compute is looked for; repeatable."),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Of greedy episodes, not of sampled ones.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Write scaling.json, .md and .svg into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit validation success against training FLOPs, and compare how runs split their compute.

    Example: `opd-agents scaling runs/base runs/group_2 --level 0.8 --out results`
    """
    from opd_agents.scaling import shown, study

    levels = tuple(level or study.LEVELS)
    if wrong := [one for one in levels if not 0 < one < 1]:
        raise ConfigError(f"--level {wrong[0]:g}: a success rate between 0 and 1, such as 0.8.")
    found = study.study(runs, levels, "success_greedy" if greedy else "success")
    if folder is not None:
        shown.write(found, folder)
    print_result(found, shown.terminal(found), as_json, shown.WIDTH)
    if folder is not None and not as_json:
        out.print(f"Written: {folder}/scaling.json, .md, .svg", soft_wrap=True, highlight=False)
