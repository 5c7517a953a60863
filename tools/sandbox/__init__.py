"""Sandboxes: commands that nobody trusts, in a folder of plain data, within limits."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from opd_agents.errors import UserError
from opd_agents.tools.sandbox.base import Limits, Result, Sandbox, Stopped

DEFAULT = Limits()

__all__ = ["Kind", "Limits", "Result", "Sandbox", "Stopped", "open_sandbox"]

Kind: TypeAlias = Literal["docker", "bubblewrap", "unsafe"]


def open_sandbox(kind: Kind = "docker", *, image: str | None = None, limits: Limits = DEFAULT) -> Sandbox:
    """A sandbox with an empty work folder; one kind never stands in for another.

    ``docker`` is the boundary for code that nobody has read; ``image`` names an image with python3 other than
    the one of ``opd-agents sandbox build``. ``bubblewrap`` needs no daemon and limits less: see
    ``opd_agents.tools.sandbox.bubblewrap``. ``unsafe`` runs commands as this process's own, for trusted
    tests. Raises MissingPart if the kind's program, daemon or image is not there, and UserError for an
    unknown kind.
    """
    if kind not in get_args(Kind):
        raise UserError(f"Unknown sandbox {kind!r}: it is one of {', '.join(get_args(Kind))}.")
    if image is not None and kind != "docker":
        raise UserError(f"image={image!r}: only the docker sandbox has images, and this one is {kind!r}.")
    if kind == "docker":
        from opd_agents.tools.sandbox.docker import IMAGE, DockerSandbox

        return DockerSandbox(image or IMAGE, limits)
    if kind == "bubblewrap":
        from opd_agents.tools.sandbox.bubblewrap import BubblewrapSandbox

        return BubblewrapSandbox(limits)
    from opd_agents.tools.sandbox.unsafe import UnsafeSandbox

    return UnsafeSandbox(limits)
