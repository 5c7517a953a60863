"""``opd-agents sandbox``: the image of the Docker sandbox, and its containers."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from opd_agents.terminal import details, out

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def sandbox() -> None:
    """Build, show and clean the Docker sandbox that untrusted code runs in.

    Example: `opd-agents sandbox status`
    """


@app.command()
def build(
    source: Annotated[
        Literal["host", "debian"],
        typer.Option("--from", help="This Python, in seconds; Debian's, by debootstrap as root, in minutes."),
    ] = "host",
) -> None:
    """Build the sandbox's image; no registry of images is asked.

    Example: `opd-agents sandbox build`
    """
    from opd_agents.tools.sandbox import image

    image.build(source)
    status()


@app.command()
def status() -> None:
    """Show the daemon, the image, and the containers there are.

    Example: `opd-agents sandbox status`
    """
    from opd_agents.tools.sandbox import docker, image, owners

    client = docker.connect()
    gone = [owners.is_gone(found.labels[owners.LABEL]) for found in owners.containers(client)]
    row = {"daemon": client.version()["Version"], "image": docker.IMAGE}
    row |= image.labels() or {"missing": "build it with: opd-agents sandbox build"}
    row["containers"] = f"{len(gone) - sum(gone)} in use, {sum(gone)} left over"
    out.print(details(row))


@app.command()
def clean() -> None:
    """Remove the containers whose owner has ended; those in use stay.

    Example: `opd-agents sandbox clean`
    """
    from opd_agents.tools.sandbox import docker, owners

    out.print(f"Removed {owners.reap(docker.connect())} containers.")
