"""One static HTML file out of run folders: curves, the table of policies, turns before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one static HTML report over ``runs`` and return its path (default: ``runs[0]/report.html``).

    Only the run folders are read. Runs that differ in nothing but their seed, and the ``seed-*`` folders
    of one run, are averaged with 95 % t-intervals over seeds; other runs are shown side by side. A run
    that is still training is reported as far as it got.

    Raises:
        RunFolderError: a folder that is no run folder, or a broken file in it.
    """
    from opd_agents.report.page import render
    from opd_agents.report.reading import prepare_output

    folders = [Path(run) for run in runs]
    html = render(folders)
    target = prepare_output(folders, out)
    # A model may have written half a surrogate pair, which UTF-8 cannot hold.
    target.write_text(html, encoding="utf-8", errors="replace")
    return target


__all__ = ["write_report"]
