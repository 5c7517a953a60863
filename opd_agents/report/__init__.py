"""One static HTML file out of run folders: curves, the table of policies, turns before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one static HTML report over ``runs`` and return its path (default: ``runs[0]/report.html``).

    Only these folders are read, of runs or of `evaluate --out`. Trajectories that would make the page too
    large stand in ``report.trajectories.js`` beside it, which the page loads when one of them is opened. Runs
    that differ in nothing but their seed, and the ``seed-*`` folders of one run, are averaged with 95 %
    t-intervals over seeds; other runs are shown side by side. A run that is still training is reported as far
    as it got.

    Raises:
        RunFolderError: a folder that is no run folder, or a broken file in it.
    """
    from opd_agents.report.page import render
    from opd_agents.report.reading import prepare_output

    folders = [Path(run) for run in runs]
    target = Path(out) if out else Path(*folders[:1]) / "report.html"
    beside = target.with_name(f"{target.stem}.trajectories.js")
    html, side = render(folders, beside.name)
    prepare_output(target)
    # A model may have written half a surrogate pair, which UTF-8 cannot hold.
    target.write_text(html, encoding="utf-8", errors="replace")
    if side:
        beside.write_text(side, encoding="utf-8")
    else:
        beside.unlink(missing_ok=True)  # of a report that was larger
    return target


__all__ = ["write_report"]
